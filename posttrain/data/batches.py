"""Packed batches for training and evaluation, through Grain.

Every source is read and tokenised once, at the start, so that errors in the
data are found before the first step, and a batch costs a few copies. Tokens and
masks stay in memory, at 5 bytes a token.

Grain repeats each source, in a new order each epoch, and mixes them by weight
into an endless stream of examples with random access. Packing walks along it:
examples that no row has room for wait, and go first into the next batch. So the
state is a position in the stream and the few that wait, and a batch is a
function of data, config and seed only. It is the global batch, the same on
every host; `sharding.put` gives each host its rows.
"""

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from posttrain.data import examples as examples_lib
from posttrain.data import pack, random_streams
from posttrain.data import sources as sources_lib
from posttrain.text import render as render_lib

Batch = dict[str, np.ndarray]

# The most examples that are packed at the start, for the report's padding.
REPORTED_EXAMPLES = 20_000


class _Packed:
  """Packed batches of a stream of examples, and statistics of its data.

  Attributes:
    report: statistics of the data, for `data_report.json`.
    warnings: lines for the console, about data that is used as it is.
    first_example: (tokens [n] int32, loss_mask [n] bool) of the first example
      of the stream.
  """

  def __init__(
      self, stream: grain.MapDataset, examples: list[examples_lib.Examples], *,
      rows: int, sequence_length: int, packing: bool,
      measured: int | None = None):
    """Packs the first `measured` examples, or all, for the report's padding."""
    self._packed = functools.partial(
        _PackedIterator, stream, rows=rows, length=sequence_length,
        packing=packing)
    first = stream[0]
    self.first_example = first["tokens"], first["loss_mask"]
    self.warnings = examples_lib.warnings(examples)
    self.report = examples_lib.report(examples) | {
        "padding_share": _padding_share(self._packed(), measured)}


