"""JSONL rows: the one reader for data, benchmarks and prompts."""

import collections
import json
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DEEPEST = 100  # Most levels of nested objects and lists.


class Repeated(dict):
  """A row with an object that has a key twice; the last value counts.

  Attributes:
    keys_twice: the keys that occur twice.
  """

  keys_twice: tuple[str, ...] = ()


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
  """Yields the lines of a regular file, with their numbers from 1.

  They are bytes, so that a line that is not UTF-8 is one faulty row.
  """
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      yield number, line.removeprefix(
          # A byte-order mark, which editors on Windows write.
          b"\xef\xbb\xbf") if number == 1 else line


def parse(line: bytes) -> dict[str, Any]:
  """Parses a line's object; a `Repeated` if it has a key twice.

  Raises:
    ValueError: the line is no row; the message is the reason.
  """
  twice: list[str] = []

  def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
      counts = collections.Counter(name for name, _ in pairs)
      twice.extend(name for name, count in counts.items() if count > 1)
    return row

  try:
    row = json.loads(line.decode(), object_pairs_hook=to_dict)
  except UnicodeDecodeError as error:
    raise ValueError(
        f"not UTF-8: {error.reason} at byte {error.start}") from error
  except json.JSONDecodeError as error:
    raise ValueError(f"not JSON: {error.msg} at column {error.colno}"
                     ) from error
  except RecursionError as error:
    raise ValueError(_TOO_DEEP) from error
  except ValueError as error:  # Python's, of numbers.
    raise ValueError("a whole number of more than 4,300 digits") from error
  if not isinstance(row, dict):
    raise ValueError(f"a JSON {type(row).__name__}, and an object is needed")
  check(row)
  if twice:
    row = Repeated(row)
    row.keys_twice = tuple(twice)
  return row


_TOO_DEEP = f"nested more than {DEEPEST} deep"


def check(row: Any) -> None:
  """Raises ValueError if a row is nested too deeply, or has half a surrogate.
  """
  # A loop rather than recursion: Python's own limit is near that depth.
  waiting = [(row, 0)]
  while waiting:
    value, depth = waiting.pop()
    if isinstance(value, str):
      try:
        value.encode()
      except UnicodeEncodeError as error:
        raise ValueError(
            f"a text with {value[error.start]!r}, half of a surrogate pair, "
            f"at character {error.start}") from error
    elif isinstance(value, (dict, list)):
      if depth == DEEPEST:
        raise ValueError(_TOO_DEEP)
      inner = [*value, *value.values()] if isinstance(value, dict) else value
      waiting += [(each, depth + 1) for each in inner]


def read_rows(
    path: str, name: str, fields: Sequence[str], *, count: int, remedy: str,
) -> list[dict[str, Any]]:
  """Reads the first rows of `path`/`name`.

  Args:
    path: the folder that a config gives as `args.path`.
    name: the file in it.
    fields: keys that every row must have, with texts as values.
    count: number of rows; 0 for all.
    remedy: tells how to get the file, in the error without one.

  Raises:
    ValueError: there is no file, it has fewer rows than `count`, or a row is
      malformed; the message names file, line and fault.
  """
  file = Path(path) / name
  if not path or not file.is_file():
    raise ValueError(
        f"There is no file {file.absolute() if path else name} "
        f"(args.path={path!r}). {remedy}")
  rows: list[dict[str, Any]] = []
  for number, line in lines(file):
    if count and len(rows) == count:
      break
    rows.append(_row(line, f"{file}, line {number}", fields))
  if count < 0 or len(rows) < count or not rows:
    raise ValueError(
        f"{file} has {len(rows)} rows, and args.count={count} asks for "
        "another number. Use a smaller args.count, or 0 for all.")
  return rows


def _row(line: bytes, where: str, fields: Sequence[str]) -> dict[str, Any]:
  try:
    row = parse(line)
  except ValueError as error:
    raise ValueError(f"{where}: {error}. Get the file again.") from error
  if isinstance(row, Repeated):
    raise ValueError(
        f"{where}: {', '.join(map(repr, row.keys_twice))} is there twice. Get "
        "the file again.")
  for field in fields:
    if not isinstance(row.get(field), str):
      raise ValueError(
          f"{where}: {field!r} should be a text, and is "
          f"{reprlib.repr(row.get(field))}.")
  return row
