"""Sums over the tokens that count.

  R: rows    T: length
"""

import jax
import jax.numpy as jnp


def masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Sums [R, T] `x` where [R, T] bool `mask` holds, to a float32 scalar.

  What is masked has no influence, in value or gradient, even if it is not
  finite.
  """
  return jnp.sum(jnp.where(mask, x, 0), dtype=jnp.float32)
