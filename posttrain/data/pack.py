"""Packing: puts examples of different lengths into rows of one length.

A row holds whole examples one after the other. `segment_ids` (1, 2, ..; 0 is
padding) keep their attention apart, and `positions` restart in each. An example
is never cut and never lost: one that does not fit is an error or is handed
back.

  N: examples    R: rows    T: length of a row
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

MISFIT = -1

RESERVED = ("positions", "segment_ids")


@dataclasses.dataclass(frozen=True)
class Placement:
  """Places of examples in packed rows: `row[n]`, from column `start[n]`.

  Attributes:
    row: [N] int, MISFIT if there was no room.
    start: [N] int.
    segment: [N] int, the example's segment id.
  """

  row: np.ndarray
  start: np.ndarray
  segment: np.ndarray


class Rows:
  """First-fit: each example goes into the first row that has room."""

  def __init__(self, length: int, rows: int | None):
    """Takes the length and number of rows; None: as many as are needed."""
    self._length, self._bounded = length, rows is not None
    self._used = [0] * (rows or 0)
    self._segments = [0] * (rows or 0)

  @property
  def full(self) -> bool:
    """Tests if no row has room for any example."""
    return self._bounded and min(self._used) == self._length

  def place(self, size: int, *, alone: bool = False) -> tuple[int, int, int]:
    """Reserves room for `size` tokens.

    Args:
      size: in 1..length.
      alone: take an empty row only.

    Returns:
      Row, start and segment; the row is MISFIT if there was no room.
    """
    room = 0 if alone else self._length - size
    # A linear search: rows of a batch are few, and first-fit needs their order.
    row = next((r for r, used in enumerate(self._used) if used <= room), MISFIT)
    if row == MISFIT:
      if self._bounded:
        return MISFIT, 0, 0
      row = len(self._used)
      self._used.append(0)
      self._segments.append(0)
    start = self._used[row]
    self._used[row] += size
    self._segments[row] += 1
    return row, start, self._segments[row]


def first_fit(
    sizes: Sequence[int] | np.ndarray, *, length: int) -> Placement:
  """Places examples, longest first, each in the first row with room.

  First-fit decreasing needs at most 11/9 of the fewest possible rows, plus 6/9
  of a row (Dosa, 2007).

  Args:
    sizes: [N] tokens per example.
    length: T.

  Raises:
    ValueError: an example is empty or longer than a row.
  """
  sizes = np.asarray(sizes, int)
  if sizes.size and not 1 <= sizes.min() <= sizes.max() <= length:
    raise ValueError(
        f"examples have {sizes.min()} to {sizes.max()} tokens, and a packed "
        f"row has room for 1 to {length}. Raise sequence_length.")
  bins = Rows(length, None)
  placed = np.zeros((sizes.size, 3), int)
  # Stable, so that every host and NumPy version has the same placement.
  for n in np.argsort(-sizes, kind="stable"):
    placed[n] = bins.place(int(sizes[n]))
  return Placement(*placed.T)


def assemble(
    examples: Sequence[Mapping[str, np.ndarray]], placement: Placement, *,
    rows: int, length: int) -> dict[str, np.ndarray]:
  """Copies placed examples into [R, T, ...] arrays; see `pack_rows`."""
  columns = examples[0]
  arrays = {
      name: np.zeros((rows, length, *column.shape[1:]), column.dtype)
      for name, column in columns.items()}
  # Zeros are padding: segment 0 attends to nothing and is in no loss.
  arrays |= {name: np.zeros((rows, length), np.int32) for name in RESERVED}
  for example, row, start, segment in zip(
      examples, placement.row, placement.start, placement.segment,
      strict=True):
    size = _size(example)
    place = row, slice(start, start + size)
    for name in columns:
      arrays[name][place] = example[name]
    arrays["positions"][place] = np.arange(size)
    arrays["segment_ids"][place] = segment
  return arrays


def pack_rows(
    examples: Sequence[Mapping[str, np.ndarray]], *, length: int,
) -> tuple[dict[str, np.ndarray], Placement]:
  """Packs examples with any per-token columns into as many rows as they need.

  Args:
    examples: N mappings, with the same columns, of arrays [tokens, ...];
      those of one example are equally long. `tokens`, `loss_mask`, ...
    length: T.

  Returns:
    [R, T, ...] arrays of the examples' columns (0 is padding), `positions` and
    `segment_ids` (int32); and the placement `p`, to take per-token results out
    again: `result[p.row[n], p.start[n]:p.start[n] + size]`.

  Raises:
    ValueError: there is no example, one is empty or longer than a row, or
      columns differ.
  """
  if not examples:
    raise ValueError("there are no examples to pack.")
  names = set(examples[0])
  if names & set(RESERVED):
    raise ValueError(
        f"a column is called {sorted(names & set(RESERVED))[0]!r}, which "
        "packing makes itself.")
  for n, example in enumerate(examples):
    if set(example) != names:
      raise ValueError(
          f"example {n} has the columns {sorted(example)}, and the first one "
          f"has {sorted(names)}.")
  placement = first_fit([_size(example) for example in examples], length=length)
  return assemble(
      examples, placement, rows=int(placement.row.max()) + 1,
      length=length), placement


def _size(example: Mapping[str, np.ndarray]) -> int:
  sizes = {name: len(column) for name, column in example.items()}
  if len(set(sizes.values())) != 1:
    raise ValueError(
        f"the columns of an example have different lengths: {sizes}.")
  return next(iter(sizes.values()))
