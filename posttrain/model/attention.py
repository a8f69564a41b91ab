"""Attention, rotary positions and RMSNorm: arrays in, arrays out.

  B: batch  T: queries  S: keys  K: kv heads  G: query heads per kv head
  H: head_dim  D: embed

Heads are split over "tensor" by kv head, so that a query head never leaves
its keys. Softmax and norms are float32 whatever the compute dtype.
"""

import jax
import jax.numpy as jnp

from posttrain.model.config import RopeScaling

# Finite, so that a row without a single visible key (padding) gives a uniform
# average rather than NaN; such rows are masked out of every loss.
MASKED = -1e30


def rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0,
) -> jax.Array:
  """`x / rms(x) * (offset + scale)` over the axes of `scale`, the last ones.

  Computed in float32, returned in x's dtype (arXiv 1910.07467).
  """
  x32 = x.astype(jnp.float32)
  axes = tuple(range(-scale.ndim, 0))
  mean_square = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
  normed = x32 * jax.lax.rsqrt(mean_square + eps)
  scale = scale.astype(jnp.float32)
  return (normed * (offset + scale if offset else scale)).astype(x.dtype)


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None,
) -> jax.Array:
  """[H/2] float32 radians per position (RoFormer, arXiv 2104.09864)."""
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  found = theta**-exponent
  if scaling is None:
    return found
  stretched = found / scaling.factor
  if scaling.kind == "linear":
    return stretched
  # Llama 3: turns within the original context decide how much is kept.
  turns = scaling.original_context * found / (2 * jnp.pi)
  kept = jnp.clip((turns - scaling.low_freq_factor) / (
      scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
  return kept * found + (1 - kept) * stretched


def rope_tables(
    positions: jax.Array, frequencies: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines [B, T, H/2], float32."""
  angles = positions[..., None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the pairs (i, i + H/2) of [B, T, ..., H] (the half-split form)."""
  cos, sin = rope
  middle = (1,) * (x.ndim - 3)
  cos = cos.reshape(*cos.shape[:2], *middle, cos.shape[-1])
  sin = sin.reshape(*sin.shape[:2], *middle, sin.shape[-1])
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
  """cap * tanh(x / cap); x itself for a cap of 0."""
  return cap * jnp.tanh(x / cap) if cap else x


def causal_mask(
    positions: jax.Array, segment_ids: jax.Array,
    prefix_ids: jax.Array | None = None,
) -> jax.Array:
  """[B, T, T] bool: same segment or the query's prefix, not padding or later.
  """
  same = same_segment(
      segment_ids[:, :, None], segment_ids[:, None, :],
      None if prefix_ids is None else prefix_ids[:, :, None])
  earlier = positions[:, None, :] <= positions[:, :, None]
  return same & earlier & (segment_ids > 0)[:, :, None]


def same_segment(
    queries: jax.Array, keys: jax.Array, prefixes: jax.Array | None,
) -> jax.Array:
  """Whether a key is of the query's segment, or of that which it goes on from.

  Args:
    queries, keys: segment ids, of shapes that broadcast.
    prefixes: the segment that each query sees beside its own, or None.
  """
  own = queries == keys
  return own if prefixes is None else own | (prefixes == keys)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *,
    scale: float, softcap: float = 0.0, k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
  """Scaled dot-product attention with grouped queries.

  Args:
    q: [B, T, K, G, H]. k, v: [B, S, K, H]. mask: [B, T, S] bool.
    scale: of the scores.
    softcap: scores become cap * tanh(score / cap); 0: they do not.
    k_scale, v_scale: [B, K, S] float32, of int8 keys and values: they
      multiply the products, so that the numbers go into these as they are.

  Returns:
    [B, T, K, G, H] in q's dtype.
  """
  per_key = lambda x, scales: x if scales is None else (
      x * scales[:, :, None, None])
  scores = per_key(jnp.einsum(
      "btkgh,bskh->bkgts", q * scale, k.astype(q.dtype),
      preferred_element_type=jnp.float32), k_scale)
  scores = soft_cap(scores, softcap)
  scores = jnp.where(mask[:, None, None], scores, MASKED)
  weights = per_key(jax.nn.softmax(scores, axis=-1), v_scale).astype(q.dtype)
  return jnp.einsum(
      "bkgts,bskh->btkgh", weights, v.astype(q.dtype),
      out_sharding=jax.typeof(q).sharding.spec)
