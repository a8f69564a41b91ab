"""Metrics: `metrics.jsonl` and TensorBoard, one row per stage and step.

A row is a flat JSON object: "stage", "step", then names such as "loss" or
"completions/mean_length" with numbers; null stands for a value that is not
finite. Names under "time/" and "perf/" are measurements of the machine. All
others are functions of config, data and seed, and repeat bit for bit.

Only process 0 writes. Each row is flushed, so that a kill loses none, and is on
the disk before a checkpoint of its step is. When a run resumes, rows after its
checkpoint are cut, so that each step is there once.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX

from posttrain.workdir import WorkdirError, replace_file


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads all whole rows of a metrics file, in order.

  A last line without its newline is the trace of a kill, and is left out.

  Raises:
    WorkdirError: another line is no row; names the file and the line.
  """
  rows = []
  for number, line in enumerate(_lines(path), start=1):
    try:
      rows.append(_row(line))
    except ValueError as error:
      raise WorkdirError(
          f'{path}, line {number}: expected a JSON object with "stage", '
          f'"step" and numbers, found {_shown(line)} ({error}). Remove that '
          "line, or put the file back; `posttrain train` removes it by "
          "itself.") from error
  return rows


def mend(path: str | os.PathLike) -> list[str]:
  """Moves lines that are no rows to another file.

  Returns:
    A line for the console about it; empty if all lines are rows.
  """
  path = pathlib.Path(path)
  lines, bad = _lines(path) if path.exists() else [], []
  for line in lines:
    try:
      _row(line)
    except ValueError:
      bad.append(line)
  if not bad:
    return []
  aside = path.with_name(path.name + ".damaged")
  with aside.open("ab") as file:
    file.write(b"".join(line + b"\n" for line in bad))
  replace_file(path, b"".join(
      line + b"\n" for line in lines if line not in bad))
  return [f"{path}: {len(bad)} of {len(lines)} lines are no rows and are in "
          f"{aside.name} now, the first is {_shown(bad[0])}"]


def missing(
    rows: Iterable[Mapping[str, Any]], stage: str, last: int) -> str:
  """Lists the steps of 1..`last` without a row, such as "3-8, 12"."""
  steps = {row["step"] for row in rows if row["stage"] == stage}
  spans: list[list[int]] = []
  for step in range(1, last + 1):
    if step not in steps:
      if spans and spans[-1][1] == step - 1:
        spans[-1][1] = step
      else:
        spans.append([step, step])
  return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in spans)


def sync(path: str | os.PathLike) -> None:
  """Waits until the file is on the disk.

  A checkpoint must not be there without the rows of its steps: a resumed run
  does not make them again.
  """
  if pathlib.Path(path).exists():
    with pathlib.Path(path).open("ab") as file:
      os.fsync(file.fileno())


def _lines(path: str | os.PathLike) -> list[bytes]:
  # The part after the last newline is empty, or a row that a kill cut off.
  return pathlib.Path(path).read_bytes().split(b"\n")[:-1]


def _row(line: bytes) -> dict[str, Any]:
  """Parses a row; raises ValueError if it is none."""
  try:
    row = json.loads(line.decode())
  except RecursionError as error:
    raise ValueError("nested too deeply") from error
  if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or (
      type(row.get("step")) is not int):
    raise ValueError("no row")
  for name, value in row.items():
    if name != "stage" and type(value) not in (int, float, type(None)):
      raise ValueError(f"{name} is no number")
  return row


def _shown(line: bytes) -> str:
  return repr(line[:60].decode(errors="replace"))


def cut(path: str | os.PathLike, stage: str, step: int) -> int:
  """Removes the rows of `stage` after `step`, and an incomplete last line.

  The file is replaced in one piece: a kill leaves the old or the new one.

  Returns:
    The number of whole rows that were removed.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return 0
  rows = read(path)
  kept = [
      row for row in rows if row["stage"] != stage or row["step"] <= step]
  text = "".join(json.dumps(row) + "\n" for row in kept)
  if text.encode() != path.read_bytes():
    replace_file(path, text.encode())
  return len(rows) - len(kept)


class Writer:
  """Writes the rows of one stage; a context manager."""

  def __init__(
      self, path: str | os.PathLike, tensorboard: str | os.PathLike,
      stage: str, *, restored_step: int,
      check: Callable[[], None] = lambda: None,
  ):
    """Cuts rows after `restored_step` and opens both outputs.

    Args:
      path: `metrics.jsonl`, shared by all stages of a workdir.
      tensorboard: directory; the stage becomes a run in it.
      stage: name of the stage.
      restored_step: the step of the restored checkpoint; 0 at a fresh start.
      check: called before each write; raises if another run has taken over.
    """
    self._check = check
    self._stage = stage
    self._last_step = restored_step
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    check()
    cut(path, stage, restored_step)
    self._file = pathlib.Path(path).open(  # noqa: SIM115 (until `close`)
        "a", encoding="utf-8")
    # TensorBoard drops what an earlier attempt logged from `purge_step` on.
    self._board = tensorboardX.SummaryWriter(
        str(pathlib.Path(tensorboard) / stage),
        purge_step=restored_step + 1,
        filename_suffix=f".from_step_{restored_step}")

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends one row and flushes it.

    Args:
      step: larger than the last row's.
      values: scalars (Python, NumPy or JAX) by metric name.

    Raises:
      ValueError: the step was written before, or a value is not a scalar.
    """
    if step <= self._last_step:
      raise ValueError(
          f"A row of stage {self._stage!r} for step {step} comes after step "
          f"{self._last_step}; each step has one row.")
    self._last_step = step
    scalars = {name: _scalar(name, value) for name, value in values.items()}
    if not self._writes:
      return
    self._check()
    # JSON has no NaN, and other readers would refuse Python's.
    row = {"stage": self._stage, "step": step} | {
        name: value if math.isfinite(value) else None
        for name, value in scalars.items()}
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    if self._writes:
      self._file.close()
      self._board.close()

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _scalar(name: str, value: Any) -> int | float:
  # Here JAX arrays are fetched: a metric that is still being computed is waited
  # for.
  array = np.asarray(value)
  if array.shape != () or array.dtype.kind not in "biuf":
    raise ValueError(
        f"Metric {name!r} needs a scalar number, found {value!r}.")
  return int(array) if array.dtype.kind in "biu" else float(array)


class Window:
  """Running means since the last `clear`, for the console.

  Rows carry the values of their own step; the console shows one line for
  several steps.
  """

  def __init__(self) -> None:
    self._sums: dict[str, float] = {}
    self._counts: dict[str, int] = {}

  def add(self, values: Mapping[str, Any]) -> None:
    """Adds one step's values; a name may be missing from some steps."""
    for name, value in values.items():
      self._sums[name] = self._sums.get(name, 0.0) + float(value)
      self._counts[name] = self._counts.get(name, 0) + 1

  def means(self) -> dict[str, float]:
    """Returns the mean of each name over the steps that had it."""
    return {
        name: total / self._counts[name] for name, total in self._sums.items()}

  def clear(self) -> None:
    self._sums.clear()
    self._counts.clear()
