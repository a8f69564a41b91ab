"""Checks conditions between keys, which a schema cannot say.

Each check is a small function that yields problems, and stands in the `CHECKS`
of `config_checks` or of `stage_checks`. A check runs only where all keys it
could read are of their type, so that one mistake is not reported twice.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from posttrain.config import (
    config_checks,
    keys,
    reader,
    schema,
    stage_checks,
)

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "==": operator.eq,
    "!=": operator.ne,
}


def run(read: reader.Reader) -> list[str]:
  """The problems of a config that was read."""
  problems: list[str] = []
  for check, reads in config_checks.CHECKS.items():
    if not read.faulty.intersection(reads):
      problems += check(read.resolved)
  if read.faulty & {"stages", "thinking", "compute", "profile"}:
    return problems
  for name in read.resolved["stages"]:
    stage = read.resolved.get(name)
    if isinstance(stage, dict) and "kind" in stage and (
        name not in read.faulty) and name not in schema.TOP.keys:
      for stage_check in stage_checks.CHECKS[stage["kind"]]:
        problems += [f"{name}.{problem}"
                     for problem in stage_check(read.resolved, name, stage)]
  return problems


# Keys without effect: set in the config, while their condition is not met.


def without_effect(read: reader.Reader) -> list[tuple[str, str]]:
  """Paths and problems of keys that are set and that nothing would read."""
  problems: list[tuple[str, str]] = []
  for name, node in read.layout.keys.items():
    stage = name not in schema.TOP.keys
    if name in read.faulty or name not in read.values:
      continue
    root = read.resolved[name] if stage else read.resolved
    prefix = f"{name}." if stage else ""
    problems += _inert(node, read.values[name], root, name, prefix)
  return problems


def _inert(
    node: Any, values: Any, root: Mapping, path: str, prefix: str,
) -> Iterator[tuple[str, str]]:
  if isinstance(node, keys.Section):
    for name, child in node.keys.items():
      if name in values:
        yield from _inert(
            child, values[name], root, f"{path}.{name}", prefix)
  elif isinstance(node, keys.Items):
    for index, item in enumerate(values):  # Conditions are within the item.
      filled = {name: item.get(name, key.default)
                for name, key in node.item.keys.items()
                if isinstance(key, keys.Key)}
      yield from _inert(node.item, item, filled, f"{path}.{index}",
                        f"{path}.{index}.")
  elif isinstance(node, keys.Key) and node.needs is not None:
    found = reader.at(root, node.needs.path)
    if not _OPERATORS[node.needs.operator](found, node.needs.value):
      yield path, (
          f"{path}: set to {keys.shown(values)}, but it has no effect unless "
          f"{prefix}{node.needs}; found {keys.shown(found)}.")
