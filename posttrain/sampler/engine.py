"""Continuous batching: requests in, completions out as they finish.

A fixed number of rows decode together, a sequence each. When a sequence ends,
the next request takes its row: the request's prompt is prefilled in a cache of
its own and then copied into that row, right before the slot that all rows
write next. The other rows are not touched (`cache.insert`). Everything about a
request is data, so there is one decode program per size of the KV cache. The
host syncs once per chunk of decode steps, never per token.

A request whose end the cache could not hold is refused when it is submitted, so
no sequence is ever preempted or swapped out. The cache has no pages (vLLM's
PagedAttention): it is one ring of slots for all rows, see `model.cache`.

Under several processes each of them runs the same engine on the same requests.
Every decision is made from these and from arrays that were fetched, which are
the same everywhere, so no host has to tell another what it decided.

  B: rows, sequences that decode together  S: cache slots of each
  N: steps of a chunk
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from posttrain import sharding
from posttrain.model.transformer import Transformer
from posttrain.sampler import (
  budget,
  budget_state,
  continuations,
  decode,
  device_batch,
  prefill,
  requests,
  rollouts,
)
from posttrain.sampler.active_sequence import ActiveSequence
from posttrain.sampler.requests import (
  Completion,
  Request,
  Settings,
  fitting,
)
from posttrain.text import thinking
from posttrain.text.symbols import SymbolTable


@dataclasses.dataclass
class Stats:
  """Counters of an engine since it was made.

  Attributes:
    steps: iterations of the decode loop.
    row_steps: the sum over rows of the steps in which a row was not done.
    host_syncs: chunks that were decoded; the host syncs behind each.
    prompt_tokens: prompt tokens of all requests.
    prefilled_tokens, reused_tokens: those of the admitted requests, computed
      and not: from the prefix cache, or from a prompt that several have.
    evicted_tokens, stale_tokens: tokens of sequences that left the prefix cache
      for its budget, and for other weights.
    surplus: tokens that were decoded and cut off behind stop strings.
    programs: seconds of the first call of each compiled program, by name and
      shapes.
  """

  steps: int = 0
  row_steps: int = 0
  host_syncs: int = 0
  prompt_tokens: int = 0
  prefilled_tokens: int = 0
  reused_tokens: int = 0
  evicted_tokens: int = 0
  stale_tokens: int = 0
  surplus: int = 0
  programs: dict[tuple, float] = dataclasses.field(default_factory=dict)


def nothing() -> None:
  """Does nothing; the default of `before_chunk`."""


class Engine:
  """Engine of continuous batching: a queue, and the batch that decodes.

  Used inside `jax.set_mesh`. Not thread-safe.
  """

  def __init__(
      self, model: Transformer, tables: budget.BudgetTables,
      settings: Settings, *, symbols: SymbolTable | None = None,
      log: Callable[[str], None] = lambda line: None,
      before_chunk: Callable[[], None] = nothing,
  ):
    """Makes an engine without requests.

    Args:
      model: on the current mesh.
      tables: the thinking strings and stop ids of its tokenizer.
      settings: shapes, and the functions that are traced into the loop.
      symbols: of the tokenizer, to find stop strings.
      log: is given a line for every program that is compiled.
      before_chunk: is called at the beginning of each `step`. If it raises,
        the engine stays as it was.

    Raises:
      ValueError: the mesh does not divide `max_num_seqs`.
    """
    parts = sharding.axis_size("rows")
    if settings.max_num_seqs < 1 or settings.max_num_seqs % parts:
      raise ValueError(
          f"max_num_seqs={settings.max_num_seqs} cannot be split over {parts} "
          f"parts of the mesh. Use a multiple of {parts}.")
    # A stop string is found after the device went on: the counts must then be
    # those of the last token that is kept, so each step's are recorded.
    settings = dataclasses.replace(settings, recorded=dataclasses.replace(
        settings.recorded, counts=symbols is not None))
    # The arrays go to the devices once, and not with every chunk.
    self.tables, self.settings = tables.put(), settings
    self._symbols, self._before_chunk = symbols, before_chunk
    self._next = 0  # Number of the next request.
    self._kept = continuations.Kept()
    self._ended: list[tuple[int, tuple[int, ...]]] = []  # Rows to keep.
    self._pending: deque[tuple[int, Request]] = deque()
    self._active: list[ActiveSequence | None] = [None] * settings.rows
    self._ready: deque[Completion] = deque()
    self._aborted: set[int] = set()
    self._sizes = settings.sizes
    run = device_batch.Programs(log, self.most_programs)
    self.stats = Stats(programs=run.seconds)
    self._prefill = prefill.Prefill(model.config, settings, run)
    self._batch = device_batch.DeviceBatch(
        model.config, self.tables, settings, run)
    self.use(model)

  def submit(self, request: Request) -> int:
    """Queues a request and returns its number.

    One that goes on from another stands before all that do not: what it goes
    on from is in the prefix cache now, and would be evicted for theirs.

    A request that cannot run is not raised: it comes out of `results` with
    the finish reason "error" and says why, and the others go on.
    """
    number = self._next
    self._next += 1
    request, error = self._kept.resolve(request, number, self._runs)
    error = error or requests.problem(
        request, self.tables, self.settings, symbols=self._symbols)
    if error:
      self._ready.append(Completion.nothing(number, request, "error", error))
    else:
      if request.in_thinking is None:
        request = dataclasses.replace(request, in_thinking=thinking.opens(
            request.prompt, self.tables.ids))
      ahead = len(self._pending)
      if request.first_draw:
        ahead = sum(1 for _ in itertools.takewhile(
            lambda waits: waits[1].first_draw, self._pending))
      self._pending.insert(ahead, (number, request))
      self.stats.prompt_tokens += len(request.prompt)
    return number

  def release(self, number: int) -> None:
    """Forgets a request that ended and was kept: none can go on from it.

    Its keys and values stay in the prefix cache until they are evicted.
    """
    self._kept.release(number)

  def abort(self, number: int) -> None:
    """Ends a request at the next step; one that has finished stays so."""
    if number < self._next:  # Not one that is submitted later.
      self._aborted.add(number)

  def results(self) -> Iterator[Completion]:
    """Yields completions as they finish, until nothing waits or decodes."""
    while True:
      while self._ready:
        yield self._ready.popleft()
      if not self.busy:
        return
      self.step()

  def take(self) -> list[Completion]:
    """Returns the completions that are there, in the order of their ends."""
    taken = [*self._ready]
    self._ready.clear()
    return taken

  def stream(self, number: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yields tokens of a request as they settle; the others go on too.

    Tokens that may still be retracted for a wait, or cut off for a stop
    string, are held back. The completion itself comes out of `results`.

    Yields:
      The new tokens, and the provenance of each, see `Completion`.
    """
    sent = 0
    while True:
      settled = self._settled(number)
      if settled is None:
        return
      tokens, provenance = settled
      if len(tokens) > sent:
        yield tokens[sent:], provenance[sent:len(tokens)]
        sent = len(tokens)
      if any(done.id == number for done in self._ready):
        return
      self.step()

  @property
  def busy(self) -> bool:
    """True while a request waits or decodes."""
    return bool(self._pending) or any(self._active)

  @property
  def occupancy(self) -> float:
    """Share of the rows' steps in which a sequence was active, so far."""
    steps = self.stats.steps * self.settings.max_num_seqs
    return self.stats.row_steps / max(steps, 1)

  @property
  def most_programs(self) -> int:
    """Upper bound of `len(stats.programs)`, whatever the requests."""
    sizes = len(self._sizes)
    prefills = len(self.settings.prefill_sizes(self.settings.max_seq_len))
    decodes, resizes = sizes, 2 * (sizes - 1)
    # Of the device batch; of a batch of prompts, and of rows that are kept.
    empties = 1 + 2 * prefills
    # From a batch of prompts, or from kept rows, to the device batch and to a
    # batch of prompts; and from the device batch to kept rows.
    places = 2 * prefills * (sizes + prefills) + sizes * prefills
    others = 4  # "done", "begin", "end", "logits_processor".
    return decodes + resizes + prefills + empties + places + others

  def use(self, model: Transformer) -> None:
    """Changes the weights to others of the same shape; the queue stays.

    What was kept is stale: nothing goes on from it any more, nor do the
    continuations in the queue.

    Raises:
      RuntimeError: sequences are active, and their KV cache is of the old
        weights.
    """
    if any(self._active):
      raise RuntimeError(
          "Weights cannot change under active sequences. Take all results "
          "first.")
    self.model, self._blocks = decode.unstacked(
        model, weights_dtype=self.settings.weights_dtype)
    self._prefill.cache.clear()
    self._count()
    self._kept.clear(self._next)
    self._dequeue(lambda _, request: request.parent is not None, "error",
                  continuations.STALE)

  def step(self) -> None:
    """Admits requests, decodes a chunk, and collects finished completions."""
    # First, so that an error (of preemption) leaves all requests where they
    # are, and the caller may step again.
    self._before_chunk()
    # Aborted sequences leave before others are admitted: their rows are free.
    self._abort()
    self._admit()
    if not any(self._active):
      return
    # Also where nothing was admitted: the active sequences are longer now.
    self._fit()
    chunk = self.settings.chunk
    script = np.stack([
        sequence.script(chunk) if sequence else np.full(chunk, -1, np.int32)
        for sequence in self._active])
    self._collect(*self._batch.decode(
        self.model, self._blocks, script, self._until()))

  def _until(self) -> int:
    """Returns the count of done rows at which the chunk ends early."""
    rows, idle = len(self._active), self._active.count(None)
    if not self._pending:
      return rows  # No request waits, so nothing is gained by an early sync.
    # Idle rows count as done. At least one more has to end, or the loop would
    # stop before its first step.
    return min(idle + max(1, int(rows * self.settings.admit_fraction)), rows)

  def _abort(self) -> None:
    """Ends the requests that `abort` named, waiting or active."""
    if not self._aborted:
      return
    self._dequeue(lambda number, _: number in self._aborted, "abort")
    self._end(
        [sequence is not None and sequence.number in self._aborted
         for sequence in self._active], budget_state.ABORTED)
    self._keep()
    self._aborted.clear()

  def _dequeue(
      self, leaves: Callable[[int, Request], bool], reason: str,
      error: str = "",
  ) -> None:
    """Ends the requests of the queue for which `leaves` is true."""
    waiting, self._pending = self._pending, deque()
    for number, request in waiting:
      if leaves(number, request):
        self._ready.append(Completion.nothing(number, request, reason, error))
      else:
        self._pending.append((number, request))
    self._prefill.trim(self._upcoming)

  def _admit(self) -> None:
    """Admits the first requests of the queue into the free rows."""
    free = [row for row in range(self.settings.max_num_seqs)
            if self._active[row] is None]
    taken = [self._pending.popleft()
             for _ in range(min(len(free), len(self._pending)))]
    if not taken:
      return
    free = free[:len(taken)]
    for row, (number, request) in zip(free, taken, strict=True):
      self._active[row] = ActiveSequence(
          number, request, self.tables, self._symbols, self.settings.recorded)
    # The ring has to hold the new sequences before their prompts are copied.
    self._fit()
    prompts = {row: request.prompt
               for row, (_, request) in zip(free, taken, strict=True)}
    self._batch.begin(
        [sequence.request if sequence else None
         for sequence in self._active], free,
        lambda rows: self._prefill.admit(
            self.model, self._blocks, rows, prompts, self._upcoming))
    computed = self._prefill.tokens - self.stats.prefilled_tokens
    self.stats.reused_tokens += sum(map(len, prompts.values())) - computed
    self._count()

  def _keep(self) -> None:
    """Puts the rows that ended, and are to be kept, into the prefix cache."""
    if self._ended:
      self._prefill.keep(self._batch.rows, self._ended, self._upcoming)
    self._ended = []
    self._count()

  def _count(self) -> None:
    """Brings the counters of the prefix cache up to date."""
    self.stats.prefilled_tokens = self._prefill.tokens
    self.stats.evicted_tokens = self._prefill.cache.evicted
    self.stats.stale_tokens = self._prefill.cache.stale

  @property
  def _upcoming(self) -> list[tuple[int, ...]]:
    """Prompts whose cached prefixes stay, whatever the budget."""
    return [request.prompt for _, request in itertools.islice(
        self._pending, 1)]

  def _runs(self, number: int) -> bool:
    """True if a request has not ended."""
    return any(number == waiting for waiting, _ in self._pending) or any(
        sequence and sequence.number == number for sequence in self._active)

  def _fit(self) -> None:
    """Resizes the ring to what the active sequences need for a chunk."""
    needed = max(sequence.needed(self.settings.chunk)
                 for sequence in self._active if sequence)
    for size in fitting(self._sizes, self._batch.size, needed):
      self._batch.resize(size)

  def _collect(self, record: dict[str, np.ndarray], state) -> None:
    """Adds a chunk's tokens to their sequences, and finishes those that ended.

    Args:
      record: of `decode.decode`, fetched.
      state: the `BudgetState` behind the chunk, fetched.
    """
    stopped = [False] * len(self._active)
    steps = 0
    for row, sequence in enumerate(self._active):
      if sequence is None:
        continue
      # `draws` counts the row's steps, so the difference is this chunk's: a
      # row may end, and the chunk too, before N steps.
      taken = int(state.draws[row]) - sequence.draws
      steps = max(steps, taken)
      self.stats.row_steps += taken
      stopped[row] = sequence.add(record, row, taken, bool(state.done[row]))
    self.stats.steps += steps
    self.stats.host_syncs += 1
    # A stop string wins over the end that the device found behind it.
    for row, sequence in enumerate(self._active):
      if sequence and state.done[row] and not stopped[row]:
        self._finish(row, state)
    self._end(stopped, budget_state.STOP, state)
    self._keep()

  def _end(self, rows: list[bool], reason: int, state: Any = None) -> None:
    """Ends active sequences from outside the loop, and finishes them.

    Args:
      rows: [B] bool, the rows of the sequences.
      reason: their finish reason, of `budget_state`.
      state: the `BudgetState`, if it was fetched already.
    """
    if not any(rows):
      return
    self._batch.end(rows, reason)
    if state is None:
      state = sharding.fetch(self._batch.carry.state)
    for row in np.flatnonzero(rows):
      self._finish(int(row), state, rollouts.FINISH_REASONS[reason])

  def _finish(self, row: int, state: Any, reason: str = "") -> None:
    """Moves a row's sequence to the completions, and frees the row."""
    sequence = self._active[row]
    assert sequence is not None
    self._active[row] = None
    done = sequence.completion(reason, state, row)
    self.stats.surplus += done.surplus
    if not done.error:
      done = self._continued(row, sequence, done)
    self._ready.append(done)

  def _continued(
      self, row: int, sequence: ActiveSequence, done: Completion,
  ) -> Completion:
    """Adds to a completion what can go on from it, and keeps that if asked."""
    keep = sequence.request.keep
    try:
      tokens, cached = sequence.kept()
    except ValueError as error:
      return dataclasses.replace(done, error=str(error)) if keep else done
    thinks = sequence.thinks(done)
    if keep:
      self._ended.append((row, tokens[:cached]))
      self._kept.add(done.id, tokens, thinks)
    return dataclasses.replace(done, kept=tokens, kept_in_thinking=thinks)

  def _settled(self, number: int) -> tuple[list[int], list[int]] | None:
    """Returns a request's settled tokens, and at least as much provenance.

    None if the request was taken already.
    """
    for sequence in self._active:
      if sequence and sequence.number == number:
        return sequence.settled(), sequence.provenance
    for done in self._ready:
      if done.id == number:
        return done.tokens, done.provenance.tolist()
    waits = any(number == waiting for waiting, _ in self._pending)
    return ([], []) if waits else None
