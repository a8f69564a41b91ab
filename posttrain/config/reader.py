"""Reads a config's values in one pass: typed values out, problems kept."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from posttrain.config import keys, schema, stages


def plain(config: Any) -> Any:
  """Copies ConfigDicts, dicts and lists to nested dicts and tuples."""
  if isinstance(config, config_dict.ConfigDict):
    config = config.to_dict()
  if isinstance(config, Mapping):
    return {key: plain(value) for key, value in config.items()}
  if isinstance(config, (list, tuple)):
    return tuple(plain(value) for value in config)
  return config


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields dotted paths and values; dicts in a tuple are numbered."""
  if isinstance(values, dict) and values:
    for name, value in values.items():
      yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))
  elif (isinstance(values, tuple) and values
        and all(isinstance(value, dict) for value in values)):
    for index, value in enumerate(values):
      yield from leaves(value, f"{prefix}.{index}")
  else:
    yield prefix, values


def at(values: Any, path: str) -> Any:
  """Returns the value at a dotted path through dicts."""
  for name in path.split("."):
    values = values[name]
  return values


def layout(values: Mapping) -> keys.Section:
  """Lays out the schema of a config: the top and its stage sections."""
  sections = {}
  for name, section in values.items():
    if isinstance(name, str) and name not in schema.TOP.keys and (
        isinstance(section, Mapping) and "kind" in section):
      with contextlib.suppress(ValueError):  # `Reader` names the problem.
        sections[name] = stage_section(section["kind"])
  return keys.Section("", **{**schema.TOP.keys, **sections})


def stage_section(kind: str) -> keys.Section:
  """Lists the keys of a stage of one kind, `kind` itself first.

  Raises:
    ValueError: there is no such kind.
  """
  section = stages.schema_of(kind).keys
  return keys.Section(section.doc, kind=keys.Key(
      str, keys.REQUIRED, "Kind of the stage.", function=":" in kind),
      **section.keys)


def functions(values: Mapping) -> dict[str, str]:
  """Lists every `module:function` of a resolved config, and the first path."""
  found: dict[str, str] = {}
  _functions(layout(values), values, "", found)
  return found


def _functions(
    node: Any, value: Any, path: str, found: dict[str, str]) -> None:
  if isinstance(node, keys.Section):
    for name, child in node.keys.items():
      _functions(child, value.get(name), f"{path}.{name}" if path else name,
                 found)
  elif isinstance(node, keys.Items):
    for index, item in enumerate(value):
      _functions(node.item, item, f"{path}.{index}", found)
  elif isinstance(node, keys.Key) and node.function and value:
    for name in [value] if isinstance(value, str) else value:
      found.setdefault(name, path)


def tasks(values: Any, path: str = "") -> Iterator[tuple[str, dict]]:
  """Yields (path, section) of every section that names a task."""
  if isinstance(values, tuple):
    values = {str(index): value for index, value in enumerate(values)}
  if isinstance(values, dict):
    if values.get("task"):
      yield path, values
      return
    for name, value in values.items():
      yield from tasks(value, f"{path}.{name}" if path else name)


