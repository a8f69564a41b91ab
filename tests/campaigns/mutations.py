"""Commands with a mistake in them, or without: drawn from a seed.

A case is one command line, of a config that runs and one to three changes of
it: of a key (on the command line or in the file), of a flag, or of the bytes of
the file. Case `i` of a seed is the same in every run.
"""

import copy
import dataclasses
import math
import pathlib
import random
from collections.abc import Callable
from typing import Any

from posttrain import config as config_lib
from posttrain.cli import arguments
from posttrain.config import keys, reader, schema
from posttrain.model import config as model_config

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "configs/tiny.py"
TASK = "posttrain.tasks.signs"

INTS = (0, 1, -1, 2, 3, 7, 64, 2**31 - 1, 2**31, 2**32, 2**63, -(2**31),
        10**30, 10**400)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-9, 1e-45, 1e-320, 1e30, 1e308,
          math.inf, -math.inf, math.nan)
TEXTS = ("", "x", "a,b", " ", "1", "1.5", "1e3", "1e999", "None", "True", "()",
         "(", "[1, 2]", "{}", "{1: 2}", "9" * 5000, "x" * 10_000, "é" * 30,
         ".", "/", "..", "/dev/null", "/nonexistent/x", "~", "{n}", "{{", "%s",
         "\n", "\x1b[31m", "\udc80", "a:b", ":", "builtins:len", "os:getcwd",
         f"{TASK}:reward", f"{TASK}:nope", f"{TASK}:corpus", "x.py:f",
         f"{TINY}:get_config", "init", "reason", "cold_start", "</think>",
         "(?", "blocks/(q|k)", "{[]: 1}", "-" * 9000 + "1", "[" * 5000,
         '{"a": 1}', "[" * 300 + "]" * 300)
# What a file can hold and a command line cannot.
OBJECTS = (None, (), ((),), ({},), {}, {"a": {}}, {1: 2}, {"kind": "sft"},
           {"kind": ()}, {"a": math.nan}, b"x", 1j, "a\0b", "\ud800",
           (1, "x"), ((1, 2), 3), 10**400, True)


@dataclasses.dataclass(frozen=True)
class Case:
  """One command.

  Attributes:
    verb, words: of the command line; {dir} is a directory of the case's own,
      {run} that of a finished run.
    names: what a message about the mistake may name.
    file: contents of {dir}/config.py, which the command may name.
  """

  verb: str
  words: tuple[str, ...]
  names: tuple[str, ...]
  file: str | None = None

  def argv(self, folder: pathlib.Path, run: pathlib.Path) -> list[str]:
    place = lambda word: word.replace("{dir}", str(folder)).replace(
        "{run}", str(run))
    return [self.verb, *map(place, self.words)]


def draw(seed: int, number: int) -> Case:
  """Case `number` of a seed."""
  rng = random.Random(f"{seed}:{number}")
  kind = rng.choices(
      (_assigned, _in_the_file, _flagged, _damaged), (10, 5, 6, 1))[0]
  return kind(rng)


def _base() -> dict[str, Any]:
  return config_lib.jsonable(config_lib.read_file(f"{TINY}:debug"))


def _paths(values: dict[str, Any]) -> dict[str, Any]:
  """Every path of a config, and its key in the schema."""
  layout = reader.layout(reader.plain(values))
  found = {path: _node(layout, path) for path in keys.paths(layout)}
  for field in dataclasses.fields(model_config.ModelConfig):
    found[f"model_overrides.{field.name}"] = None
  for path in ("reason.problems.args.count", "measure.problems.args.seed",
               "cold_start.data.sources.0.args.count"):
    found[path] = None
  return found


def _node(layout: keys.Section, path: str) -> keys.Key | None:
  node: Any = layout
  for name in path.split("."):
    if isinstance(node, keys.Items):
      node = node.item
      if name.isdecimal():
        continue
    node = node.keys[name]
  return node if isinstance(node, keys.Key) else None


def _value(rng: random.Random, key: keys.Key | None) -> Any:
  """Mostly of the key's type, and then mostly at an edge of its range."""
  kind: Any = key.type if key else rng.choice((int, float, str, dict))
  if rng.random() < 0.15:
    kind = rng.choice((int, float, str, bool))
  if key and key.choices and rng.random() < 0.7:
    return rng.choice(key.choices)
  if kind in (int, float) and rng.random() < 0.4:  # Often within a range.
    return rng.choice((1, 2, 3, 4, 8)) if kind is int else rng.uniform(0, 1)
  if kind in (int, float):
    edges = (INTS if kind is int else FLOATS) + _edges(key)
    return rng.choice(edges)
  if kind is bool:
    return rng.random() < 0.5
  if kind is str:
    return rng.choice(TEXTS)
  if kind is dict:
    return rng.choice(({}, {"count": rng.choice(INTS)}, {"x": 1}, {"a": ()}))
  inner = dataclasses.replace(key, type=kind.__args__[0]) if key else None
  return tuple(_value(rng, inner) for _ in range(rng.choice((0, 1, 1, 2, 3))))


def _edges(key: keys.Key | None) -> tuple:
  if key is None or key.type not in (int, float) or not key.bounds:
    return ()
  interval = key.bounds.removeprefix(keys.OR_ZERO)
  ends = [float(end) for end in interval[1:-1].split(",")]
  near = [end + step for end in ends if math.isfinite(end)
          for step in (-1, 0, 1)]
  return tuple(map(key.type, near))


