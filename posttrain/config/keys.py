"""Elements of a schema: keys, sections, and paths through them.

A dotted path names a key, `reason.loss.clip_high`; sources of a mixture are
numbered, `cold_start.data.sources.0.path`.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator
from typing import Any

REQUIRED = object()  # The default of a key that has none.

# Numbers end up in arrays of 32 bits. A larger int has no place there, and a
# float outside of these becomes 0 or infinity.
LARGEST_INT = 2**31 - 1
SMALLEST_FLOAT, LARGEST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127

OR_ZERO = "0 or "
# Ranges that flags of the command line have too. Beyond them a temperature
# makes logits infinite or all tokens alike, and a number of waits or samples is
# more than a run could compute.
TEMPERATURES, WAITS, SAMPLES = "[0.001, 1000]", "[0, 10000]", "[1, 65536]"

SIMILAR = 0.6  # Least ratio of similar names: difflib's own cutoff.
LONGEST_SHOWN = 120  # Characters of a value in a message.


@dataclasses.dataclass(frozen=True)
class Needs:
  """Condition on another key: `path` is relative to the stage or the top."""

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
  """Key of a config: `type` is int, float, bool, str, dict or tuple[X, ...].

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
  """Key that people look for here and that would be wrong: the reason."""

  reason: str


@dataclasses.dataclass(frozen=True)
class Renamed:
  """Old name of the key at `path`, which is relative to the stage or top."""

  path: str


class Section:
  """Group of keys, in reading order."""

  def __init__(
      self, doc: str, /, **keys: "Key | Refused | Renamed | Section | Items"):
    self.doc = doc
    self.keys = keys


class Items:
  """Tuple of sections, such as the sources of a mixture."""

  def __init__(self, doc: str, default: Any, item: Section):
    self.doc = doc
    self.default = default
    self.item = item


def paths(section: Section, prefix: str = "") -> Iterator[str]:
  """Yields the dotted paths of all keys, in reading order."""
  for name, node in section.keys.items():
    if isinstance(node, Section):
      yield from paths(node, f"{prefix}{name}.")
    elif isinstance(node, Items):
      yield prefix + name
      yield from paths(node.item, f"{prefix}{name}.0.")
    elif isinstance(node, Key):
      yield prefix + name


def nearest(path: str, known: Iterable[str]) -> str:
  """Finds the most similar path, or "" where none is similar.

  Its last name counts as much as the whole, and must itself be similar: a
  suggestion of another key misleads.
  """
  path = path[:LONGEST_SHOWN]  # Comparing takes quadratic time.
  ratio = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
  leaf = lambda path: path.rpartition(".")[2]
  found = max(known, default="", key=lambda other: (
      ratio(path, other) + ratio(leaf(path), leaf(other))))
  return found if ratio(leaf(path), leaf(found)) >= SIMILAR else ""


def hint(path: str, known: Iterable[str], text: str) -> str:
  """Puts the most similar path in place of {} in `text`; "" without one."""
  found = nearest(path, known)
  return text.format(found) if found else ""


def shown(value: Any) -> str:
  """Writes a value for a message: its `repr`, shortened."""
  try:
    text = repr(value)
  except ValueError:  # Python writes no ints of thousands of digits.
    return f"a {type(value).__name__} with more digits than can be shown"
  if len(text) <= LONGEST_SHOWN:
    return text
  half = LONGEST_SHOWN // 2
  return f"{text[:half]}...{text[-half:]} ({len(text):,} characters)"


# Names of types in messages.
TYPE_NAMES = {
    int: "an int", float: "a float", bool: "True or False", str: "a string",
    dict: "a dict", tuple[int, ...]: "a tuple of ints",
    tuple[float, ...]: "a tuple of floats",
    tuple[str, ...]: "a tuple of strings",
}


def within(value: float, bounds: str) -> bool:
  """Tests if a number lies in an interval such as "(0, 1]"; a nan never.

  An array of 32 bits must hold it too. "0 or [0.1, 1]" is that interval and 0;
  "" is every such number.
  """
  if bounds.startswith(OR_ZERO) and value == 0:
    return True
  interval = bounds.removeprefix(OR_ZERO)
  low, high = (float(end) for end in (
      interval[1:-1] or "-inf, inf").split(","))
  above = value >= low if interval[:1] == "[" else value > low
  below = value <= high if interval[-1:] == "]" else value < high
  return above and below and _fits(value, high)


def _fits(value: float, high: float) -> bool:
  if isinstance(value, int):
    return -LARGEST_INT <= value <= max(
        LARGEST_INT, 0 if math.isinf(high) else high)
  return value == 0 or SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT


def allowed(value: float, bounds: str) -> str:
  """Writes an interval with its limits, for a message about a number."""
  if isinstance(value, int):
    bounds = bounds or f"[-{LARGEST_INT}, inf)"
    return bounds.replace("inf)", f"{LARGEST_INT}]")
  text = bounds or "(-inf, inf)"
  if math.isfinite(value) and not _fits(value, math.inf):
    text += (f", and of {SMALLEST_FLOAT:.3g} to {LARGEST_FLOAT:.3g} in size "
             "or 0, as float32 has them")
  return text
