"""Attention, rotary positions (RoPE) and RMSNorm: arrays in, arrays out.

  B: batch  T: queries  S: keys  K: kv heads  G: query heads per kv head
  H: head_dim  D: embed

Tensor parallelism splits heads by kv head, so that a query head is always on
the device that has its keys. Softmax and norms are float32, whatever the
compute dtype.
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
  """Normalises x: `x / rms(x) * (offset + scale)` (RMSNorm, arXiv 1910.07467).

  Computed in float32, over the axes of `scale`, which are the last ones of x;
  returned in x's dtype.
  """
  x32 = x.astype(jnp.float32)
  axes = tuple(range(-scale.ndim, 0))
  mean_square = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
  normed = x32 * jax.lax.rsqrt(mean_square + eps)
  scale = scale.astype(jnp.float32)
  # Scaled in float32 and then cast, as in Gemma's code. That of Llama casts
  # first, which differs by a rounding in bfloat16 and not at all in float32.
  return (normed * (offset + scale if offset else scale)).astype(x.dtype)


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None,
) -> jax.Array:
  """Returns rotary frequencies [H/2] float32, radians per position.

  RoFormer, arXiv 2104.09864, section 3.2.2, with the stretch of a release.
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  found = theta**-exponent
  if scaling is None:
    return found
  stretched = found / scaling.factor
  if scaling.kind == "linear":
    return stretched
  # Llama 3 keeps frequencies that turn often within the original context, which
  # tell near positions apart, and stretches those that turn seldom.
  turns = scaling.original_context * found / (2 * jnp.pi)
  kept = jnp.clip((turns - scaling.low_freq_factor) / (
      scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
  return kept * found + (1 - kept) * stretched


def rope_tables(
    positions: jax.Array, frequencies: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines of the positions' angles: [B, T, H/2] float32."""
  angles = positions[..., None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the pairs (i, i + H/2) of x [B, T, ..., H] by `rope_tables`.

  This is the half-split form of Hugging Face's weights, not the interleaved
  pairs (2i, 2i + 1) of the paper.
  """
  cos, sin = rope
  middle = (1,) * (x.ndim - 3)
  cos = cos.reshape(*cos.shape[:2], *middle, cos.shape[-1])
  sin = sin.reshape(*sin.shape[:2], *middle, sin.shape[-1])
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
  """Soft-caps x: cap * tanh(x / cap); x itself for a cap of 0 (Gemma 2)."""
  return cap * jnp.tanh(x / cap) if cap else x


def causal_mask(
    positions: jax.Array, segment_ids: jax.Array,
    prefix_ids: jax.Array | None = None,
) -> jax.Array:
  """Makes the mask [B, T, T] bool of keys that each query reads.

  A key is read if it is of the query's segment or of its prefix, and not
  later. A query that is padding (segment 0) reads nothing.

  Args:
    positions, segment_ids: [B, T] int32.
    prefix_ids: see `same_segment`.
  """
  same = same_segment(
      segment_ids[:, :, None], segment_ids[:, None, :],
      None if prefix_ids is None else prefix_ids[:, :, None])
  earlier = positions[:, None, :] <= positions[:, :, None]
  return same & earlier & (segment_ids > 0)[:, :, None]


def same_segment(
    queries: jax.Array, keys: jax.Array, prefixes: jax.Array | None,
) -> jax.Array:
  """Returns bool, a key is of the query's segment or of its prefix.

  Args:
    queries, keys: segment ids, of shapes that broadcast.
    prefixes: the segment that each query reads besides its own, as where a
      group shares one copy of its prompt; or None.
  """
  own = queries == keys
  return own if prefixes is None else own | (prefixes == keys)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *,
    scale: float, softcap: float = 0.0, k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
  """Computes scaled dot-product attention with grouped queries (GQA).

  Args:
    q: [B, T, K, G, H]. k, v: [B, S, K, H]. mask: [B, T, S] bool.
    scale: of the scores.
    softcap: scores become cap * tanh(score / cap); 0: they do not.
    k_scale, v_scale: [B, K, S] float32, scales of int8 keys and values.

  Returns:
    [B, T, K, G, H] in q's dtype.
  """
  # Scales of int8 multiply the products in place of the keys and values, so
  # that a TPU reads the 8-bit numbers as they are and makes no float copy.
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
