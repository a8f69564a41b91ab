"""Reads a config file, applies overrides, checks it and fills in defaults.

`load("configs/tiny.py:debug", ["seed=1"])` gives the resolved config, in which
every key of `schema` and `stages` has a value. All problems are found before
anything compiles and are reported together. Never imports JAX, unless the file
of a stage's own kind does.
"""

import importlib.util
import inspect
import json
import pathlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from posttrain.config import checks, keys, overrides, reader, schema

MOST_SHOWN = 50  # Problems of one config, in a message.


class ConfigError(ValueError):
  """All problems of one config, one per line; also as `problems`."""

  def __init__(self, problems: Sequence[str], origin: str):
    self.problems = tuple(dict.fromkeys(problems))
    count = len(self.problems)
    lines = [f"{keys.shown(origin)[1:-1]}: {count} problem{'s'[:count - 1]}",
             *self.problems[:MOST_SHOWN]]
    if count > MOST_SHOWN:
      lines.append(f"and {count - MOST_SHOWN} more.")
    super().__init__("\n  ".join(lines))


def load(spec: str, assignments: Sequence[str] = ()) -> config_dict.ConfigDict:
  """Resolves the config of `FILE[:arg]` under `path=value` assignments.

  Raises:
    ConfigError: anything wrong with the file, the assignments or the result.
  """
  return assign(read_file(spec), assignments, spec)


def assign(
    config: config_dict.ConfigDict | Mapping, assignments: Sequence[str],
    origin: str, *, saved: bool = False,
) -> config_dict.ConfigDict:
  """Resolves a config after `path=value` assignments.

  Args:
    config: a config, resolved already where `saved`.
    assignments: as they follow `--config.` on the command line.
    origin: named in the error.
    saved: keys without effect are an error only where they are assigned.

  Raises:
    ConfigError: anything wrong with the assignments or the result.
  """
  values = reader.plain(config)
  paths = []
  for assignment in assignments:
    path, _, text = assignment.partition("=")
    try:
      values = overrides.apply(values, path, text)
    except ValueError as error:
      raise ConfigError([str(error)], origin) from None
    paths.append(path)
  return resolve(
      values, ignore_inert=lambda path: saved and path not in paths,
      origin=origin)


def read_file(spec: str) -> config_dict.ConfigDict:
  """Runs `get_config(arg)` of a config file `FILE[:arg]`.

  Raises:
    ConfigError: there is no such file, it does not run, or it returns no
      config.
  """
  config = _call(spec, "get_config")
  if not isinstance(config, (config_dict.ConfigDict, Mapping)):
    raise ConfigError([
        f"get_config() returns {keys.shown(config)}, needed an "
        "ml_collections.ConfigDict."], spec)
  return config


def read_sweep(spec: str) -> list[list[str]]:
  """Lists the runs of `get_sweep([arg])` of a config file, each checked.

  Returns:
    One list of `path=value` assignments for each run.

  Raises:
    ConfigError: there is no sweep, a run is there twice, or one has a config
      that is wrong.
  """
  runs = _call(spec, "get_sweep")
  if not isinstance(runs, (list, tuple)):
    raise ConfigError([
        f"get_sweep() returns {keys.shown(runs)}, needed dicts of paths and "
        "values, one by one."], spec)
  for number, run in enumerate(runs):
    if not isinstance(run, Mapping) or not all(
        isinstance(path, str) for path in run):
      raise ConfigError([
          f"get_sweep() gives {keys.shown(run)} as its run {number}; needed "
          "a dict of paths and values."], spec)
    if run in runs[:number]:
      raise ConfigError([f"get_sweep() has {keys.shown(run)} twice."], spec)
  if not runs:
    raise ConfigError(["get_sweep() has no runs."], spec)
  return [[f"{path}={value if isinstance(value, str) else repr(value)}"
           for path, value in run.items()] for run in runs]


