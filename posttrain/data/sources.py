"""Sources of rows: JSONL and Parquet files, and procedural tasks.

A source is read once, front to back. Every row comes with its place, such as
"train.jsonl:17", so that an error in it can be found.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow
import pyarrow.parquet

from posttrain.tasks import jsonl, loading

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
  """Reason why a row, or a damaged part of a file, cannot be used."""

  reason: str
  rows: int = 1


# Rows of a Parquet file that are read at once, and lost together.
PARQUET_ROWS = 1024


def read(source: Source) -> Iterator[tuple[str, dict | Fault]]:
  """Yields each row, or its fault, with its place, in order.

  Lines count from 1, as editors do; rows of a Parquet file or a task from 0.
  A JSON object that names a key twice is a `jsonl.Repeated`.

  Raises:
    ValueError: there is no such file or task, or no row can be read at all.
  """
  if source.task:
    return _read_task(source)
  path = pathlib.Path(source.path).expanduser()
  if path.suffix not in FORMATS:
    raise ValueError(
        f"{path} is neither {' nor '.join(FORMATS)}. Check data.sources.")
  if not path.is_file():  # Opening a pipe would wait for its writer.
    what = ("does not exist" if not path.exists() else "is a directory"
            if path.is_dir() else "is no regular file")
    raise ValueError(f"{path} {what}. Check data.sources.")
  return _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)


def _read_jsonl(path: pathlib.Path) -> Iterator[tuple[str, dict | Fault]]:
  # An empty line is no row.
  for number, line in jsonl.lines(path):
    if line.strip():
      try:
        yield f"{path}:{number}", jsonl.parse(line)
      except ValueError as error:
        yield f"{path}:{number}", Fault(str(error))


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[str, dict | Fault]]:
  try:
    # Checksums are optional in Parquet, and not verified by default.
    file = pyarrow.parquet.ParquetFile(
        path, page_checksum_verification=True)
  # pyarrow has no one type: a column's name that is not UTF-8 is a ValueError.
  except (pyarrow.ArrowException, OSError, ValueError) as error:
    raise ValueError(
        f"{path} is not a Parquet file: {error}. Get it again, or check "
        "data.sources.") from error
  # Row groups are read one by one, so that a damaged one costs its own rows
  # only.
  sizes = [file.metadata.row_group(group).num_rows
           for group in range(file.num_row_groups)]
  if sum(sizes) != file.metadata.num_rows:
    raise ValueError(
        f"{path} is damaged: it is said to have {file.metadata.num_rows} rows "
        f"and {sum(sizes)}. Get it again.")
  number = 0
  for group, size in enumerate(sizes):
    end = number + size
    try:
      for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group]):
        for row in _rows_of(batch):
          yield f"{path}:{number}", row
          number += 1
      if number != end:
        raise ValueError(f"it ends at row {number}, and should at {end}")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
      yield f"{path}:{number}-{end - 1}", Fault(
          f"a damaged part of the file ({error}); get it again", end - number)
      number = end


def _rows_of(batch: pyarrow.RecordBatch) -> Iterator[dict | Fault]:
  """Converts to Python values, row by row if a text is not UTF-8."""
  try:
    rows = batch.to_pylist()
  except UnicodeDecodeError as error:
    if batch.num_rows == 1:
      yield Fault(f"not UTF-8: {error.reason} at byte {error.start}")
    else:
      for at in range(batch.num_rows):
        yield from _rows_of(batch.slice(at, 1))
    return
  for row in rows:
    # A Parquet row has every column; nulls are absent ones.
    yield {key: value for key, value in row.items() if value is not None}


def _read_task(source: Source) -> Iterator[tuple[str, dict | Fault]]:
  loading.check_call(source.task, source.split, **source.args)
  rows = loading.load_function(source.task)(source.split, **source.args)
  for number in range(len(rows)):
    row = rows[number]
    yield f"{source.name}:{number}", (
        dict(row) if isinstance(row, Mapping) else
        Fault(f"a {type(row).__name__}, and a mapping is needed"))
