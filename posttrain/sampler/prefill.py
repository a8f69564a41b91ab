"""Chunked prefill with prefix caching: each prompt is computed once.

Prompts go through the model R at a time and C tokens at a time, over a KV cache
of their own. From there a prompt's keys and values are copied to the row of
each of its samples, so the group shares one prefill of its prompt. A prefix
that several prompts share is prefilled first and copied to them, so that only
the tokens behind it are computed for each.

  R: prompts prefilled together  C: tokens of a chunk  S: cache slots
  D: embed  A: rows copied at once
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
from posttrain.sampler.requests import doublings
from posttrain.sharding import spec

Tokens = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of a KV cache, and the last hidden state of each.

  Attributes:
    cache: of R rows.
    hidden: [R, D] in the compute dtype, the hidden state of each row's last
      token, from which its next token is drawn.
  """

  cache: kv.KVCache
  hidden: jax.Array


@functools.partial(
    jax.jit, static_argnames=("config", "rows", "slots", "cache_dtype"))
def empty(config: ModelConfig, index: jax.Array, *, rows: int, slots: int,
          cache_dtype: str):
  """Makes rows without a token; the first token is written to slot `index`."""
  cache = dataclasses.replace(
      kv.empty(config, rows, slots, cache_dtype), index=jnp.int32(index))
  return Rows(cache, jnp.zeros(
      (rows, config.embed), config.dtype, out_sharding=spec(
          "rows", "act_embed")))


# Some arrays of the model are not read here, see `decode.unstacked`.
@functools.partial(jax.jit, donate_argnames="rows", keep_unused=True)
def feed(
    model: Transformer, blocks: list[Block], rows: Rows, tokens: jax.Array,
    positions: jax.Array,
) -> Rows:
  """Prefills one chunk of each row's prompt.

  Args:
    model, blocks: as `decode.unstacked` makes them.
    rows: donated.
    tokens, positions: [R, C] int32; position -1 behind a prompt's end.
  """
  hidden, cache, _ = model.extend(tokens, positions, rows.cache, blocks)
  # Prompts end in different chunks. A row that has a token in this chunk takes
  # its hidden state from it; one that ended earlier keeps the one it has. A
  # masked sum picks it, as the layout of a gather would be ambiguous.
  last = jnp.max(positions, axis=1, keepdims=True)
  picked = jnp.sum(jnp.where(
      ((positions == last) & (positions >= 0))[:, :, None], hidden, 0), axis=1)
  return Rows(cache, jnp.where(last >= 0, picked, rows.hidden))


@functools.partial(jax.jit, donate_argnames="into")
def place(
    into: Rows, source: Rows, source_rows: jax.Array, ends: jax.Array,
    rows: jax.Array,
) -> Rows:
  """Copies prompts from rows of `source` to rows of `into`, in place.

  Args:
    into: donated.
    source: the prompts, see `cache.insert`.
    source_rows, ends, rows: [A] int32, see `cache.insert`.
  """
  # One at a time: all together would be on each device twice over, at the
  # ring's length. It is also faster, on a CPU by four times.
  def copy(i, into):
    at, end, row = (jax.lax.dynamic_slice_in_dim(x, i, 1)
                    for x in (source_rows, ends, rows))
    hidden = source.hidden.at[at].get(out_sharding=spec(None, "act_embed"))
    return Rows(
        kv.insert(into.cache, source.cache, at, end, row),
        into.hidden.at[row].set(
            hidden, mode="drop", out_sharding=spec("rows", "act_embed")))

  used = jnp.sum(rows < into.hidden.shape[0])
  return jax.lax.fori_loop(0, used, copy, into)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Prefilled prompt: row `row` of `rows`, which ends before slot `end`."""

  rows: Rows
  row: int
  end: int


class Shared:
  """Automatic prefix caching: the prefix that all prompts of a queue share.

  It is kept up to date as prompts come. Only its whole chunks are shared, as a
  part of a chunk would cost a forward pass all the same.
  """

  def __init__(self, chunk: int):
    self._chunk = chunk
    self._common: Tokens = ()
    self._differ = False

  def add(self, prompt: Tokens, *, first: bool) -> None:
    """Adds a prompt; with `first` the queue was empty, and it starts anew."""
    if first:
      self._common, self._differ = prompt, False
      return
    if prompt != self._common:
      self._differ = True
      same = itertools.takewhile(bool, map(operator.eq, self._common, prompt))
      self._common = prompt[:sum(same)]

  def of(self, prompt: Tokens) -> int:
    """Returns how many of the prompt's first tokens other prompts share."""
    if not self._differ:
      return 0
    # One token at least stays: its hidden state draws the first sample.
    most = min(len(self._common), len(prompt) - 1)
    return most // self._chunk * self._chunk


