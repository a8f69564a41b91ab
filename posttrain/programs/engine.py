"""Programs of the sampler, whose calls are an engine's: continuous batching.

Lengths decide what an engine runs, and a plan knows none. So every program
that it may run is planned, and `calls` are modelled: all prompts have the most
tokens there may be and share none across groups, and all completions run to
their maximum. Rows then end together, and the queue goes through in waves.

  P: prompts  G: samples of each  B: slots  S: slots of the cache of each
  R: prompts prefilled together  C: tokens of a chunk of a prompt

Of episodes of several turns every program is planned, and the calls of first
turns alone are modelled: how many turns there are, and how long their
observations, is data.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from posttrain import sharding, weights
from posttrain.model.transformer import Transformer
from posttrain.programs.program import SAMPLING, Program
from posttrain.sampler import decode, device_batch, prefill, requests
from posttrain.sampler.requests import Settings
from posttrain.sampler.sampler import Limits, Sampler

NOTE = ("calls of programs of continuous batching are modelled: prompts of the "
        "most tokens that share none, and completions that all run to their "
        "maximum; one with 0 calls runs for other lengths only")
TURNS = ("; of an episode the first turn alone, so that one with 0 calls may "
         "be of later turns")


def of_rollout(
    stage: str, sampler: Sampler, model: Transformer, *, groups: int,
    group_size: int, limits: Limits, beside: dict[str, Any], detail: str = "",
    steps: bool = True,
) -> Iterator[Program]:
  """Yields the programs of one sampler call on the current mesh.

  Args:
    stage: the name of the stage that makes the call.
    groups, group_size: prompts, and samples of each.
    beside: abstract arrays that are on the devices meanwhile.
    detail: a part of the programs' names.
    steps: the call is a part of each step of the stage.
  """
  def named(
      kind: str, lower: Callable[[], jax.stages.Lowered], arguments: Any,
      beside: dict[str, Any], calls: int = 1, sizes: str = "",
      most_trips: int | None = None,
  ) -> Program:
    return Program(
        stage, kind, lower, arguments, SAMPLING, beside, float(calls * steps),
        most_trips, " ".join(filter(None, (detail, sizes))),
        note=note if steps else "")

  note = NOTE + TURNS * (sampler.max_episode_tokens > 0)
  asked = sampler.make_requests(
      [[0]] * groups, limits, prompt_id=range(groups), group_size=group_size)
  settings = sampler.engine_settings(asked, group_size)
  yield named("unstack", functools.partial(
      decode.unstacked.lower, model, weights_dtype=settings.weights_dtype),
      (model,), beside)
  engine = _Engine(
      named, model, sampler, settings, groups, group_size,
      int(np.max(limits.max_tokens)), beside)
  yield from engine.slots()
  yield from engine.prefills()
  yield from engine.admission()
  yield from engine.keeps()
  yield from engine.resizes()
  yield from engine.decodes()


def _calls(
    settings: Settings, place: prefill.Prefill, groups: int, group_size: int,
    length: int, tokens: int,
) -> Counter[tuple]:
  """Counts an engine's calls, by the keys that it calls programs by.

  All prompts have `length` tokens, and all completions `tokens`.
  """
  sizes, calls = settings.sizes, Counter[tuple]()
  chunks = -(-length // place.chunk)
  source = settings.prefill_sizes(length)[-1]
  size, batch_of = sizes[0], dict[int, int]()
  rows = groups * group_size
  for first in range(0, rows, settings.max_num_seqs):
    last = min(first + settings.max_num_seqs, rows)
    wave = range(first // group_size, -(-last // group_size))
    new = [prompt for prompt in wave if prompt not in batch_of]
    for n, prompt in enumerate(new):
      batch_of[prompt] = first + n // place.rows
    batches = -(-len(new) // place.rows)
    calls["empty", place.rows, source] += batches
    calls["prefill", place.rows, source] += batches * chunks
    for used in range(0, tokens, settings.chunk):
      needed = length + used + settings.chunk
      if not settings.prefix_cache_tokens:  # No row that ended is kept whole.
        needed = min(needed, settings.max_seq_len)
      for larger in requests.fitting(sizes, size, needed):
        calls["resize", size, larger] += 1
        size = larger
      if not used:
        calls["begin",] += 1
        calls["place", size, source] += len({batch_of[p] for p in wave})
        calls["logits_processor",] += last - first
      calls["decode", size] += 1
  return calls


class _Engine:
  """An engine's abstract arrays on the current mesh, and its programs."""

  def __init__(
      self, named: Callable[..., Program], model: Transformer,
      sampler: Sampler, settings: Settings, groups: int, group_size: int,
      tokens: int, beside: dict[str, Any]):
    tables = sampler.tables
    self.named, self.settings = named, settings
    self.group_size, self.tokens = group_size, tokens
    self.tables, self.config = tables.put(sharding.abstract), model.config
    self.whole, self.blocks = weights.on_mesh(decode.unstacked.eval_shape(
        model, weights_dtype=settings.weights_dtype))
    self.weights = beside | {"model": self.whole, "layers": self.blocks}
    # The decode loop has another copy of these.
    at_rest = [w for w, ready in zip(
        jax.tree.leaves(model), jax.tree.leaves(self.whole), strict=True)
               if (w.sharding, w.dtype) != (ready.sharding, ready.dtype)]
    if at_rest:
      self.weights["tables at rest"] = at_rest
    self.prefill = prefill.Prefill(model.config, settings, _never)
    length = sampler.max_prompt_tokens
    keeps = settings.prefix_cache_tokens > 0
    # S of the caches that prompts may be prefilled in; those of later turns
    # are whole sequences.
    self.sources = settings.prefill_sizes(
        settings.max_seq_len if keeps else length)
    self.calls = _calls(
        settings, self.prefill, groups, group_size, length, tokens)
    budgets, *_ = requests.columns([None] * settings.rows, tables, settings)
    self.idle = (self.tables, budgets, np.zeros(settings.rows, np.int32),
                 settings.confidence)
    self.state = weights.on_mesh(device_batch.done.eval_shape(*self.idle))
    self.processor_row = self.processor_state = None
    if settings.logits_processor:
      self.processor_row = jax.tree.map(
          np.asarray, settings.logits_processor.init((0,), None))
      self.processor_state = weights.on_mesh(jax.tree.map(
          lambda x: device_batch.repeated.eval_shape(x, rows=settings.rows),
          self.processor_row))
    self.admitted = device_batch.begin_arguments(
        [None] * settings.rows, [0], tables, settings)
    self.requests, _ = weights.on_mesh(device_batch.begin.eval_shape(
        self.state, self.tables, *self.admitted))
    # Prompts may share a prefix that saves a chunk.
    self.can_share = keeps or length > self.prefill.chunk
    # A wave ends within a group, and a later one goes on with its prompt.
    splits = (groups * group_size > settings.max_num_seqs
              and settings.max_num_seqs % group_size > 0)
    self.held = self.weights | {"requests": self.requests}
    if keeps:  # As many of the longest sequences as its budget has slots for.
      self.held["prefix cache"] = self.rows(
          -(-settings.prefix_cache_tokens // self.sources[-1]),
          self.sources[-1])
    elif splits or self.can_share:  # What the next request goes on from.
      self.held["prefix cache"] = self.rows(
          self.prefill.rows, self.sources[-1])

  def beside(self, *used: str, **more: Any) -> dict[str, Any]:
    """Returns what an engine holds besides what a program uses."""
    return {name: tree for name, tree in self.held.items()
            if name not in used} | more

  def rows(self, count: int, slots: int) -> prefill.Rows:
    return weights.on_mesh(prefill.empty.eval_shape(
        self.config, np.int32(0), rows=count, slots=slots,
        cache_dtype=self.settings.cache_dtype))

  def carry(self, slots: int) -> decode.Carry:
    rows = self.rows(self.settings.rows, slots)
    return decode.Carry(
        rows.cache, rows.hidden, self.state, self.processor_state)

  def empty(
      self, count: int, slots: int, beside: dict[str, Any], calls: int,
  ) -> Program:
    return self.named("empty", functools.partial(
        prefill.empty.lower, self.config, np.int32(0), rows=count,
        slots=slots, cache_dtype=self.settings.cache_dtype), (), beside,
        calls, f"rows={count} S={slots}")

  def place(
      self, kind: str, into: prefill.Rows, source: int, calls: int = 0,
      count: int = 0,
  ) -> Program:
    """Copies sequences of some rows of `source` slots.

    Args:
      count: of these rows; 0: those of a batch of prompts.
    """
    count, total = count or self.prefill.rows, into.hidden.shape[0]
    columns = (np.zeros(total, np.int32),) * 3
    arrays = into, self.rows(count, source)
    return self.named(
        kind, functools.partial(prefill.place.lower, *arrays, *columns),
        arrays, self.beside(state=(self.state, self.processor_state)), calls,
        f"rows={count} S={source} to {into.cache.slots}",
        most_trips=min(total, count * self.group_size))

  def slots(self) -> Iterator[Program]:
    """Yields programs that make the engine's slots, without a request."""
    settings, size = self.settings, self.settings.sizes[0]
    yield self.empty(settings.rows, size, self.weights, 1)
    beside = self.weights | {"slots": self.rows(settings.rows, size)}
    yield self.named(
        "done", functools.partial(device_batch.done.lower, *self.idle),
        self.tables, beside)
    for n, row in enumerate(jax.tree.leaves(self.processor_row)):
      yield self.named("processor_rows", functools.partial(
          device_batch.repeated.lower, row, rows=settings.rows), (), beside,
          sizes=f"state={n}")

  def prefills(self) -> Iterator[Program]:
    """Yields programs that prefill prompts, and copy a shared prefix."""
    count, carry = self.prefill.rows, self.carry(self.settings.sizes[-1])
    for source in self.sources:
      yield self.empty(
          count, source, self.beside(slots=carry),
          self.calls["empty", count, source])
      tokens = sharding.abstract(
          np.zeros((count, self.prefill.chunk), np.int32), "rows", "slots")
      arrays = (
          self.whole, self.blocks, self.rows(count, source), tokens, tokens)
      yield self.named(
          "prefill", functools.partial(prefill.feed.lower, *arrays), arrays,
          self.beside("model", "layers", slots=carry),
          self.calls["prefill", count, source], f"rows={count} S={source}")
    if self.can_share:
      for source, slots in itertools.product(self.sources, self.sources):
        yield self.place("prefix", self.rows(count, slots), source)

  def admission(self) -> Iterator[Program]:
    """Yields programs that admit requests to slots."""
    settings = self.settings
    for source, size in itertools.product(self.sources, settings.sizes):
      yield self.place(
          "place", self.rows(settings.rows, size), source,
          self.calls["place", size, source])
    rows = self.rows(settings.rows, settings.sizes[-1])
    yield self.named("begin", functools.partial(
        device_batch.begin.lower, self.state, self.tables, *self.admitted),
        (self.state, self.tables),
        self.beside(slots=(rows, self.processor_state)), self.calls["begin",])
    if self.processor_state is not None:
      yield self.named("logits_processor", functools.partial(
          device_batch.set_row.lower, self.processor_state,
          self.processor_row, np.int32(0)), (self.processor_state,),
          self.beside(slots=(rows, self.state)),
          self.calls["logits_processor",])

  def keeps(self) -> Iterator[Program]:
    """Yields programs that keep rows that ended, and go on from kept ones."""
    if not self.settings.prefix_cache_tokens:
      return
    parts, count, rows = (
        self.prefill.parts, self.prefill.rows, self.settings.rows)
    for slots in self.sources:
      if parts != count:
        yield self.empty(parts, slots, self.beside(), 0)
      for size in self.settings.sizes:
        yield self.place("keep", self.rows(parts, slots), size, count=rows)
      for source in self.sources if parts != count else ():
        yield self.place(
            "prefix", self.rows(count, slots), source, count=parts)

  def resizes(self) -> Iterator[Program]:
    """Yields programs that resize the cache.

    It grows to the next size, and shrinks where a short row needs a quarter."""
    settings = self.settings
    least = 1 + min(settings.chunk, self.tokens)
    for small, large in itertools.pairwise(settings.sizes):
      back = [(large, small)] if least <= large // 4 else []
      for before, after in [(small, large), *back]:
        carry = self.carry(before)
        yield self.named("resize", functools.partial(
            decode.resize.lower, carry, slots=after), (carry,), self.beside(),
            self.calls["resize", before, after], f"S={before} to {after}")

  def decodes(self) -> Iterator[Program]:
    """Yields a chunk of decoding for each size of the cache."""
    settings = self.settings
    script = sharding.abstract(
        np.zeros((settings.rows, settings.chunk), np.int32), "rows", "slots")
    for size in settings.sizes:
      arrays = (
          self.whole, self.blocks, self.carry(size), self.requests, script)
      yield self.named("decode", functools.partial(
          decode.decode.lower, *arrays, np.int32(settings.rows), self.tables,
          steps=settings.chunk, recorded=settings.recorded,
          logits_processor=settings.logits_processor,
          budget_schedule=settings.budget_schedule), (*arrays, self.tables),
          self.beside("model", "layers", "requests"),
          self.calls["decode", size], f"S={size}")


def _never(*_: Any, **__: Any) -> Any:
  raise AssertionError("A plan runs nothing.")
