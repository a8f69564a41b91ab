"""The KV cache: a plain pytree, passed in and returned.

All rows write slot `index` at the same time, so that a step is one in-place
slice update per layer rather than a scatter per row (which XLA turns into a
rewrite of the whole cache). What a slot holds for a row is told by
`positions`: the token's position in its row, or -1 for nothing. A row whose
prompt is shorter, or that took tokens back, simply has holes.

The slots are a ring: behind the last comes the first. A row owns the slots
behind `index` as far back as its first token, so a new row may begin at any
time (`insert`), whatever the others hold, and rows come and go for ever. All
that is asked is that no row lives for more than S slots.

  B: batch  S: slots  K: kv heads  H: head_dim  A: rows to insert
"""

import dataclasses

import jax
import jax.numpy as jnp

from posttrain.model.config import ModelConfig
from posttrain.sharding import shard, spec

# A head's slots lie side by side, as the products of attention read them: with
# heads inside of slots, a TPU and a CPU alike would first turn the cache round.
KV_AXES = ("rows", "kv_heads", "slots", "head_dim")
POSITION_AXES = ("rows", "slots")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of every layer.

  Attributes:
    k, v: one [B, K, S, H] array per layer, in the compute dtype.
    positions: [B, S] int32, position of the token in each slot; -1: empty.
    index: scalar int32 below S, the slot that every row's next token takes.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  positions: jax.Array
  index: jax.Array

  @property
  def slots(self) -> int:
    return self.positions.shape[1]


def from_prefill(k: jax.Array, v: jax.Array, positions: jax.Array,
                 segment_ids: jax.Array) -> KVCache:
  """A full cache from the stacked keys and values [L, B, T, K, H]."""
  occupied = jnp.where(segment_ids > 0, positions, -1)
  return KVCache(
      k=tuple(map(heads_first, k)), v=tuple(map(heads_first, v)),
      positions=occupied, index=jnp.int32(0))


def heads_first(x: jax.Array) -> jax.Array:
  """[B, T, K, H] as a layer makes it -> [B, K, T, H] as the cache has it.

  And back.
  """
  return jnp.swapaxes(x, 1, 2)


def fan_out(cache: KVCache, group_size: int) -> KVCache:
  """Repeats each row `group_size` times: [P, ...] -> [P * G, ...], locally."""
  def repeat(x, *axes):
    rows = (x.shape[0], group_size, *x.shape[1:])
    x = jnp.broadcast_to(x[:, None], rows)
    return jax.lax.reshape(
        x, (rows[0] * group_size, *rows[2:]), out_sharding=spec(*axes))

  return dataclasses.replace(
      cache,
      k=tuple(repeat(k, *KV_AXES) for k in cache.k),
      v=tuple(repeat(v, *KV_AXES) for v in cache.v),
      positions=repeat(cache.positions, *POSITION_AXES))


def empty(config: ModelConfig, rows: int, slots: int) -> KVCache:
  """A cache of which every slot is a hole."""
  shape = (rows, config.kv_heads, slots, config.head_dim)
  zeros = lambda: tuple(
      jnp.zeros(shape, config.dtype, out_sharding=spec(*KV_AXES))
      for _ in range(config.layers))
  return KVCache(
      k=zeros(), v=zeros(),
      positions=jnp.full(
          (rows, slots), -1, jnp.int32, out_sharding=spec(*POSITION_AXES)),
      index=jnp.int32(0))


def resize(cache: KVCache, slots: int) -> KVCache:
  """The last slots behind `index`, as many as fit, in a ring of `slots`.

  They come first and in order; when the ring grows, holes follow.
  """
  kept = min(slots, cache.slots)

  def laid_out(x, *axes, fill=0):
    axis = axes.index("slots")
    x = jnp.roll(x, -cache.index, axis=axis)
    x = jax.lax.slice_in_dim(x, cache.slots - kept, None, axis=axis)
    width = [(0, 0)] * x.ndim
    width[axis] = (0, slots - kept)
    return shard(jnp.pad(x, width, constant_values=fill), *axes)

  return KVCache(
      k=tuple(laid_out(k, *KV_AXES) for k in cache.k),
      v=tuple(laid_out(v, *KV_AXES) for v in cache.v),
      positions=laid_out(cache.positions, *POSITION_AXES, fill=-1),
      index=jnp.int32(kept % slots))


def insert(
    cache: KVCache, source: KVCache, rows: jax.Array, ends: jax.Array,
    slots: jax.Array,
) -> KVCache:
  """Begins rows anew, in place, from what rows of another cache hold.

  Args:
    cache: donate it. What its other rows hold stays as it is.
    source: of which row `rows[i]` ends right before slot `ends[i]`. It has
      not gone round, and what it holds fits into `cache`.
    rows, ends: [A] int32.
    slots: [A] int32, rows of `cache`; at or beyond B: inserts nothing.
  """
  # Slot s holds what is `ages[s]` tokens old; 0 is the last token's.
  ages = (cache.index - 1 - jnp.arange(cache.slots)) % cache.slots
  taken = ends[:, None] - 1 - ages  # [A, S] slots of the source.

  def put(into, x, *axes, fill=0):
    axis = axes.index("slots")
    x = x.at[rows].get(out_sharding=spec(None, *axes[1:]))
    x = jax.vmap(lambda row, at: jnp.take(
        row, at, axis=axis - 1, mode="clip"))(x, taken)
    holes = jnp.expand_dims(taken < 0, [a for a in range(1, x.ndim)
                                        if a != axis])
    return into.at[slots].set(
        jnp.where(holes, fill, x), mode="drop", out_sharding=spec(*axes))

  return KVCache(
      k=tuple(put(a, b, *KV_AXES)
              for a, b in zip(cache.k, source.k, strict=True)),
      v=tuple(put(a, b, *KV_AXES)
              for a, b in zip(cache.v, source.v, strict=True)),
      positions=put(
          cache.positions, source.positions, *POSITION_AXES, fill=-1),
      index=cache.index)


def retract(cache: KVCache, lengths: jax.Array) -> KVCache:
  """Empties the slots of tokens at positions >= `lengths` [B]."""
  kept = jnp.where(cache.positions < lengths[:, None], cache.positions, -1)
  return dataclasses.replace(cache, positions=kept)


def write_slots(
    buffer: jax.Array, new: jax.Array, index: jax.Array, axis: int = 1,
) -> jax.Array:
  """Puts T columns, [B, T, ...], into those of [B, S, ...] from `index` on."""
  return jax.lax.dynamic_update_slice_in_dim(
      buffer, new.astype(buffer.dtype), index, axis=axis)