def _call(spec: str, function: str) -> Any:
  """Calls a function of a config file, with the argument if it may."""
  name, colon, arg = spec, "", ""
  if not pathlib.Path(spec).is_file() and ":" in spec:
    name, colon, arg = spec.rpartition(":")
  path = pathlib.Path(name)
  if not path.is_file():
    if path.is_dir():
      raise ConfigError([f"{path} is a directory; name a file in it."], spec)
    near = keys.hint(
        path.name, (other.name for other in path.parent.glob("*.py")),
        f" The nearest is {path.parent / '{}'}.")
    raise ConfigError([f"there is no file {path}.{near}"], spec)
  found = getattr(_run(path), function, None)
  if found is None:
    raise ConfigError([f"{path} defines no {function}()."], spec)
  if not callable(found):
    raise ConfigError([
        f"{function} of {path} is {keys.shown(found)}, and a function is "
        "needed."], spec)
  takes = bool(inspect.signature(found).parameters)
  if colon and not takes and function == "get_config":
    raise ConfigError(
        [f"get_config() takes no argument, so leave out :{arg}."], spec)
  try:
    result = found(arg) if colon and takes else found()
    return list(result) if inspect.isgenerator(result) else result
  except ValueError as error:  # What the file says of its argument.
    raise ConfigError([str(error)], spec) from error
  except Exception as error:
    raise ConfigError([_fault(path, error)], spec) from error


def _fault(path: pathlib.Path, error: Exception) -> str:
  """Names the last line of a config file before an error, and the error."""
  if isinstance(error, SyntaxError):
    return f"{error.filename}, line {error.lineno}: {error.msg}."
  own = [line for frame, line in traceback.walk_tb(error.__traceback__)
         if frame.f_code.co_filename == str(path.absolute())]
  where = f", line {own[-1]}" if own else ""
  return f"{path}{where}: {type(error).__name__}: {error}."


def _run(path: pathlib.Path) -> Any:
  """Imports a config file as a module.

  Raises:
    ConfigError: it is no Python file, or does not run.
  """
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise ConfigError([f"{path} is no Python file."], str(path))
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise ConfigError([_fault(path, error)], str(path)) from error
  return module


def resolve(
    config: config_dict.ConfigDict | Mapping, *,
    ignore_inert: Callable[[str], bool] = lambda path: False,
    origin: str = "config",
) -> config_dict.ConfigDict:
  """Checks a config and fills in every default.

  Sections of stages that `stages` does not name are checked and left out.
  Elements of tuples, such as `data.sources`, are plain dicts.

  Args:
    config: what a config file returns.
    ignore_inert: paths that may be set without effect, as they are in a config
      that was resolved before.
    origin: named in the error.

  Raises:
    ConfigError: lists all problems, each with its dotted path.
  """
  read = reader.Reader(reader.plain(config))
  inert = [problem for path, problem in checks.without_effect(read)
           if not ignore_inert(path)]
  problems = [*read.problems, *inert, *checks.run(read)]
  if problems:
    raise ConfigError(problems, origin)
  resolved = {
      name: value for name, value in read.resolved.items()
      if name in schema.TOP.keys or name in read.resolved["stages"]}
  return config_dict.ConfigDict(resolved).lock()


def jsonable(config: config_dict.ConfigDict | Mapping) -> dict[str, Any]:
  """Converts a config to plain dicts and lists, as config.json gives it back.
  """
  return json.loads(json.dumps(reader.plain(config)))


def functions(config: config_dict.ConfigDict) -> dict[str, str]:
  """Lists every `module:function` of a resolved config, and the first path."""
  return reader.functions(reader.plain(config))


def tasks(
    config: config_dict.ConfigDict | Mapping,
) -> list[tuple[str, dict[str, Any]]]:
  """Lists (path, section) of every section that names a task."""
  return list(reader.tasks(reader.plain(config)))


def diff(
    old: config_dict.ConfigDict | Mapping,
    new: config_dict.ConfigDict | Mapping,
) -> list[str]:
  """Lists `path: old -> new` of every leaf that differs; shortens values."""
  a, b = (dict(reader.leaves(reader.plain(side))) for side in (old, new))
  text = lambda side, path: repr(side[path]) if path in side else None
  show = lambda side, path: (
      keys.shown(side[path]) if path in side else "(absent)")
  return [f"{path}: {show(a, path)} -> {show(b, path)}"
          for path in dict.fromkeys([*a, *b])
          if text(a, path) != text(b, path)]
