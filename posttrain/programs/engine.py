"""Programs of the engine: continuous batching.

Lengths decide what an engine runs, and a plan knows none. So every program
that it may run is planned, and `calls` are modelled: all prompts have the most
tokens there may be and share none across groups, and all completions run to
their maximum. Rows then end together, and the queue goes through in waves.

  P: prompts  G: samples of each  B: slots  S: slots of the cache of each
  R: prompts prefilled together  C: tokens of a chunk of a prompt
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from posttrain import sharding, weights
from posttrain.model.transformer import Transformer
from posttrain.programs import abstract
from posttrain.programs.program import Program
from posttrain.sampler import (
  budget,
  decode,
  device_batch,
  engine_settings,
  prefill,
  requests,
)
from posttrain.sampler.engine_settings import Settings

NOTE = ("calls of programs of continuous batching are modelled: prompts of the "
        "most tokens that share none, and completions that all run to their "
        "maximum; one with 0 calls runs for other lengths only")


@dataclasses.dataclass(frozen=True)
class Prompts:
  """P prompts of `length` tokens at most, with G samples of each."""

  count: int
  group_size: int
  length: int


@dataclasses.dataclass(frozen=True)
class Waves:
  """Calls that an engine makes while it goes through its queue.

  Attributes:
    calls: by the key that the engine calls a program by.
    batches: of prompts that are there at once, each of R rows.
    kept: of those, batches with prompts that a later wave waits for.
  """

  calls: Counter[tuple]
  batches: int
  kept: int


def waves(
    settings: Settings, place: prefill.Prefill, prompts: Prompts,
    tokens: int,
) -> Waves:
  """Counts the engine's calls for completions that are all `tokens` long."""
  sizes, calls = settings.sizes, Counter[tuple]()
  chunks = -(-prompts.length // place.chunk)
  source = place.slots_of(chunks * place.chunk)
  size, batch_of, most, kept = sizes[0], dict[int, int](), 0, 0
  rows = prompts.count * prompts.group_size
  for first in range(0, rows, settings.max_num_seqs):
    last = min(first + settings.max_num_seqs, rows)
    wave = Counter(i // prompts.group_size for i in range(first, last))
    new = [prompt for prompt in wave if prompt not in batch_of]
    for n, prompt in enumerate(new):
      batch_of[prompt] = first + n // place.rows
    batches = -(-len(new) // place.rows)
    calls["empty", place.rows, source] += batches
    calls["prefill", place.rows, source] += batches * chunks
    waiting = prompts.group_size > 1 and first % prompts.group_size
    most, kept = max(most, batches + bool(waiting)), max(kept, bool(waiting))
    for used in range(0, tokens, settings.chunk):
      needed = min(prompts.length + used + settings.chunk,
                   settings.max_seq_len)
      for larger in engine_settings.fitting(sizes, size, needed):
        calls["resize", size, larger] += 1
        size = larger
      if not used:
        calls["begin",] += 1
        of_batch = Counter[int]()
        for prompt, samples in wave.items():
          of_batch[batch_of[prompt]] += samples
        calls["place", size, source] += sum(
            -(-samples // place.rows) for samples in of_batch.values())
        calls["logits_processor",] += last - first
      calls["decode", size] += 1
  return Waves(calls, most, kept)


def of_engine(
    named: Callable[..., Program], model: Transformer,
    tables: budget.BudgetTables, settings: Settings, *, prompts: Prompts,
    tokens: int, beside: dict[str, Any],
) -> Iterator[Program]:
  """Yields every program of an engine with these settings, on the current mesh.

  Args:
    named: makes a program: (kind, lower, arguments, beside, calls, sizes,
      note).
    tokens: of a completion at most.
    beside: abstract arrays that are on the devices meanwhile.
  """
  shapes = _Shapes(model, tables, settings, prompts, tokens, beside)
  named = functools.partial(named, note=NOTE)
  yield named("unstack", functools.partial(
      decode.unstacked.lower, model, weights_dtype=settings.weights_dtype),
      (model,), beside)
  yield from _idle(named, shapes)
  yield from _prompts(named, shapes)
  yield from _admission(named, shapes)
  yield from _resizes(named, shapes)
  for size in settings.sizes:
    carry = shapes.carry(size)
    script = sharding.abstract(
        np.zeros((settings.rows, settings.chunk), np.int32), "rows", "slots")
    yield named("decode", functools.partial(
        decode.decode.lower, shapes.whole, shapes.blocks, carry,
        shapes.requests, script, np.int32(settings.rows), tables,
        steps=settings.chunk, recorded=settings.recorded,
        logits_processor=settings.logits_processor,
        budget_schedule=settings.budget_schedule),
        (shapes.whole, shapes.blocks, carry, shapes.requests, script),
        beside | shapes.kept | shapes.prompts(shapes.waves.kept),
        shapes.waves.calls["decode", size], f"S={size}")


class _Shapes:
  """Abstract arrays of an engine, as the current mesh would hold them."""

  def __init__(
      self, model: Transformer, tables: budget.BudgetTables,
      settings: Settings, prompts: Prompts, tokens: int,
      beside: dict[str, Any]):
    self.settings, self.tables, self.config = settings, tables, model.config
    self.whole, self.blocks, self.kept = abstract.unstacked(
        model, settings.weights_dtype)
    self.weights = beside | {
        "model": self.whole, "layers": self.blocks, **self.kept}
    self.beside, self.length, self.tokens = beside, prompts.length, tokens
    self.prefill = prefill.Prefill(
        model.config, rows=settings.prefill_rows,
        chunk=settings.prefill_chunk, prefixes=settings.prefixes,
        cache_dtype=settings.cache_dtype, run=_never)
    # S of the caches that prompts may be prefilled in.
    self.sources = engine_settings.doublings(
        self.prefill.chunk, self.prefill.slots_of(prompts.length))
    self.waves = waves(settings, self.prefill, prompts, tokens)
    budgets, *_ = requests.columns([None] * settings.rows, settings.max_ids)
    self.idle = tables, budgets, np.zeros(settings.rows, np.int32)
    self.state = weights.on_mesh(device_batch.done.eval_shape(*self.idle))
    self.processor_row = self.processor_state = None
    if settings.logits_processor:
      self.processor_row = jax.tree.map(
          np.asarray, settings.logits_processor.init((0,), None))
      self.processor_state = weights.on_mesh(jax.tree.map(
          lambda x: device_batch.repeated.eval_shape(x, rows=settings.rows),
          self.processor_row))
    self.admitted = device_batch.begin_arguments(
        [None] * settings.rows, [0], tables, settings.max_ids)
    self.requests, _ = weights.on_mesh(device_batch.begin.eval_shape(
        self.state, tables, *self.admitted))

  def rows(self, count: int, slots: int) -> prefill.Rows:
    return weights.on_mesh(prefill.empty.eval_shape(
        self.config, np.int32(0), rows=count, slots=slots,
        cache_dtype=self.settings.cache_dtype))

  def carry(self, slots: int) -> decode.Carry:
    rows = self.rows(self.settings.rows, slots)
    earlier = weights.on_mesh(device_batch.no_earlier.eval_shape(
        rows.hidden, self.tables)) if self.tables.recalled else None
    return decode.Carry(
        rows.cache, rows.hidden, self.state, self.processor_state, earlier)

  def prompts(self, batches: int) -> dict[str, Any]:
    """Batches of prompts that were prefilled, and the prefix they share."""
    held = [self.rows(self.prefill.rows, self.sources[-1])] * batches
    if self.can_share:
      held.append(self.rows(self.prefill.parts, self.sources[-1]))
    return {"prompts": held} if held else {}

  @property
  def can_share(self) -> bool:
    """Prompts may share a prefix: a whole chunk, with a token behind it."""
    return self.length > self.prefill.chunk

  @property
  def slots(self) -> dict[str, Any]:
    """Slots at their largest, while prompts are prefilled for the next wave."""
    return {"slots": self.carry(self.settings.sizes[-1]),
            "requests": self.requests}

  def empty(
      self, named: Callable[..., Program], count: int, slots: int,
      beside: dict[str, Any], calls: int,
  ) -> Program:
    return named("empty", functools.partial(
        prefill.empty.lower, self.config, np.int32(0), rows=count,
        slots=slots, cache_dtype=self.settings.cache_dtype), (), beside,
        calls, f"rows={count} S={slots}")

  def place(
      self, named: Callable[..., Program], kind: str, into: prefill.Rows,
      source: prefill.Rows, calls: int, sizes: str,
  ) -> Program:
    columns = (np.zeros(self.prefill.rows, np.int32),) * 3
    carry = self.carry(self.settings.sizes[0])
    return named(kind, functools.partial(
        prefill.place.lower, into, source, *columns), (into, source), {
            **self.weights, **self.prompts(self.waves.batches - 1),
            "state": (carry.state, carry.processor_state, carry.earlier),
            "requests": self.requests}, calls, sizes)


def _idle(
    named: Callable[..., Program], shapes: _Shapes) -> Iterator[Program]:
  """Yields programs that make the engine's slots, without a request."""
  settings, tables = shapes.settings, shapes.tables
  size = settings.sizes[0]
  yield shapes.empty(named, settings.rows, size, shapes.weights, 1)
  rows = shapes.rows(settings.rows, size)
  beside = {**shapes.weights, "slots": rows}
  yield named(
      "done", functools.partial(device_batch.done.lower, *shapes.idle), (),
      beside)
  if tables.recalled:
    yield named("earlier", functools.partial(
        device_batch.no_earlier.lower, rows.hidden, tables), (rows.hidden,),
        beside)
  for n, row in enumerate(jax.tree.leaves(shapes.processor_row)):
    yield named("processor_rows", functools.partial(
        device_batch.repeated.lower, row, rows=settings.rows), (), beside,
        sizes=f"state={n}")


def _prompts(
    named: Callable[..., Program], shapes: _Shapes) -> Iterator[Program]:
  """Yields programs that prefill prompts, and copy a prefix that they share."""
  count, parts = shapes.prefill.rows, shapes.prefill.parts
  beside = {**shapes.slots, **shapes.prompts(shapes.waves.batches - 1)}
  for source in shapes.sources:
    rows = shapes.rows(count, source)
    calls = shapes.waves.calls["prefill", count, source]
    yield shapes.empty(
        named, count, source, shapes.weights | beside,
        shapes.waves.calls["empty", count, source])
    tokens = sharding.abstract(
        np.zeros((count, shapes.prefill.chunk), np.int32), "rows", "slots")
    yield named("prefill", functools.partial(
        prefill.feed.lower, shapes.whole, shapes.blocks, rows, tokens,
        tokens), (shapes.whole, shapes.blocks, rows, tokens, tokens),
        shapes.beside | shapes.kept | beside, calls,
        f"rows={count} S={source}")
  if not shapes.can_share:
    return
  for a, b in itertools.combinations_with_replacement(shapes.sources, 2):
    yield shapes.place(
        named, "prefix", shapes.rows(count, b), shapes.rows(parts, a), 0,
        f"S={a} to {b}")
  if parts != count:
    for source in shapes.sources:
      yield shapes.empty(named, parts, source, shapes.weights | beside, 0)
      yield shapes.place(
          named, "keep_prefix", shapes.rows(parts, source),
          shapes.rows(count, source), 0, f"S={source}")


def _admission(
    named: Callable[..., Program], shapes: _Shapes) -> Iterator[Program]:
  """Yields programs that admit requests to slots."""
  settings, calls = shapes.settings, shapes.waves.calls
  for source, size in itertools.product(shapes.sources, settings.sizes):
    yield shapes.place(
        named, "place", shapes.rows(settings.rows, size),
        shapes.rows(shapes.prefill.rows, source), calls["place", size, source],
        f"S={source} to {size}")
  carry = shapes.carry(settings.sizes[-1])
  beside = {**shapes.weights, **shapes.prompts(shapes.waves.batches)}
  yield named("begin", functools.partial(
      device_batch.begin.lower, shapes.state, shapes.tables, *shapes.admitted),
      (shapes.state,), {
          **beside, "slots": (
              carry.cache, carry.hidden, carry.processor_state,
              carry.earlier), "requests": shapes.requests},
      calls["begin",])
  if shapes.processor_state is not None:
    yield named("logits_processor", functools.partial(
        device_batch.set_row.lower, shapes.processor_state,
        shapes.processor_row, np.int32(0)), (shapes.processor_state,), {
            **beside, "slots": (carry.cache, carry.hidden, carry.state,
                                carry.earlier), "requests": shapes.requests},
        calls["logits_processor",])


def _resizes(
    named: Callable[..., Program], shapes: _Shapes) -> Iterator[Program]:
  """Yields programs that resize the cache.

  It grows to the next size, and shrinks where a short row needs a quarter."""
  settings = shapes.settings
  least = 1 + min(settings.chunk, shapes.tokens)
  beside = {**shapes.weights, **shapes.prompts(shapes.waves.batches),
            "requests": shapes.requests}
  for small, large in itertools.pairwise(settings.sizes):
    back = [(large, small)] if least <= large // 4 else []
    for before, after in [(small, large), *back]:
      carry = shapes.carry(before)
      yield named("resize", functools.partial(
          decode.resize.lower, carry, slots=after), (carry,), beside,
          shapes.waves.calls["resize", before, after],
          f"S={before} to {after}")


def _never(*_: Any, **__: Any) -> Any:
  raise AssertionError("A plan runs nothing.")
