"""Prompts of any length into keys and values, each once.

Prompts go through the model R at a time, C tokens at a time, over a cache of
their own; from there their rows are copied to the slots of their samples. A
prefix that several prompts share is prefilled first and copied to them, so
that only what follows is computed again.

  R: prompts together  C: tokens of a chunk  S: cache slots  D: embed
  A: rows copied at once
"""

import dataclasses
import functools
import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from posttrain import sharding
from posttrain.model import cache as kv
from posttrain.model.block import Block
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.sharding import spec

Tokens = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of a cache, and the hidden state [R, D] of the last token of each."""

  cache: kv.KVCache
  hidden: jax.Array


@functools.partial(
    jax.jit, static_argnames=("config", "rows", "slots", "cache_dtype"))
def empty(config: ModelConfig, index: jax.Array, *, rows: int, slots: int,
          cache_dtype: str):
  """Rows without a token; the first comes into slot `index`."""
  cache = dataclasses.replace(
      kv.empty(config, rows, slots, cache_dtype), index=jnp.int32(index))
  return Rows(cache, jnp.zeros(
      (rows, config.embed), config.dtype, out_sharding=spec(
          "rows", "act_embed")))


# A part of the model is not read, see `decode.unstacked`.
@functools.partial(jax.jit, donate_argnames="rows", keep_unused=True)
def feed(
    model: Transformer, blocks: list[Block], rows: Rows, tokens: jax.Array,
    positions: jax.Array,
) -> Rows:
  """One chunk: [R, C] int32 tokens and positions, -1 behind a row's end."""
  hidden, cache, _ = model.extend(tokens, positions, rows.cache, blocks)
  # A row that has a token here has its last so far here.
  last = jnp.max(positions, axis=1, keepdims=True)
  picked = jnp.sum(jnp.where(
      ((positions == last) & (positions >= 0))[:, :, None], hidden, 0), axis=1)
  return Rows(cache, jnp.where(last >= 0, picked, rows.hidden))


