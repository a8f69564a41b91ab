"""Sources of rows: JSONL and Parquet files, and procedural tasks.

A source is read once, front to back. Every row comes with the place that it
came from ("train.jsonl:17"), so that whatever is wrong with it can be found.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow
import pyarrow.parquet

from posttrain.tasks import loading

FORMATS = (".jsonl", ".parquet")


@dataclasses.dataclass(frozen=True)
class Source:
  """One entry of `data.sources`: a file or a task, and not both.

  Attributes:
    path: a .jsonl or .parquet file.
    task: `module:function` that is called with the split and `args` and
      returns a sequence of rows.
    split, args: the task's.
    weight: share of the mixture, in examples, relative to the other sources.
  """

  path: str = ""
  task: str = ""
  split: str = "train"
  args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  weight: float = 1.0

  def __post_init__(self):
    if bool(self.path) == bool(self.task):
      raise ValueError(
          f"a source has path={self.path!r} and task={self.task!r}; it needs "
          "one of them. Check data.sources.")
    if not self.weight > 0:
      raise ValueError(
          f"{self.name} has weight {self.weight}, which must be positive. "
          "Check data.sources.")

  @property
  def name(self) -> str:
    return self.path or f"{self.task}[{self.split}]"


@dataclasses.dataclass(frozen=True)
class Fault:
  """Why a row cannot be used."""

  reason: str


def read(source: Source) -> Iterator[tuple[str, dict | Fault]]:
  """Yields each row, or its fault, with its place; in order.

  Lines count from 1, as editors do; rows of a Parquet file or a task from 0.

  Raises:
    ValueError: there is no such file or task, or no row can be read at all.
  """
  if source.task:
    return _read_task(source)
  path = pathlib.Path(source.path).expanduser()
  if path.suffix not in FORMATS:
    raise ValueError(
        f"{path} is neither {' nor '.join(FORMATS)}. Check data.sources.")
  if not path.exists():
    raise ValueError(f"{path} does not exist. Check data.sources.")
  return _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)


def _read_jsonl(path: pathlib.Path) -> Iterator[tuple[str, dict | Fault]]:
  # Bytes, so that a line that is not UTF-8 is one faulty row. An empty line
  # is no row.
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      if line.strip():
        yield f"{path}:{number}", _parse(line)


def _parse(line: bytes) -> dict | Fault:
  try:
    row = json.loads(line)
  except UnicodeDecodeError as error:
    return Fault(f"not UTF-8: {error.reason} at byte {error.start}")
  except json.JSONDecodeError as error:
    return Fault(f"not JSON: {error.msg} at column {error.colno}")
  if not isinstance(row, dict):
    return Fault(f"a JSON {type(row).__name__}, and an object is needed")
  return row


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[str, dict | Fault]]:
  try:
    file = pyarrow.parquet.ParquetFile(path)
  except pyarrow.ArrowException as error:
    raise ValueError(f"{path} is not a Parquet file: {error}") from error
  number = 0
  for batch in file.iter_batches():
    for row in batch.to_pylist():
      # A Parquet row has every column; an absent value is a null.
      yield f"{path}:{number}", {
          key: value for key, value in row.items() if value is not None}
      number += 1


def _read_task(source: Source) -> Iterator[tuple[str, dict | Fault]]:
  loading.check_call(source.task, source.split, **source.args)
  rows = loading.load_function(source.task)(source.split, **source.args)
  for number in range(len(rows)):
    row = rows[number]
    yield f"{source.name}:{number}", (
        dict(row) if isinstance(row, Mapping) else
        Fault(f"a {type(row).__name__}, and a mapping is needed"))
