"""Rows of a benchmark's JSONL file, each checked for its text fields."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_rows(
    path: str, name: str, fields: Sequence[str], *, count: int, remedy: str,
) -> list[dict[str, Any]]:
  """The first rows of `path`/`name`.

  Args:
    path: the folder that a config gives as `args.path`.
    name: the file in it.
    fields: keys that every row has, with texts as values.
    count: how many rows; 0 for all.
    remedy: how to get the file, for the error where there is none.

  Raises:
    ValueError: no such file, fewer rows than `count`, or a malformed row; the
      message names file, line and fault.
  """
  file = Path(path) / name
  if not path or not file.is_file():
    raise ValueError(
        f"There is no file {file.absolute() if path else name} "
        f"(args.path={path!r}). {remedy}")
  rows: list[dict[str, Any]] = []
  with file.open(encoding="utf-8") as lines:
    for number, line in enumerate(lines, 1):
      if count and len(rows) == count:
        break
      rows.append(_parse(line, f"{file}, line {number}", fields))
  if count < 0 or len(rows) < count or not rows:
    raise ValueError(
        f"{file} has {len(rows)} rows, and args.count={count} asks for "
        "another number. Use a smaller args.count, or 0 for all.")
  return rows


def _parse(line: str, where: str, fields: Sequence[str]) -> dict[str, Any]:
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"{where}: not JSON ({error}).") from error
  if not isinstance(row, dict):
    raise ValueError(f"{where}: {type(row).__name__} found, object needed.")
  for field in fields:
    if not isinstance(row.get(field), str):
      raise ValueError(
          f"{where}: {field!r} should be a text, and is {row.get(field)!r}.")
  return row
