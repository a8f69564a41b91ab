"""What a schema is made of: keys, sections, and paths through them.

A dotted path names a key, `reason.loss.clip_high`; sources of a mixture are
numbered, `cold_start.data.sources.0.path`.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

REQUIRED = object()  # The default of a key that has none.


@dataclasses.dataclass(frozen=True)
class Needs:
  """A condition on another key: `path` is relative to the stage or the top."""

  path: str
  operator: str  # ">", ">=", "<", "!=", "==" or "in".
  value: Any

  def __str__(self) -> str:
    value = "" if self.value == "" else repr(self.value)
    if self.value in ("", ()) and self.operator == "!=":
      return f"{self.path} is set"
    return f"{self.path} {self.operator} {value}".replace(
        " in (", " is one of (")


@dataclasses.dataclass(frozen=True)
class Key:
  """One key: `type` is int, float, bool, str, dict or tuple[X, ...].

  `bounds` is an interval such as "[0, inf)"; for a tuple, of each element.
  `function`: a string here is `module:function` or `file.py:function`.
  """

  type: Any
  default: Any
  doc: str
  bounds: str = ""
  choices: tuple = ()
  needs: Needs | None = None
  function: bool = False


@dataclasses.dataclass(frozen=True)
class Refused:
  """A key that people look for here and that would be wrong: why."""

  reason: str


class Section:
  """A named group of keys, in reading order."""

  def __init__(self, doc: str, /, **keys: "Key | Refused | Section | Items"):
    self.doc = doc
    self.keys = keys


class Items:
  """A tuple of sections, such as the sources of a mixture."""

  def __init__(self, doc: str, default: Any, item: Section):
    self.doc = doc
    self.default = default
    self.item = item


def paths(section: Section, prefix: str = "") -> Iterator[str]:
  """The dotted paths of all keys, in reading order."""
  for name, node in section.keys.items():
    if isinstance(node, Section):
      yield from paths(node, f"{prefix}{name}.")
    elif isinstance(node, Items):
      yield prefix + name
      yield from paths(node.item, f"{prefix}{name}.0.")
    elif isinstance(node, Key):
      yield prefix + name


def nearest(path: str, known: Iterable[str]) -> str:
  """The most similar path; its last name counts as much as the whole."""
  ratio = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
  leaf = path.rpartition(".")[2]
  return max(known, default="", key=lambda other: (
      ratio(path, other) + ratio(leaf, other.rpartition(".")[2])))


def type_name(kind: Any) -> str:
  """How a person names a type of the schema."""
  return _TYPE_NAMES[kind]


_TYPE_NAMES = {
    int: "an int", float: "a float", bool: "True or False", str: "a string",
    dict: "a dict", tuple[int, ...]: "a tuple of ints",
    tuple[float, ...]: "a tuple of floats",
    tuple[str, ...]: "a tuple of strings",
}


def within(value: float, bounds: str) -> bool:
  """Whether a number lies in an interval such as "(0, 1]"; a nan never."""
  low, high = (float(end) for end in bounds[1:-1].split(","))
  above = value >= low if bounds[0] == "[" else value > low
  return above and (value <= high if bounds[-1] == "]" else value < high)
