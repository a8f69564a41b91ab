"""Chunked prefill with prefix caching: what is cached is not computed again.

Prompts go through the model R at a time and C tokens at a time, over a KV cache
of their own, behind what the prefix cache has of them. From there a prompt's
keys and values are copied to the row of each of its samples, so the group
shares one prefill of its prompt. A batch is placed before the next one is
prefilled, and the next one may go on from it: prompts that share a prefix need
no more forward passes than if the prefix had been computed alone before them.

  R: prompts prefilled together  C: tokens of a chunk  S: cache slots
  D: embed  A: rows copied at once
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from posttrain import sharding
from posttrain.model import cache as kv
from posttrain.model.block import Block
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.sampler.prefix_cache import Entry, PrefixCache, Tokens
from posttrain.sampler.requests import Settings
from posttrain.sharding import spec


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
    into: Rows, source: Rows, source_rows: jax.Array, lengths: jax.Array,
    rows: jax.Array,
) -> Rows:
  """Copies the first tokens of rows of `source` to rows of `into`, in place.

  Args:
    into: donated.
    source: rows to copy, with the hidden state of each.
    source_rows, lengths, rows: [A] int32, see `cache.insert`.
  """
  # One at a time: all together would be on each device twice over, at the
  # ring's length. It is also faster, on a CPU by four times.
  def copy(i, into):
    at, length, row = (jax.lax.dynamic_slice_in_dim(x, i, 1)
                    for x in (source_rows, lengths, rows))
    hidden = source.hidden.at[at].get(out_sharding=spec(None, "act_embed"))
    return Rows(
        kv.insert(into.cache, source.cache, at, length, row),
        into.hidden.at[row].set(
            hidden, mode="drop", out_sharding=spec("rows", "act_embed")))

  used = jnp.sum(rows < into.hidden.shape[0])
  return jax.lax.fori_loop(0, used, copy, into)


@dataclasses.dataclass(frozen=True)
class Prefix:
  """The first `length` tokens of row `row` of `rows`."""

  rows: Rows
  row: int
  length: int


class Prefill:
  """Prefills prompts, and keeps sequences in a prefix cache.

  Attributes:
    rows: R, rounded up to what the mesh divides.
    parts: parts of the mesh that rows are split over.
    cache: the sequences that are cached.
    tokens: prompt tokens computed so far; a shared one counts once.
    positions: positions that the programs computed so far, padding included.
  """

  def __init__(
      self, config: ModelConfig, settings: Settings, run: Callable[..., Rows],
  ):
    """Makes a prefill with an empty prefix cache.

    Args:
      config: of the model.
      settings: of the engine.
      run: calls a jitted function: run(key, function, *args, **kwargs).
    """
    self.config, self.settings, self._run = config, settings, run
    self.chunk, self.parts = settings.prefill_chunk, sharding.axis_size("rows")
    self.rows = -(-settings.prefill_rows // self.parts) * self.parts
    self.cache = PrefixCache(settings.prefix_cache_tokens)
    self.tokens = self.positions = 0

  def admit(
      self, model: Transformer, blocks: list[Block], into: Rows,
      prompts: Mapping[int, Tokens], upcoming: Sequence[Tokens],
  ) -> Rows:
    """Prefills prompts, and copies each to its row of `into`.

    Args:
      model, blocks: as `decode.unstacked` makes them.
      into: donated.
      prompts: a prompt by the row that it begins.
      upcoming: prompts that are admitted next; what is cached of them stays.
    """
    rows_of: dict[Tokens, list[int]] = {}
    for row, prompt in prompts.items():
      rows_of.setdefault(prompt, []).append(row)

    def begin(into: Rows, entries: Iterable[Entry]) -> Rows:
      # All samples of a prompt begin with a copy of it.
      copies = [(_first(entry, len(entry.tokens)), row) for entry in entries
                for row in rows_of[entry.tokens]]
      return self.place(into, copies)

    found = {prompt: self._prefix(prompt) for prompt in rows_of}
    into = begin(into, [
        self.cache.use(entry) for prompt, (entry, same) in found.items()
        if entry and same == len(prompt)])
    new = [p for p, (_, same) in found.items() if same < len(p)]
    for batch in _batches(new, self.rows):
      # What only the batch before needed goes before this one takes memory.
      self.trim([*batch, *upcoming])
      into = begin(into, self._batch(model, blocks, batch))
    self.trim(upcoming)
    return into

  def keep(
      self, source: Rows, sequences: Sequence[tuple[int, Tokens]],
      upcoming: Sequence[Tokens],
  ) -> None:
    """Copies sequences that have ended to the prefix cache.

    One that the cache covers already is not copied, and one that is larger than
    its budget is evicted at once.

    Args:
      source: the rows that hold them.
      sequences: pairs of a row, and its tokens that have keys and values.
      upcoming: see `admit`.
    """
    new = [each for each in sequences
           if self.cache.find(each[1])[1] < len(each[1])]
    # Of like lengths together: the slots of a block are those of its longest.
    new.sort(key=lambda each: len(each[1]))
    for part in _batches(new, self.parts):
      slots = self.settings.prefill_sizes(len(part[-1][1]))[-1]
      if self.parts * slots > self.cache.budget:
        self.cache.evicted += sum(len(tokens) for _, tokens in part)
        continue
      self.trim(upcoming, room=self.parts * slots)
      rows = self.place(self._empty(self.parts, slots, 0), [
          (Prefix(source, row, len(tokens)), i)
          for i, (row, tokens) in enumerate(part)])
      # The hidden state has gone: a row that is done feeds something else.
      self.cache.add(rows, self.parts * slots, [
          (i, tokens, False) for i, (_, tokens) in enumerate(part)])

  def trim(self, upcoming: Iterable[Tokens], room: int = 0) -> None:
    """Evicts down to the budget, but for what these prompts go on from."""
    found = (self._prefix(prompt)[0] for prompt in upcoming)
    self.cache.trim([entry for entry in found if entry], room)

  def place(
      self, into: Rows, copies: Sequence[tuple[Prefix, int]],
  ) -> Rows:
    """Copies prefixes to rows of `into`.

    Args:
      into: donated.
      copies: pairs of a prefix, and the row that it begins.
    """
    by_rows: dict[int, list[tuple[Prefix, int]]] = {}
    for prefix, row in copies:
      by_rows.setdefault(id(prefix.rows), []).append((prefix, row))
    total = into.hidden.shape[0]
    for same in by_rows.values():
      columns = np.zeros((3, total), np.int32)
      # Those that are not copied are marked by a row beyond the last, so that
      # one program serves any number.
      columns[2] = total
      for i, (prefix, row) in enumerate(same):
        columns[:, i] = prefix.row, prefix.length, row
      source = same[0][0].rows
      into = self._run(
          ("place", total, into.cache.slots, source.hidden.shape[0],
           source.cache.slots), place, into, source, *columns)
    return into

  def _prefix(self, prompt: Tokens) -> tuple[Entry | None, int]:
    """Finds the entry that a prompt goes on from, and how many tokens it has.

    All of them, if the entry has the hidden state that draws the next token;
    else one token at least is left to compute. An entry is used where that
    saves a forward pass, or if it is used whole, as by a continuation.
    """
    entry, same = self.cache.find(prompt)
    if entry and entry.tokens == prompt and entry.hidden:
      return entry, same
    same = min(same, len(prompt) - 1)
    if not entry or not same:
      return None, 0
    passes = lambda tokens: -(-tokens // self.chunk)
    saved = passes(len(prompt)) - passes(len(prompt) - same)
    whole = entry.tokens == prompt[:len(entry.tokens)]
    return (entry, same) if saved or whole else (None, 0)

  def _batch(
      self, model: Transformer, blocks: list[Block], prompts: Sequence[Tokens],
  ) -> list[Entry]:
    """Prefills up to R prompts behind what is cached of them."""
    found = [self._prefix(prompt) for prompt in prompts]
    chunks = max(-(-(len(p) - same) // self.chunk)
                 for p, (_, same) in zip(prompts, found, strict=True))
    slots = self.settings.prefill_sizes(max(map(len, prompts)))[-1]
    # Where rows need more chunks than others, these may have a part of their
    # prefix computed again: that is cheaper than a larger cache for all rows.
    most = slots - chunks * self.chunk
    used = [min(same, most) for _, same in found]
    # Every prefix ends before slot `begin`, the longest one's length, so that
    # the tokens behind it are written to the same slots in all rows. A shorter
    # prefix has holes on its left.
    rows = self.place(self._empty(self.rows, slots, max(used)), [
        (_first(self.cache.use(entry), length), i)
        for i, ((entry, _), length) in enumerate(zip(found, used, strict=True))
        if entry and length])
    tokens = np.zeros((self.rows, chunks * self.chunk), np.int32)
    positions = np.full_like(tokens, -1)
    for i, (prompt, same) in enumerate(zip(prompts, used, strict=True)):
      tokens[i, :len(prompt) - same] = prompt[same:]
      positions[i, :len(prompt) - same] = np.arange(same, len(prompt))
    for at in range(0, tokens.shape[1], self.chunk):
      put = lambda x, at=at: sharding.put(
          x[:, at:at + self.chunk], "rows", "slots")
      rows = self._run(("prefill", self.rows, slots), feed, model, blocks,
                       rows, put(tokens), put(positions))
    self.tokens += int((positions >= 0).sum())
    self.positions += positions.size
    return self.cache.add(rows, self.rows * slots, [
        (i, prompt, True) for i, prompt in enumerate(prompts)])

  def _empty(self, rows: int, slots: int, index: int) -> Rows:
    """Makes empty rows, counted as a program."""
    return self._run(
        ("empty", rows, slots), empty, self.config, np.int32(index),
        rows=rows, slots=slots, cache_dtype=self.settings.cache_dtype)


def _first(entry: Entry, length: int) -> Prefix:
  """Returns the first `length` tokens of an entry."""
  return Prefix(entry.block.rows, entry.row, length)


def _batches(items: Sequence, size: int) -> list[Sequence]:
  """Cuts `items` into parts of `size`, the last of which may be shorter."""
  return [items[i:i + size] for i in range(0, len(items), size)]