def _misspelt(rng: random.Random, path: str) -> str:
  names = path.split(".")
  place = rng.randrange(len(path))
  return rng.choice((
      path[:place] + path[place + 1:], path + ".x", ".".join(names[1:]) or "x",
      names[-1], f"{path}.0", path + "s", "", ".", "..", path * 40,
      f"new.{names[-1]}", path.upper(), f"stages.{names[-1]}"))


def _text(value: Any) -> str:
  if isinstance(value, tuple):
    return ",".join(map(_text, value))
  try:
    return str(value)
  except ValueError:
    return "9" * 5000


def _assigned(rng: random.Random) -> Case:
  """`--config.path=value` of the verbs that take it."""
  paths = _paths(_base())
  chosen = rng.sample(sorted(paths), rng.choice((1, 1, 1, 2, 3)))
  words, names = [], []
  for path in chosen:
    key = paths[path]
    if rng.random() < 0.15:
      path = _misspelt(rng, path)
    text = _text(_value(rng, key))
    words.append(f"--config.{path}={text}".replace("\0", ""))
    names.append(path)
  return Case("train", (f"--config={TINY}:debug", "--workdir={dir}/run",
                        *words), _named(names))


def _in_the_file(rng: random.Random) -> Case:
  """Values that stand in a config file."""
  values = _base()
  paths = _paths(values)
  names = []
  for path in rng.sample(sorted(paths), rng.choice((1, 1, 2))):
    value = rng.choice(OBJECTS) if rng.random() < 0.5 else _value(
        rng, paths[path])
    *above, leaf = path.split(".")
    if above and rng.random() < 0.15:  # A whole section in one's place.
      *above, leaf = above
    names.append(".".join([*above, leaf]))
    if not _put(values, above, leaf, copy.deepcopy(value)):
      continue
  text = ("from math import inf, nan\n\n\ndef get_config():\n"
          f"  return {values!r}\n")
  return Case(
      "train", ("--config={dir}/config.py", "--workdir={dir}/run"),
      _named(names), text)


def _put(values: Any, above: list[str], leaf: str, value: Any) -> bool:
  for name in above:
    if isinstance(values, list):
      if not name.isdecimal() or int(name) >= len(values):
        return False
      values = values[int(name)]
    elif isinstance(values, dict):
      values = values.setdefault(name, {})
    else:
      return False
  if not isinstance(values, dict):
    return False
  values[leaf] = value
  return True


def _damaged(rng: random.Random) -> Case:
  """A config file with bytes lost, doubled or changed."""
  text = TINY.read_text().replace('arg=""', 'arg="debug"')
  for _ in range(rng.choice((1, 2, 5))):
    start = rng.randrange(len(text))
    end = start + rng.choice((1, 2, 10, 100))
    text = text[:start] + rng.choice((
        "", text[start:end] * 2, rng.choice(TEXTS[:9]), "\t")) + text[end:]
  return Case("train", ("--config={dir}/config.py", "--workdir={dir}/run"),
              ("config.py", "posttrain", *schema.TOP.keys, "measure"), text)


_STARTS: dict[str, Callable[[], tuple[str, ...]]] = {
    "train": lambda: ("--workdir={run}",),
    "eval": lambda: ("--workdir={run}",),
    "sample": lambda: ("--workdir={run}", "--prompt=6 5 2 2 : 1",
                       "--max-tokens=8"),
    "chat": lambda: ("--workdir={run}",),
    "report": lambda: ("--workdir={run}", "--output={dir}/report.html"),
    "export": lambda: ("--workdir={run}", "--output={dir}/out"),
    "import": lambda: ("--model=smollm2-135m", "--output={dir}/out"),
    "plan": lambda: (f"--config={TINY}:debug", "--topology=v5e:2x2"),
}


_PLACES = ("--config", "--model", "--workdir", "--output", "--topology",
           "--prompts")


def _flagged(rng: random.Random) -> Case:
  """Flags of any verb: changed, doubled, left out, misspelt."""
  verb = rng.choice(sorted(_STARTS))
  flags = [flag for flag in arguments.make_parsers()[verb].flags()
           if flag not in ("--help", "--config.KEY")]
  words, names = list(_STARTS[verb]()), []
  for _ in range(rng.choice((1, 1, 2, 3))):
    flag = rng.choice(flags)
    names.append(flag)
    value = _text(rng.choice(rng.choice((INTS, FLOATS, TEXTS))))
    roll = rng.random()
    if roll < 0.1 and words:
      names.append(words.pop(rng.randrange(len(words))).partition("=")[0])
    elif roll < 0.2:
      flag = rng.choice((_misspelt(rng, flag), flag[1:], "--", "-", "--=", "",
                         "--config.", "--config.=", "--config.seed", value))
      words.append(flag)
      names.append(flag)
    elif roll < 0.3:
      words.append(flag)
    else:
      words.append(f"{flag}={value}")
      if flag in _PLACES:  # What was not found there is named.
        names.append(value)
  if rng.random() < 0.02:
    verb = rng.choice(TEXTS)
    names.append(verb)
  names += ["''"] * ("" in (verb, *words))
  return Case(verb, tuple(words), _named(names))


def _named(paths: list[str]) -> tuple[str, ...]:
  """A path, and its last names: checks name keys inside a stage."""
  found = []
  for path in paths:
    parts = path.split(".")
    found += [".".join(parts[i:]) for i in range(len(parts))]
    found += [".".join(parts[:i]) for i in range(1, len(parts))]
  found += [repr(path) for path in paths]
  found += ["names no key"] * ("" in paths) + ["no flag --."] * (
      "--=" in paths)
  return tuple(name[:keys.LONGEST_SHOWN // 2 - 1] for name in found)
