"""Continuous batching: requests in, completions out as they finish.

A fixed number of slots decode together. When a row ends, the next request
takes its slot: its prompt, prefilled beside, is copied to the place behind the
cache's write slot, where no neighbour notices (`cache.insert`). Everything
about a request is data, so there is one decode program per size of the cache,
and the host looks once per chunk.

Under several processes each of them runs the same engine: it is given the same
requests, and every decision comes from them and from what was fetched, which
is the same everywhere.

  B: slots  S: cache slots of each  N: steps of a chunk
"""

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from posttrain import sharding
from posttrain.model.block import Block
from posttrain.model.transformer import Transformer
from posttrain.sampler import active_sequence as live_lib
from posttrain.sampler import (
  budget,
  decode,
  prefill,
  requests,
  rollouts,
)
from posttrain.sampler import device_batch as slots_lib
from posttrain.sampler.engine_settings import Settings, doublings, fitting
from posttrain.sampler.requests import Completion, Request
from posttrain.sampler.stop_strings import Decode


@dataclasses.dataclass
class Stats:
  """Counters of an engine.

  Attributes:
    steps: iterations of the decode loop.
    row_steps: those of rows that were not done, over all slots.
    looks: of the host.
    prompt_tokens, prefilled_tokens: of all requests; really computed.
    surplus: tokens cut behind stop strings.
    programs: seconds of the first call of each compiled program, by name and
      shapes.
  """

  steps: int = 0
  row_steps: int = 0
  looks: int = 0
  prompt_tokens: int = 0
  prefilled_tokens: int = 0
  surplus: int = 0
  programs: dict[tuple, float] = dataclasses.field(default_factory=dict)

  def occupancy(self, slots: int) -> float:
    """Share of the slots' steps that were of a live row."""
    return self.row_steps / max(self.steps * slots, 1)


def nothing() -> None:
  """Does nothing, before a chunk."""