@functools.partial(jax.jit, donate_argnames="into")
def place(
    into: Rows, source: Rows, rows: jax.Array, ends: jax.Array,
    slots: jax.Array,
) -> Rows:
  """Copies rows, in place; see `cache.insert`. Arguments: [A] int32."""
  hidden = source.hidden.at[rows].get(out_sharding=spec(None, "act_embed"))
  return Rows(
      kv.insert(into.cache, source.cache, rows, ends, slots),
      into.hidden.at[slots].set(
          hidden, mode="drop", out_sharding=spec("rows", "act_embed")))


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Where a prompt lies: its row ends right before slot `end`."""

  rows: Rows
  row: int
  end: int


class Shared:
  """What all prompts of a queue begin with, found as they come.

  Whole chunks of it only, which is what sharing saves.
  """

  def __init__(self, chunk: int):
    self._chunk = chunk
    self._common: Tokens = ()
    self._differ = False

  def add(self, prompt: Tokens, *, first: bool) -> None:
    """Another prompt; with `first` the queue was empty."""
    if first:
      self._common, self._differ = prompt, False
      return
    if prompt != self._common:
      self._differ = True
      same = itertools.takewhile(bool, map(operator.eq, self._common, prompt))
      self._common = prompt[:sum(same)]

  def of(self, prompt: Tokens) -> int:
    """So many first tokens are shared with other prompts."""
    if not self._differ:
      return 0
    most = min(len(self._common), len(prompt) - 1)
    return most // self._chunk * self._chunk


class Prefill:
  """Prefills prompts, and keeps those that are still needed.

  Attributes:
    tokens: prompt tokens computed so far; a shared one counts once.
    positions: what the programs worked on, padding included.
  """

  def __init__(
      self, config: ModelConfig, *, rows: int, chunk: int, prefixes: int,
      cache_dtype: str, run: Callable[..., Rows],
  ):
    """For one shape of model.

    Args:
      config: of the model.
      rows: R, whole rows per part of the mesh.
      chunk: C.
      prefixes: how many are kept; the one that was not used longest goes.
      cache_dtype: of the caches.
      run: calls a compiled function: run(key, function, *args, **kwargs).
    """
    self.config, self.chunk, self.prefixes = config, chunk, prefixes
    self.parts = sharding.axis_size("rows")
    self.rows = -(-rows // self.parts) * self.parts
    self.tokens = self.positions = 0
    self._run, self._cache_dtype = run, cache_dtype
    self._prompts: dict[Tokens, Prompt] = {}
    self._prefixes: OrderedDict[Tokens, Prompt] = OrderedDict()

  def clear(self) -> None:
    """Forgets everything: the weights are others now."""
    self._prompts.clear()
    self._prefixes.clear()

  def forget(self, prompt: Tokens) -> None:
    """Nobody waits for this prompt any more."""
    self._prompts.pop(prompt, None)

  def trim(self, most: int) -> None:
    """Forgets the oldest; who still waits for one has it prefilled again."""
    while len(self._prompts) > most:
      del self._prompts[next(iter(self._prompts))]

  def get(self, prompt: Tokens) -> Prompt:
    """A prompt that `add` was given."""
    return self._prompts[prompt]

  def add(
      self, model: Transformer, blocks: list[Block],
      prompts: Sequence[tuple[Tokens, int]],
  ) -> None:
    """Prefills those that are not there yet.

    Args:
      model, blocks: the weights, whole and layer by layer.
      prompts: with each, how many of its first tokens are a prefix that
        others share; fewer than it has.
    """
    new = {p: n for p, n in prompts if p not in self._prompts}
    wanted = dict.fromkeys(p[:n] for p, n in new.items() if n)
    for prefix in wanted:
      if prefix in self._prefixes:
        self._prefixes.move_to_end(prefix)
    missing = [p for p in wanted if p not in self._prefixes]
    for batch in _batches(missing, self.rows):
      found = self._batch(model, blocks, [(p, 0) for p in batch])
      for prefix, prompt in zip(batch, found, strict=True):
        self._prefixes[prefix] = self._alone(prompt)
    for batch in _batches(list(new.items()), self.rows):
      found = self._batch(model, blocks, batch)
      for (tokens, _), prompt in zip(batch, found, strict=True):
        self._prompts[tokens] = prompt
    while len(self._prefixes) > self.prefixes:
      self._prefixes.popitem(last=False)

  def place(self, into: Rows, prompts: Sequence[Prompt],
            slots: Sequence[int]) -> Rows:
    """Begins rows `slots` of `into` with prompts, one program a batch."""
    by_rows: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
      by_rows.setdefault(id(prompt.rows), []).append(i)
    total = into.hidden.shape[0]
    for chosen in by_rows.values():
      for part in _batches(chosen, self.rows):
        columns = np.zeros((3, self.rows), np.int32)
        columns[2] = total  # Beyond the last: nothing.
        for j, i in enumerate(part):
          columns[:, j] = prompts[i].row, prompts[i].end, slots[i]
        source = prompts[part[0]].rows
        into = self._run(
            ("place", total, into.cache.slots, source.hidden.shape[0],
             source.cache.slots), place, into, source, *columns)
    return into

  def slots_of(self, length: int) -> int:
    """The cache for a prompt: a doubling of one chunk."""
    slots = self.chunk
    while slots < length:
      slots *= 2
    return slots

  def _batch(
      self, model: Transformer, blocks: list[Block],
      prompts: Sequence[tuple[Tokens, int]],
  ) -> list[Prompt]:
    """Prefills up to R prompts behind prefixes that are there."""
    begin = max(n for _, n in prompts)
    chunks = max(-(-(len(p) - n) // self.chunk) for p, n in prompts)
    slots = self.slots_of(begin + chunks * self.chunk)
    rows = self._empty(self.rows, slots, begin)
    behind = [(i, self._prefixes[p[:n]])
              for i, (p, n) in enumerate(prompts) if n]
    rows = self.place(
        rows, [prompt for _, prompt in behind], [i for i, _ in behind])
    tokens = np.zeros((self.rows, chunks * self.chunk), np.int32)
    positions = np.full_like(tokens, -1)
    for i, (prompt, n) in enumerate(prompts):
      tokens[i, :len(prompt) - n] = prompt[n:]
      positions[i, :len(prompt) - n] = np.arange(n, len(prompt))
    for at in range(0, tokens.shape[1], self.chunk):
      put = lambda x, at=at: sharding.put(
          x[:, at:at + self.chunk], "rows", "slots")
      rows = self._run(("prefill", self.rows, slots), feed, model, blocks,
                       rows, put(tokens), put(positions))
    self.tokens += int((positions >= 0).sum())
    self.positions += positions.size
    return [Prompt(rows, i, begin + len(p) - n)
            for i, (p, n) in enumerate(prompts)]

  def _alone(self, prompt: Prompt) -> Prompt:
    """Without its batch, which would stay on the device with it."""
    slots = prompt.rows.cache.slots
    rows = self.place(
        self._empty(self.parts, slots, 0), [prompt] * self.parts,
        range(self.parts))
    return Prompt(rows, 0, slots)

  def _empty(self, rows: int, slots: int, index: int) -> Rows:
    return self._run(
        ("empty", rows, slots), empty, self.config, np.int32(index),
        rows=rows, slots=slots, cache_dtype=self._cache_dtype)


def _batches(items: Sequence, size: int) -> list[Sequence]:
  return [items[i:i + size] for i in range(0, len(items), size)]
