"""Attention, rotary positions and RMSNorm: arrays in, arrays out.

  B: batch  T: queries  S: keys  K: kv heads  G: query heads per kv head
  H: head_dim  D: embed

Heads are split over "tensor" by kv head, so that a query head never leaves
its keys. Softmax and norms are float32 whatever the compute dtype.
"""

import jax
import jax.numpy as jnp

from posttrain.sharding import spec

# Finite, so that a row without a single visible key (padding) gives a uniform
# average rather than NaN; such rows are masked out of every loss.
MASKED = -1e30


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """`x / rms(x) * scale` over the last axis, in float32, in x's dtype."""
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(mean_square + eps)
  return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def rope_tables(
    positions: jax.Array, head_dim: int, theta: float,
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines [B, T, H/2], float32 (RoFormer, arXiv 2104.09864)."""
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  angles = positions[..., None].astype(jnp.float32) * theta**-exponent
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


def causal_mask(
    positions: jax.Array, segment_ids: jax.Array,
) -> jax.Array:
  """[B, T, T] bool: same segment, not padding, not later."""
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  earlier = positions[:, None, :] <= positions[:, :, None]
  return same & earlier & (segment_ids > 0)[:, :, None]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array,
) -> jax.Array:
  """Scaled dot-product attention with grouped queries.

  Args:
    q: [B, T, K, G, H]. k, v: [B, S, K, H]. mask: [B, T, S] bool.

  Returns:
    [B, T, K, G, H] in q's dtype.
  """
  scale = q.shape[-1] ** -0.5
  scores = jnp.einsum(
      "btkgh,bskh->bkgts", q * scale, k, preferred_element_type=jnp.float32)
  scores = jnp.where(mask[:, None, None], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
  return jnp.einsum(
      "bkgts,bskh->btkgh", weights, v,
      out_sharding=spec("batch", "length", "kv_heads", "groups", "head_dim"))
