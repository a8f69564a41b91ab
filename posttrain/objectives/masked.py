"""Sums over the tokens that count, and the supervised loss made of one.

A loss is a numerator and a denominator, never their quotient: both are added
over microbatches, packed rows and devices, and divided once.

  B: batch    T: length
"""

import jax
import jax.numpy as jnp


def masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum of [B, T] `x` where [B, T] bool `mask` holds, a float32 scalar.

  What is masked has no influence, in value or gradient, even if it is not
  finite.
  """
  return jnp.sum(jnp.where(mask, x, 0), dtype=jnp.float32)


def cross_entropy_sum(
    logprobs: jax.Array, loss_mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Negative log-likelihood of the target tokens, and their number.

  Args:
    logprobs: [B, T] float32, of the tokens that occurred.
    loss_mask: [B, T] bool.

  Returns:
    Numerator and denominator, float32 scalars; nats and tokens.
  """
  return -masked_sum(logprobs, loss_mask), masked_sum(
      jnp.ones_like(logprobs), loss_mask)
