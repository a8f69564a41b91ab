"""KV cache: a ring of slots for all rows, as a pytree.

All rows write slot `index` at the same time, so that a step is one slice update
per layer, in place. If each row wrote where its own sequence ends, that would
be a scatter, which XLA turns into a rewrite of the whole cache. `positions`
says what a slot holds for a row: the token's position in its sequence, or -1
for nothing (a hole). A row whose prompt is shorter, or that retracted tokens,
has holes.

The slots are a ring: behind the last comes the first. A row owns the slots
before `index`, as far back as its first token. A new sequence may therefore
begin at any time (`insert`), whatever the other rows hold. The one condition is
that no sequence takes more than S slots.

Keys and values are kept in the compute dtype, or in int8: each head's vector
in a slot is then H 8-bit numbers and one float32, rounded once, when the token
is written.

  B: batch  S: slots  K: kv heads  H: head_dim  L: layers  T: new tokens
  A: rows to insert
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from posttrain.model import quantized
from posttrain.model.config import ModelConfig, check_sampling_dtype
from posttrain.sharding import shard, spec

# A head's slots lie side by side, as the products of attention read them. With
# heads inside of slots, a TPU and a CPU alike transpose the whole cache first.
KV_AXES = ("rows", "kv_heads", "slots", "head_dim")
POSITION_AXES = ("rows", "slots")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
  """Keys and values of one layer.

  Attributes:
    k, v: [B, K, S, H] in the compute dtype or int8.
    k_scale, v_scale: [B, K, S] float32, scales of int8; else None.
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None

  def write(self, k: jax.Array, v: jax.Array, index: jax.Array) -> "Layer":
    """Writes new keys and values [B, T, K, H] to the slots from `index` on."""
    new = stored(k, v, self.k.dtype)
    return jax.tree.map(
        lambda buffer, x: write_slots(buffer, x, index, axis=2), self, new)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """KV cache of every layer.

  One array a layer, not one of all layers: a cache that a scan carries over
  layers is copied in each step.

  Attributes:
    layers: L.
    positions: [B, S] int32, position of the token in each slot; -1: a hole.
    index: scalar int32 below S, the slot that every row's next token takes.
  """

  layers: tuple[Layer, ...]
  positions: jax.Array
  index: jax.Array

  @property
  def slots(self) -> int:
    """S."""
    return self.positions.shape[1]


def stored(k: jax.Array, v: jax.Array, dtype: Any) -> Layer:
  """Converts a layer's new keys and values, [B, T, K, H], to the cache's form.

  Returns:
    A `Layer` with T slots: [B, K, T, H] in `dtype`.
  """
  if dtype != jnp.int8:
    return Layer(*(heads_first(x).astype(dtype) for x in (k, v)))
  (k, k_scale), (v, v_scale) = (quantized.symmetric(x, (-1,)) for x in (k, v))
  return Layer(heads_first(k), heads_first(v), heads_first(k_scale),
               heads_first(v_scale))


def storage_dtype(config: ModelConfig, cache_dtype: str) -> Any:
  """Returns the dtype of keys and values for a `cache_dtype`.

  Raises:
    ValueError: it is not one of `SAMPLING_DTYPES`.
  """
  check_sampling_dtype("cache_dtype", cache_dtype)
  return jnp.dtype(config.dtype if cache_dtype == "compute" else cache_dtype)


def heads_first(x: jax.Array) -> jax.Array:
  """Swaps [B, T, K, ...] of a layer and [B, K, T, ...] of the cache."""
  return jnp.swapaxes(x, 1, 2)


def over_slots(
    function: Callable[..., jax.Array], *caches: KVCache, index: jax.Array,
) -> KVCache:
  """Maps a function over all arrays of caches that have slots.

  Args:
    function: (*arrays, *axes, fill=) -> array. It is given the same array of
      each cache, the array's logical axes, and the value of an empty slot.
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


def empty(
    config: ModelConfig, rows: int, slots: int, cache_dtype: str = "compute",
) -> KVCache:
  """Makes a cache in which every slot is a hole."""
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
  """Copies the last slots before `index`, as many as fit, to a ring of `slots`.

  They come first and in order; when the ring grows, holes follow.
  """
  kept = min(slots, cache.slots)

  def laid_out(x, *axes, fill):
    axis = axes.index("slots")
    # The oldest slot is the one at `index`: first roll it to the front.
    x = jnp.roll(x, -cache.index, axis=axis)
    x = jax.lax.slice_in_dim(x, cache.slots - kept, None, axis=axis)
    width = [(0, 0)] * x.ndim
    width[axis] = (0, slots - kept)
    return shard(jnp.pad(x, width, constant_values=fill), *axes)

  return over_slots(laid_out, cache, index=jnp.int32(kept % slots))


def insert(
    cache: KVCache, source: KVCache, source_rows: jax.Array,
    lengths: jax.Array, rows: jax.Array,
) -> KVCache:
  """Begins rows anew, in place, with the first tokens of rows elsewhere.

  Tokens are taken by their positions, so they may lie anywhere in `source`:
  behind holes, and around the end of a ring. In `cache` they are contiguous.

  Args:
    cache: donate it. What its other rows hold stays as it is.
    source: a cache in which row `source_rows[i]` holds each of the positions
      0 to `lengths[i]` - 1 once. They fit into `cache`.
    source_rows, lengths: [A] int32.
    rows: [A] int32, rows of `cache` to begin; one at or beyond B is dropped.
  """
  # The last token has to lie right before `index`, where the row goes on. Slot
  # s of the ring takes the token that is `ages[s]` tokens old; 0 is the last.
  ages = (cache.index - 1 - jnp.arange(cache.slots)) % cache.slots
  wanted = lengths[:, None] - 1 - ages  # [A, S] positions; below 0: a hole.
  held = source.positions.at[source_rows].get(out_sharding=spec(None, "slots"))
  # The slots of a row's tokens in order of their positions, behind its holes.
  order = jnp.argsort(held, axis=1)
  holes = jnp.sum(held < 0, axis=1, keepdims=True)
  taken = jnp.take_along_axis(
      order, jnp.maximum(wanted, 0) + holes, axis=1, mode="clip")

  def put(into, x, *axes, fill):
    axis = axes.index("slots")
    # The few source rows go to all devices, and each keeps those of its rows.
    x = x.at[source_rows].get(out_sharding=spec(None, *axes[1:]))
    x = jax.vmap(lambda row, at: jnp.take(
        row, at, axis=axis - 1, mode="clip"))(x, taken)
    # All slots of the row are written: what an earlier sequence left is gone.
    empty = jnp.expand_dims(wanted < 0, [a for a in range(1, x.ndim)
                                         if a != axis])
    return into.at[rows].set(
        jnp.where(empty, fill, x), mode="drop", out_sharding=spec(*axes))

  return over_slots(put, cache, source, index=cache.index)


def retract(cache: KVCache, lengths: jax.Array) -> KVCache:
  """Empties the slots of tokens at positions >= `lengths` [B] int32.

  Keys and values stay as they are: attention does not look at a hole.
  """
  kept = jnp.where(cache.positions < lengths[:, None], cache.positions, -1)
  return dataclasses.replace(cache, positions=kept)


def write_slots(
    buffer: jax.Array, new: jax.Array, index: jax.Array, axis: int = 1,
) -> jax.Array:
  """Writes `new` into `buffer` from `index` on, along `axis`, in place.

  They must not reach beyond the end: the update would be moved back, silently.
  """
  return jax.lax.dynamic_update_slice_in_dim(
      buffer, new.astype(buffer.dtype), index, axis=axis)