class Prefill:
  """Prefills prompts, and keeps those that are still needed.

  Attributes:
    rows: R, rounded up to what the mesh divides.
    chunk: C.
    tokens: prompt tokens computed so far; a shared one counts once.
    positions: positions that the programs computed so far, padding included.
  """

  def __init__(
      self, config: ModelConfig, *, rows: int, chunk: int, prefixes: int,
      cache_dtype: str, run: Callable[..., Rows],
  ):
    """Makes a prefill without prompts.

    Args:
      config: of the model.
      rows: R; rounded up to a multiple of the mesh's parts.
      chunk: C.
      prefixes: how many prefixes are kept; the least recently used goes first.
      cache_dtype: of the caches, "compute" or "int8".
      run: calls a jitted function: run(key, function, *args, **kwargs).
    """
    self.config, self.chunk, self.prefixes = config, chunk, prefixes
    self.parts = sharding.axis_size("rows")
    self.rows = -(-rows // self.parts) * self.parts
    self.tokens = self.positions = 0
    self._run, self._cache_dtype = run, cache_dtype
    self._prompts: dict[Tokens, Prompt] = {}
    self._prefixes: OrderedDict[Tokens, Prompt] = OrderedDict()

  def clear(self) -> None:
    """Drops all prompts and prefixes, as after a change of weights."""
    self._prompts.clear()
    self._prefixes.clear()

  def forget(self, prompt: Tokens) -> None:
    """Drops a prompt that no request waits for."""
    self._prompts.pop(prompt, None)

  def trim(self, most: int) -> None:
    """Drops the oldest prompts until `most` are left.

    A request that still waits for one has it prefilled again.
    """
    while len(self._prompts) > most:
      del self._prompts[next(iter(self._prompts))]

  def get(self, prompt: Tokens) -> Prompt:
    """Returns a prompt that `add` has prefilled."""
    return self._prompts[prompt]

  def add(
      self, model: Transformer, blocks: list[Block],
      prompts: Sequence[tuple[Tokens, int]],
  ) -> None:
    """Prefills the prompts that are not kept yet.

    Args:
      model, blocks: as `decode.unstacked` makes them.
      prompts: pairs of a prompt and how many of its first tokens are a prefix
        that others share; fewer than it has.
    """
    new = {p: n for p, n in prompts if p not in self._prompts}
    wanted = dict.fromkeys(p[:n] for p, n in new.items() if n)
    # Least recently used order: those in use move to the end, and the excess
    # is dropped below, after the prompts behind it were computed.
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
            rows: Sequence[int]) -> Rows:
    """Copies each prompt to its row of `into`, at most R in a program.

    Args:
      into: donated.
      prompts, rows: a prompt, and the row that it begins, in turn.
    """
    by_rows: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
      by_rows.setdefault(id(prompt.rows), []).append(i)
    total = into.hidden.shape[0]
    for chosen in by_rows.values():
      for part in _batches(chosen, self.rows):
        columns = np.zeros((3, self.rows), np.int32)
        # Fewer than R prompts are padded with a row beyond the last, which
        # `cache.insert` drops, so that one program serves any number.
        columns[2] = total
        for j, i in enumerate(part):
          columns[:, j] = prompts[i].row, prompts[i].end, rows[i]
        source = prompts[part[0]].rows
        into = self._run(
            ("place", total, into.cache.slots, source.hidden.shape[0],
             source.cache.slots), place, into, source, *columns)
    return into

  def slots_of(self, length: int) -> int:
    """Returns the cache slots for a prompt: C, or the next of its doublings."""
    return doublings(self.chunk, length)[-1]

  def _batch(
      self, model: Transformer, blocks: list[Block],
      prompts: Sequence[tuple[Tokens, int]],
  ) -> list[Prompt]:
    """Prefills up to R prompts behind prefixes that are kept already."""
    # Every prefix ends before slot `begin`, the longest one's length, so that
    # the tokens behind it are written to the same slots in all rows. A shorter
    # prefix has holes on its left.
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
    """Copies a prompt to a cache of its own.

    A kept prefix would else hold the cache of its whole batch on the device.
    """
    # The smallest cache that the mesh can split has a row for each part; all
    # of them get the prompt.
    slots = prompt.rows.cache.slots
    rows = self.place(
        self._empty(self.parts, slots, 0), [prompt] * self.parts,
        range(self.parts))
    return Prompt(rows, 0, slots)

  def _empty(self, rows: int, slots: int, index: int) -> Rows:
    """Makes empty rows, counted as a program."""
    return self._run(
        ("empty", rows, slots), empty, self.config, np.int32(index),
        rows=rows, slots=slots, cache_dtype=self._cache_dtype)


def _batches(items: Sequence, size: int) -> list[Sequence]:
  """Cuts `items` into parts of `size`, the last of which may be shorter."""
  return [items[i:i + size] for i in range(0, len(items), size)]