class Reader:
  """Reads plain values against their layout.

  Attributes:
    resolved: the typed values with all defaults.
    problems: one line each, beginning with the dotted path.
    faulty: first names of the paths that have problems.
  """

  def __init__(self, values: Mapping):
    self.values = values
    self.layout = layout(values)
    self.problems: list[str] = []
    self.faulty: set[str] = set()
    self.resolved = self._section(self.layout, values, "")

  def _problem(self, path: str, message: str) -> None:
    self.problems.append(f"{path}: {message}")
    self.faulty.add(path.partition(".")[0])

  def _section(
      self, section: keys.Section, values: Any, prefix: str,
  ) -> dict[str, Any]:
    if not isinstance(values, Mapping):
      self._problem(prefix[:-1], (
          f"found {keys.shown(values)}, needed a section with the keys "
          f"{', '.join(section.keys)}."))
      return {}
    for name in values:
      if not isinstance(name, str):
        self._problem(prefix + keys.shown(name), (
            "found as the name of a key, which is a string."))
        continue
      node = section.keys.get(name)
      if node is None or isinstance(node, (keys.Refused, keys.Renamed)):
        self._unknown(node, name, values[name], prefix)
    resolved: dict[str, Any] = {}
    for name, node in section.keys.items():
      if isinstance(node, keys.Section):
        resolved[name] = self._section(
            node, values.get(name, {}), f"{prefix}{name}.")
      elif isinstance(node, (keys.Refused, keys.Renamed)):
        continue
      elif name in values:
        resolved[name] = self._value(node, values[name], prefix + name)
      elif node.default is keys.REQUIRED:
        doc = node.doc.partition(". ")[0].rstrip(".")
        self._problem(
            prefix + name, f"missing; needed: {doc[0].lower()}{doc[1:]}.")
      else:
        resolved[name] = plain(node.default)
    return resolved

  def _unknown(
      self, node: keys.Refused | keys.Renamed | None, name: str, value: Any,
      prefix: str,
  ) -> None:
    if not prefix and isinstance(value, Mapping) and "kind" in value:
      try:
        stages.schema_of(value["kind"])
      except ValueError as error:
        return self._problem(f"{name}.kind", str(error))
    if isinstance(node, keys.Renamed):
      first = prefix.partition(".")[0]
      stage = "" if first in schema.TOP.keys else f"{first}."
      return self._problem(prefix + name, (
          f"found {keys.shown(value)}, and this key is called "
          f"{stage}{node.path} now."))
    for path, _ in leaves(value, prefix + name):
      near = keys.hint(
          path, keys.paths(self.layout), " The nearest key is {}.")
      what = (f"not allowed here: {node.reason}" if node
              else "no such key" + self._used_elsewhere(path))
      self._problem(path, f"{what}.{near}")
    return None

  def _used_elsewhere(self, path: str) -> str:
    """Says which kinds have a key that this stage's kind does not use."""
    stage, _, rest = path.partition(".")
    others = [kind for kind in stages.KINDS
              if rest in keys.paths(stages.schema_of(kind).keys)]
    if stage in schema.TOP.keys or stage not in self.layout.keys or not others:
      return ""
    kind = self.values[stage]["kind"]
    return f" in a stage of kind {kind} (it belongs to {' and '.join(others)})"

  def _value(
      self, node: keys.Key | keys.Items, value: Any, path: str,
  ) -> Any:
    if isinstance(node, keys.Items):
      if not isinstance(value, tuple):
        self._problem(path, (
            f"found {keys.shown(value)}, needed a tuple of dicts."))
        return ()
      return tuple(self._section(node.item, item, f"{path}.{index}.")
                   for index, item in enumerate(value))
    typed = typed_as(value, node.type)
    if typed is None and isinstance(value, dict) and node.type is dict:
      wrong = next(((inner, found) for inner, found in leaves(value, path)
                    if not _is_json(found)), (path, value))
      self._problem(wrong[0], (
          f"found {keys.shown(wrong[1])}, needed numbers of 64 bits, texts, "
          "True, False, None, and tuples and dicts of such, with texts as "
          "keys."))
      return value
    if typed is None:
      self._problem(path, (
          f"found {keys.shown(value)} ({type(value).__name__}), needed "
          f"{keys.TYPE_NAMES[node.type]}."))
      return value
    for item in typed if isinstance(typed, tuple) else (typed,):
      if node.choices and item not in node.choices:
        self._problem(path, (
            f"found {keys.shown(item)}, needed one of "
            f"{', '.join(map(repr, node.choices))}"
            f"{keys.hint(item, node.choices, '; the nearest is {!r}')}."))
      if isinstance(item, (int, float)) and not isinstance(item, bool) and (
          not keys.within(item, node.bounds)):
        self._problem(path, (
            f"found {keys.shown(item)}, needed a value in "
            f"{keys.allowed(item, node.bounds)}."))
      if isinstance(item, str) and not _is_text(item):
        self._problem(path, (
            f"found {keys.shown(item)}, which has characters that no file or "
            "name can hold."))
      if node.function and item != node.default and not all(
          item.rpartition(":")[::2]):
        self._problem(path, (
            f"found {keys.shown(item)}, needed module:function or "
            "file.py:function."))
    return typed


def typed_as(value: Any, kind: Any) -> Any:
  """Converts a value to its type in the schema; None for another type."""
  if kind is float:
    return _as_float(value) if type(value) in (int, float) else None
  if kind is dict:
    return value if isinstance(value, dict) and _is_json(value) else None
  if kind in (int, bool, str):
    return value if type(value) is kind else None
  if type(value) is not tuple:
    return None
  items = tuple(typed_as(item, kind.__args__[0]) for item in value)
  return None if any(item is None for item in items) else items


def _as_float(value: int | float) -> float:
  try:
    return float(value)
  except OverflowError:  # An int of more than 308 digits.
    return math.inf if value > 0 else -math.inf


def _is_json(value: Any) -> bool:
  if isinstance(value, dict):
    return all(isinstance(key, str) and _is_text(key) and _is_json(item)
               for key, item in value.items())
  if isinstance(value, tuple):
    return all(map(_is_json, value))
  if isinstance(value, float):
    return math.isfinite(value)
  if isinstance(value, str):
    return _is_text(value)
  # Larger ints are written by no JSON library, and meant by nobody.
  return value is None or (isinstance(value, int) and abs(value) < 2**64)


def _is_text(value: str) -> bool:
  """Tests for text without half surrogate pairs (no encoding) and NULs."""
  return "\0" not in value and not any(
      "\ud800" <= character <= "\udfff" for character in value)