class Engine:
  """A queue of requests before the slots of one compiled loop.

  Used inside `jax.set_mesh`. Not thread-safe.
  """

  def __init__(
      self, model: Transformer, tables: budget.BudgetTables,
      settings: Settings, *, text: Decode | None = None,
      log: Callable[[str], None] = lambda line: None,
      before_chunk: Callable[[], None] = nothing,
  ):
    """An engine without requests.

    Args:
      model: on the current mesh.
      tables: the thinking strings and stop ids of its tokenizer.
      settings: shapes.
      text: tokens to text, for stop strings.
      log: is told of every program that is compiled.
      before_chunk: called before each look. What it raises leaves the engine
        as it was.

    Raises:
      ValueError: the mesh does not divide the slots.
    """
    parts = sharding.axis_size("rows")
    if settings.slots < 1 or settings.slots % parts:
      raise ValueError(
          f"slots={settings.slots} cannot be split over {parts} parts of the "
          f"mesh. Use a multiple of {parts}.")
    self.tables, self.settings = tables, settings
    self.model, self._blocks = self._unstacked(model)
    self._text, self._before_chunk = text, before_chunk
    self._numbers = itertools.count()
    self._pending: deque[tuple[int, Request]] = deque()
    self._waiting: Counter[tuple[int, ...]] = Counter()  # By prompt.
    self._shared = prefill.Shared(settings.prefill_chunk)
    self._live: list[live_lib.Live | None] = [None] * settings.rows
    self._ready: deque[Completion] = deque()
    self._aborted: set[int] = set()
    self._sizes = settings.sizes
    run = slots_lib.Programs(lambda line: log(
        f"{line} ({len(run.seconds)} of at most {self.most_programs})"))
    self.stats = Stats(programs=run.seconds)
    self._prefill = prefill.Prefill(
        model.config, rows=settings.prefill_rows,
        chunk=settings.prefill_chunk, prefixes=settings.prefixes,
        cache_dtype=settings.cache_dtype, run=run)
    self._slots = slots_lib.Slots(
        model.config, tables, slots=len(self._live), size=self._sizes[0],
        max_ids=settings.max_ids, cache_dtype=settings.cache_dtype,
        recorded=settings.recorded, hook=settings.hook,
        policy=settings.policy, run=run)

  def submit(self, request: Request) -> int:
    """Queues a request and returns its number.

    A request that cannot run finishes with the reason "error" and says why.
    """
    number = next(self._numbers)
    error = requests.problem(
        request, self.tables, max_slots=self.settings.max_slots,
        max_ids=self.settings.max_ids, can_decode=self._text is not None)
    if error:
      self._ready.append(Completion.nothing(number, request, "error", error))
    else:
      self._shared.add(request.prompt, first=not self.busy)
      self._pending.append((number, request))
      self._waiting[request.prompt] += 1
      self.stats.prompt_tokens += len(request.prompt)
    return number

  def abort(self, number: int) -> None:
    """Ends a request at the next look; one that has finished stays so."""
    self._aborted.add(number)

  def results(self) -> Iterator[Completion]:
    """Completions as they finish, until nothing is left to do."""
    while True:
      while self._ready:
        yield self._ready.popleft()
      if not self.busy:
        return
      self.look()

  def stream(self, number: int) -> Iterator[list[int]]:
    """The tokens of a request as they settle; others go on meanwhile.

    What may still be taken back, for a wait or a stop string, is held back.
    The completion itself comes out of `results` all the same.
    """
    sent = 0
    while True:
      tokens = self._settled(number)
      if tokens is None:
        return
      if len(tokens) > sent:
        yield tokens[sent:]
        sent = len(tokens)
      if any(done.id == number for done in self._ready):
        return
      self.look()

  @property
  def busy(self) -> bool:
    """Requests wait or run."""
    return bool(self._pending) or any(self._live)

  @property
  def occupancy(self) -> float:
    return self.stats.occupancy(self.settings.slots)

  @property
  def most_programs(self) -> int:
    """A bound on `stats.programs`, whatever the requests."""
    sizes = len(self._sizes)
    # Prefill's caches reach one doubling further, as chunks are whole.
    prefills = len(doublings(
        self.settings.prefill_chunk, 2 * self._sizes[-1]))
    decodes, resizes = sizes, 2 * (sizes - 1)
    empties = 1 + 2 * prefills  # Slots; a batch of prompts; a prefix alone.
    # From a batch to the slots, from a prefix to a batch, and from that to it.
    places = prefills * (sizes + prefills + 1)
    others = 5  # "done", "begin", "end", "hook", "earlier".
    return decodes + resizes + prefills + empties + places + others

  def use(self, model: Transformer) -> None:
    """Goes on with other weights of the same shape; what is queued waits.

    Raises:
      RuntimeError: rows are live, whose caches are of the old weights.
    """
    if any(self._live):
      raise RuntimeError(
          "Weights cannot change under live rows. Take all results first.")
    self.model, self._blocks = self._unstacked(model)
    self._prefill.clear()

  def _unstacked(
      self, model: Transformer) -> tuple[Transformer, list[Block]]:
    return decode.unstacked(
        model, weights_dtype=self.settings.weights_dtype)

  def look(self) -> None:
    """Admits what fits, decodes a chunk, and collects what is finished."""
    self._before_chunk()
    self._abort()
    self._admit()
    if not any(self._live):
      return
    self._fit()
    chunk = self.settings.chunk
    script = np.stack([
        row.script(chunk) if row else np.full(chunk, -1, np.int32)
        for row in self._live])
    self._collect(*self._slots.decode(
        self.model, self._blocks, script, self._until()))

  def _until(self) -> int:
    """So many rows are done when the host looks before the chunk's end."""
    rows, idle = len(self._live), self._live.count(None)
    if not self._pending:
      return rows
    return min(idle + max(1, int(rows * self.settings.refill)), rows)

  def _abort(self) -> None:
    """Requests that are not wanted any more."""
    if not self._aborted:
      return
    kept: deque[tuple[int, Request]] = deque()
    for number, request in self._pending:
      if number in self._aborted:
        self._leave_queue(request)
        self._ready.append(Completion.nothing(number, request, "abort"))
      else:
        kept.append((number, request))
    self._pending = kept
    self._end(
        [row is not None and row.number in self._aborted
         for row in self._live], budget.ABORTED)
    self._aborted.clear()

  def _admit(self) -> None:
    """Puts the first of the queue into the free slots."""
    free = [i for i in range(self.settings.slots) if self._live[i] is None]
    taken = [self._pending.popleft()
             for _ in range(min(len(free), len(self._pending)))]
    if not taken:
      return
    free = free[:len(taken)]
    self._prefill.add(
        self.model, self._blocks,
        [(request.prompt, request.prefix or self._shared.of(request.prompt))
         for _, request in taken])
    for slot, (number, request) in zip(free, taken, strict=True):
      self._live[slot] = live_lib.Live(
          number, request, self.tables, self._text, self.settings.recorded)
    self._fit()
    prompts = [self._prefill.get(request.prompt) for _, request in taken]
    self._slots.begin(
        [row.request if row else None for row in self._live], free,
        lambda rows: self._prefill.place(rows, prompts, free))
    for _, request in taken:
      self._leave_queue(request)
    self._prefill.trim(self.settings.slots)
    self.stats.prefilled_tokens = self._prefill.tokens

  def _leave_queue(self, request: Request) -> None:
    """Its prompt is dropped when no request of the queue has it."""
    self._waiting[request.prompt] -= 1
    if not self._waiting[request.prompt]:
      del self._waiting[request.prompt]
      self._prefill.forget(request.prompt)

  def _fit(self) -> None:
    """Grows or shrinks the ring to what the live rows need for a chunk."""
    needed = max(
        row.needed(self.settings.chunk) for row in self._live if row)
    for size in fitting(self._sizes, self._slots.size, needed):
      self._slots.resize(size)

  def _collect(self, record: dict[str, np.ndarray], state) -> None:
    """The chunk's tokens to their rows; rows that ended to `_ready`."""
    stopped = [False] * len(self._live)
    steps = 0
    for slot, row in enumerate(self._live):
      if row is None:
        continue
      taken = int(state.draws[slot]) - row.steps
      steps = max(steps, taken)
      self.stats.row_steps += taken
      stopped[slot] = row.add(record, slot, taken, bool(state.done[slot]))
    self.stats.steps += steps
    self.stats.looks += 1
    for slot, row in enumerate(self._live):
      if row and state.done[slot] and not stopped[slot]:
        self._finish(slot, state)
    self._end(stopped, budget.STOP, state)

  def _end(self, rows: list[bool], reason: int, state: Any = None) -> None:
    """Ends live rows from outside, and collects them."""
    if not any(rows):
      return
    self._slots.end(rows, reason)
    if state is None:
      state = sharding.fetch(self._slots.carry.state)
    for slot in np.flatnonzero(rows):
      self._finish(int(slot), state, rollouts.FINISH_REASONS[reason])

  def _finish(self, slot: int, state: Any, reason: str = "") -> None:
    row = self._live[slot]
    assert row is not None
    self._live[slot] = None
    done = row.completion(reason, state, slot)
    self.stats.surplus += done.surplus
    self._ready.append(done)

  def _settled(self, number: int) -> list[int] | None:
    """What is settled of a request; None if its completion was taken."""
    for row in self._live:
      if row and row.number == number:
        return row.settled()
    for done in self._ready:
      if done.id == number:
        return done.tokens
    waits = any(number == waiting for waiting, _ in self._pending)
    return [] if waits else None