class Batches(_Packed):
  """An endless iterator of packed batches whose state can be saved."""

  def __init__(
      self, stream: grain.MapDataset, examples: list[examples_lib.Examples], *,
      setting: Any, **packing: Any):
    self._examples = sum(map(len, examples))
    super().__init__(
        stream, examples, measured=min(self._examples, REPORTED_EXAMPLES),
        **packing)
    self._iterator = self._packed()
    self._fingerprint = _fingerprint(examples, setting)

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    """Returns a batch of [rows, T] arrays.

    They are tokens, positions and segment_ids (int32), and loss_mask (bool).
    """
    return next(self._iterator)

  @property
  def epoch(self) -> float:
    """Number of examples taken so far, over the examples of all sources."""
    return self._iterator.get_state()["position"] / self._examples

  def get_state(self) -> dict[str, Any]:
    """Returns the state, JSON-able; after `set_state` the same batches follow.
    """
    return self._iterator.get_state() | {"data": self._fingerprint}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a saved state.

    Raises:
      ValueError: the state was saved with other data or another data config.
    """
    if state["data"] != self._fingerprint:
      raise ValueError(
          f"the saved data position is of other data ({state['data']}, here "
          f"{self._fingerprint}): a file, the tokenizer or a data key has "
          "changed since. Restore it, or start in a new workdir.")
    self._iterator.set_state(dict(state))


class EvalBatches(_Packed):
  """One pass over the data in order; may be iterated any number of times.

  The last batch is filled up with empty rows.
  """

  def __iter__(self) -> Iterator[Batch]:
    return self._packed()


def make_batches(
    sources: Sequence[Mapping[str, Any]], renderer: render_lib.Renderer, *,
    sequence_length: int, rows: int, seed: int, stage: str,
    packing: bool = True, shuffle: bool = True, **on_faults: str,
) -> Batches:
  """Makes the endless batches of a training stage.

  Args:
    sources: entries of `data.sources`; see `sources.Source`.
    renderer: makes tokens and a loss mask of a source's row.
    sequence_length: T, tokens per packed row.
    rows: packed rows of the global batch.
    seed, stage: the order of examples depends on them.
    packing: False puts each example in a row of its own.
    shuffle: False keeps the order of each source.
    on_faults: on_overlong, on_no_target, on_malformed, see `examples.load`.

  Raises:
    ValueError: a source cannot be read, or rows are not as the config allows;
      the message names them.
  """
  examples = _load(
      sources, renderer, sequence_length=sequence_length, **on_faults)
  parts = []
  for index, part in enumerate(examples):
    dataset = grain.MapDataset.source(part)
    if shuffle:
      dataset = _EpochShuffle(dataset, functools.partial(
          random_streams.stream, seed, stage, "examples", index))
    parts.append(dataset.repeat())
  weights = [part.source.weight for part in examples]
  stream = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
  return Batches(
      stream, examples, rows=rows, sequence_length=sequence_length,
      packing=packing,
      setting=[weights, rows, sequence_length, seed, stage, packing, shuffle])


def eval_batches(
    sources: Sequence[Mapping[str, Any]], renderer: render_lib.Renderer, *,
    sequence_length: int, rows: int, packing: bool = True, **on_faults: str,
) -> EvalBatches:
  """Makes one pass over held-out data, source after source, in order.

  Arguments and errors as in `make_batches`.
  """
  examples = _load(
      sources, renderer, sequence_length=sequence_length, **on_faults)
  stream = grain.MapDataset.concatenate(
      [grain.MapDataset.source(part) for part in examples])
  return EvalBatches(
      stream, examples, rows=rows, sequence_length=sequence_length,
      packing=packing)


def _load(
    sources: Sequence[Mapping[str, Any]], renderer: render_lib.Renderer, *,
    sequence_length: int, **on_faults: str) -> list[examples_lib.Examples]:
  """Reads and tokenises all sources; each needs an example."""
  parsed = [sources_lib.Source(**source) for source in sources]
  examples = [
      examples_lib.load(
          source, renderer, sequence_length=sequence_length, **on_faults)
      for source in parsed]
  if not examples:
    raise ValueError("there is no source of examples. Set data.sources.")
  for part in examples:
    if not len(part):
      raise ValueError(
          f"{part.source.name} has no example left: {part.counts}. Check "
          "data.sources.")
  return examples


def empty(*, rows: int, sequence_length: int) -> Batch:
  """Makes a batch without an example, for its shapes."""
  example = {"tokens": np.zeros(0, np.int32), "loss_mask": np.zeros(0, bool)}
  first = np.zeros(1, int)
  return pack.assemble(
      [example], pack.Placement(first, first, first), rows=rows,
      length=sequence_length)


class _EpochShuffle(grain.MapDataset):
  """Shuffles its parent anew in each epoch.

  Grain's own `shuffle` takes milliseconds for an element of a small data set
  (0.2.18: it draws from 2**16 indices until one is in range), and counts its
  seed up by epoch, so that seed 1 repeats the orders of seed 0.
  """

  def __init__(
      self, parent: grain.MapDataset,
      stream: Callable[[int], np.random.Generator]):
    super().__init__(parent)
    # Two orders are kept: an example of the last epoch may wait for room.
    self._order = functools.lru_cache(maxsize=2)(
        lambda epoch: stream(epoch).permutation(len(parent)))

  def __len__(self) -> int:
    return len(self._parent)

  def __getitem__(self, index):
    epoch, place = divmod(index, len(self))
    return self._parent[int(self._order(epoch)[place])]


class _PackedIterator:
  """Packs examples in stream order, with a queue of those that must wait.

  A batch is closed when as many examples wait as it has rows. The more may
  wait, the fuller the rows are, and the further an example strays from its
  place. The first that waits always finds an empty row in the next batch, so
  none waits for ever.
  """

  def __init__(
      self, stream: grain.MapDataset, *, rows: int, length: int,
      packing: bool):
    self._stream = stream
    self._rows, self._length, self._packing = rows, length, packing
    self._position = 0  # Position of the next example that was never taken.
    # Positions rather than examples, so that the state is small; the stream
    # has random access.
    self._waiting: list[int] = []

  def __iter__(self) -> Iterator[Batch]:
    return self

  def get_state(self) -> dict[str, Any]:
    return {"position": self._position, "waiting": list(self._waiting)}

  def set_state(self, state: dict[str, Any]) -> None:
    self._position = state["position"]
    self._waiting = list(state["waiting"])

  def __next__(self) -> Batch:
    rows = pack.Rows(self._length, self._rows)
    chosen, placed = [], []
    waiting: list[int] = []
    queue = iter(self._waiting)
    # Without packing each example takes an empty row, so the first one that
    # finds none closes the batch.
    limit = self._rows if self._packing else 1
    while len(waiting) < limit and not rows.full:
      index = next(queue, None)
      if index is None:
        if self._position == len(self._stream):
          break
        index = self._position
        self._position += 1
      example = self._stream[index]
      place = rows.place(len(example["tokens"]), alone=not self._packing)
      if place[0] == pack.MISFIT:
        waiting.append(index)
        continue
      chosen.append(example)
      placed.append(place)
    # What is left of the queue keeps its place after those that were tried.
    self._waiting = [*waiting, *queue]
    if not chosen:
      raise StopIteration
    return pack.assemble(
        chosen, pack.Placement(*np.array(placed).T), rows=self._rows,
        length=self._length)


def _padding_share(batches: _PackedIterator, count: int | None) -> float:
  """Measures the share of padding while the first `count` examples are packed.
  """
  filled = total = 0
  for batch in batches:
    filled += int(np.count_nonzero(batch["segment_ids"]))
    total += batch["segment_ids"].size
    if count is not None and batches.get_state()["position"] >= count:
      break
  return 1 - filled / total


def _fingerprint(examples: list[examples_lib.Examples], setting: Any) -> str:
  checksum = zlib.crc32(repr(setting).encode())
  for part in examples:
    checksum = part.checksum(checksum)
  return f"{checksum:08x}"
