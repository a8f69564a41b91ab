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

Keys and values are kept in the compute dtype, or in int8: each head's vector
in a slot is then 8-bit numbers and one float32, written once and never
rounded again.

  B: batch  S: slots  K: kv heads  H: head_dim  A: rows to insert
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from posttrain.model import quantized
from posttrain.model.config import ModelConfig, check_sampling_dtype
from posttrain.sharding import shard, spec

# A head's slots lie side by side, as the products of attention read them: with
# heads inside of slots, a TPU and a CPU alike would first turn the cache round.
KV_AXES = ("rows", "kv_heads", "slots", "head_dim")
POSITION_AXES = ("rows", "slots")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
  """Keys and values of one layer.

  Attributes:
    k, v: [B, K, S, H] in the compute dtype or int8.
    k_scale, v_scale: [B, K, S] float32, which int8 is multiplied by; else
      None.
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None

  def write(self, k: jax.Array, v: jax.Array, index: jax.Array) -> "Layer":
    """Puts new keys and values [B, T, K, H] into the slots from `index`."""
    new = stored(k, v, self.k.dtype)
    return jax.tree.map(
        lambda buffer, x: write_slots(buffer, x, index, axis=2), self, new)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of every layer.

  Attributes:
    layers: one after the other.
    positions: [B, S] int32, position of the token in each slot; -1: empty.
    index: scalar int32 below S, the slot that every row's next token takes.
  """

  layers: tuple[Layer, ...]
  positions: jax.Array
  index: jax.Array

  @property
  def slots(self) -> int:
    return self.positions.shape[1]


def stored(k: jax.Array, v: jax.Array, dtype: Any) -> Layer:
  """Keys and values [B, T, K, H], as a layer makes them, to [B, K, T, H]."""
  if dtype != jnp.int8:
    return Layer(*(heads_first(x).astype(dtype) for x in (k, v)))
  (k, k_scale), (v, v_scale) = (quantized.symmetric(x, (-1,)) for x in (k, v))
  return Layer(heads_first(k), heads_first(v), heads_first(k_scale),
               heads_first(v_scale))


def storage_dtype(config: ModelConfig, cache_dtype: str) -> Any:
  """Of `k` and `v`, for a `cache_dtype` of `SAMPLING_DTYPES`."""
  check_sampling_dtype("cache_dtype", cache_dtype)
  return jnp.dtype(config.dtype if cache_dtype == "compute" else cache_dtype)


def from_prefill(k: jax.Array, v: jax.Array, positions: jax.Array,
                 segment_ids: jax.Array, dtype: Any) -> KVCache:
  """A full cache from the stacked keys and values [L, B, T, K, H]."""
  occupied = jnp.where(segment_ids > 0, positions, -1)
  layers = tuple(
      stored(*each, dtype) for each in zip(k, v, strict=True))
  return KVCache(layers, occupied, jnp.int32(0))


def heads_first(x: jax.Array) -> jax.Array:
  """[B, T, K, ...] as a layer makes it -> [B, K, T, ...] as the cache has it.

  And back.
  """
  return jnp.swapaxes(x, 1, 2)


def over_slots(
    function: Callable[..., jax.Array], *caches: KVCache, index: jax.Array,
) -> KVCache:
  """A cache of `function(*arrays, *axes, fill=)` of all that has slots.

  Args:
    function: is given the same array of each cache, its logical axes and
      what an empty slot of it holds.
    caches: of the same dtypes.
    index: of the result.
  """
  def each(*arrays):
    axes = KV_AXES[:arrays[0].ndim]  # A scale has none of "head_dim".
    return function(*arrays, *axes, fill=0)

  return KVCache(
      jax.tree.map(each, *(cache.layers for cache in caches)),
      function(*(cache.positions for cache in caches), *POSITION_AXES,
               fill=-1), index)


def fan_out(cache: KVCache, group_size: int) -> KVCache:
  """Repeats each row `group_size` times: [P, ...] -> [P * G, ...], locally."""
  def repeat(x, *axes, fill):
    rows = (x.shape[0], group_size, *x.shape[1:])
    x = jnp.broadcast_to(x[:, None], rows)
    return jax.lax.reshape(
        x, (rows[0] * group_size, *rows[2:]), out_sharding=spec(*axes))

  return over_slots(repeat, cache, index=cache.index)


def empty(
    config: ModelConfig, rows: int, slots: int, cache_dtype: str = "compute",
) -> KVCache:
  """A cache of which every slot is a hole."""
  dtype = storage_dtype(config, cache_dtype)
  shape = (rows, config.kv_heads, slots, config.head_dim)

  def zeros(dtype, ndim):
    return jnp.zeros(shape[:ndim], dtype, out_sharding=spec(*KV_AXES[:ndim]))

  def layer():
    numbers = [zeros(dtype, 4) for _ in "kv"]
    scales = [zeros(jnp.float32, 3) for _ in "kv" if dtype == jnp.int8]
    return Layer(*numbers, *scales)

  return KVCache(
      tuple(layer() for _ in range(config.layers)),
      jnp.full((rows, slots), -1, jnp.int32,
               out_sharding=spec(*POSITION_AXES)), jnp.int32(0))


def resize(cache: KVCache, slots: int) -> KVCache:
  """The last slots behind `index`, as many as fit, in a ring of `slots`.

  They come first and in order; when the ring grows, holes follow.
  """
  kept = min(slots, cache.slots)

  def laid_out(x, *axes, fill):
    axis = axes.index("slots")
    x = jnp.roll(x, -cache.index, axis=axis)
    x = jax.lax.slice_in_dim(x, cache.slots - kept, None, axis=axis)
    width = [(0, 0)] * x.ndim
    width[axis] = (0, slots - kept)
    return shard(jnp.pad(x, width, constant_values=fill), *axes)

  return over_slots(laid_out, cache, index=jnp.int32(kept % slots))


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

  def put(into, x, *axes, fill):
    axis = axes.index("slots")
    x = x.at[rows].get(out_sharding=spec(None, *axes[1:]))
    x = jax.vmap(lambda row, at: jnp.take(
        row, at, axis=axis - 1, mode="clip"))(x, taken)
    holes = jnp.expand_dims(taken < 0, [a for a in range(1, x.ndim)
                                        if a != axis])
    return into.at[slots].set(
        jnp.where(holes, fill, x), mode="drop", out_sharding=spec(*axes))

  return over_slots(put, cache, source, index=cache.index)


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
