"""Applies `--config.path=text` of a command line: text to a typed value."""

import ast
from collections.abc import Mapping
from typing import Any

from posttrain.config import keys, reader


def apply(values: Mapping, path: str, text: str) -> dict[str, Any]:
  """Sets one key of plain values from text, typed by the schema.

  A tuple is written `a,b` (one element: `a`; none: nothing) or as a Python
  literal. Text that is not of the key's type, and a path that no key has, are
  set as they are: the reader names them with all other problems.

  Raises:
    ValueError: the path leads through something that has no keys.
  """
  values = _mutable(values)
  node: Any = reader.layout(values)
  target: Any = values
  names = path.split(".")
  for position, name in enumerate(names):
    node = _child(node, name)
    if isinstance(target, list) and name.isdigit() and int(name) < len(target):
      key: Any = int(name)
    elif isinstance(target, dict):
      key = name
      if position < len(names) - 1:
        target.setdefault(key, {})
    else:
      raise ValueError(
          f"{path}: {'.'.join(names[:position])} is {keys.shown(target)}, "
          f"which has no {keys.shown(name)} to set.")
    if position == len(names) - 1:
      target[key] = _parse(text, node)
    target = target[key]
  return reader.plain(values)


def _mutable(values: Any) -> Any:
  if isinstance(values, Mapping):
    return {key: _mutable(value) for key, value in values.items()}
  if isinstance(values, (list, tuple)):
    return [_mutable(value) for value in values]
  return values


def _child(node: Any, name: str) -> Any:
  """Steps to the node below; inside a free dict all are literals."""
  if isinstance(node, keys.Section):
    return node.keys.get(name)
  if isinstance(node, keys.Items):
    return node.item
  if isinstance(node, keys.Key) and node.type is dict:
    return node
  return None


def _parse(text: str, node: Any) -> Any:
  if isinstance(node, keys.Items):
    return _literal(text) if text else ()
  if not isinstance(node, keys.Key):
    return text
  if node.type is str:
    return text
  if node.type is bool:
    return {"true": True, "false": False}.get(text.lower(), text)
  if node.type in (int, float, dict):
    return _number(text, node.type)
  return _tuple(text, node.type.__args__[0])


def _number(text: str, kind: Any) -> Any:
  """Parses an int, a float or any literal of a free dict; else the text."""
  if kind is dict:
    return _literal(text)
  try:
    return kind(text)
  except ValueError:
    return text


def _tuple(text: str, kind: type) -> Any:
  if text[:1] in ("(", "["):
    return _literal(text)
  parts = [part.strip() for part in text.split(",")]
  if not parts[-1]:  # "" is (), and "a," is ("a",) as in Python.
    parts.pop()
  return parts if kind is str else [_number(part, kind) for part in parts]


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
    return text  # No literal, or one too deep for Python's own parser.
