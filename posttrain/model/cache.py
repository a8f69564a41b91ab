"""The KV cache: a plain pytree, passed in and returned.

All rows write slot `index` at the same time, so that a step is one in-place
slice update per layer rather than a scatter per row (which XLA turns into a
rewrite of the whole cache). What a slot holds for a row is told by
`positions`: the token's position in its row, or -1 for nothing. A row whose
prompt is shorter, or that took tokens back, simply has holes.

  B: batch  S: slots  K: kv heads  H: head_dim
"""

import dataclasses

import jax
import jax.numpy as jnp

from posttrain.sharding import shard, spec

KV_AXES = ("batch", "length", "kv_heads", "head_dim")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of every layer.

  Attributes:
    k, v: one [B, S, K, H] array per layer, in the compute dtype.
    positions: [B, S] int32, position of the token in each slot; -1: empty.
    index: scalar int32, the slot that the next token of every row takes.
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
      k=tuple(k), v=tuple(v), positions=occupied,
      index=jnp.int32(positions.shape[1]))


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
      positions=repeat(cache.positions, "batch", "length"))


def grow(cache: KVCache, slots: int) -> KVCache:
  """The same cache with empty slots appended up to `slots`."""
  extra = slots - cache.slots
  pad = lambda x, *axes: shard(
      jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2)), *axes)
  return dataclasses.replace(
      cache,
      k=tuple(pad(k, *KV_AXES) for k in cache.k),
      v=tuple(pad(v, *KV_AXES) for v in cache.v),
      positions=jnp.pad(
          cache.positions, ((0, 0), (0, extra)), constant_values=-1))


def retract(cache: KVCache, lengths: jax.Array) -> KVCache:
  """Empties the slots of tokens at positions >= `lengths` [B]."""
  kept = jnp.where(cache.positions < lengths[:, None], cache.positions, -1)
  return dataclasses.replace(cache, positions=kept)


def write_slot(buffer: jax.Array, new: jax.Array, index: jax.Array):
  """Puts [B, 1, ...] into slot `index` of [B, S, ...]."""
  return jax.lax.dynamic_update_slice_in_dim(
      buffer, new.astype(buffer.dtype), index, axis=1)
