"""Fingerprints: one 32-bit number per array, computed where the array lives.

It is the sum, modulo 2^32, of the elements' bits, each times an odd number that
depends on its index. Integer sums do not depend on their order, so that every
mesh gives the same number; and a change of any one element changes it. It
finds damage, not malice.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


def of(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
  """Computes the fingerprints of arrays, by name.

  Args:
    arrays: global arrays of any shape; all on the same devices.
  """
  values = jax.device_get(fingerprints(list(arrays.values())))
  return {
      name: int(value) for name, value in zip(arrays, values, strict=True)}


@jax.jit
def fingerprints(arrays: list[jax.Array]) -> list[jax.Array]:
  """Computes the fingerprints of a list of arrays; the compiled part of `of`.
  """
  return [_fingerprint(x) for x in arrays]


def _fingerprint(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    bits = x.astype(jnp.uint32)
  else:
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  # The index is that in the global array, row by row, on every mesh.
  index: jax.Array | np.uint32 = np.uint32(0)
  for axis, size in enumerate(x.shape):
    index = index * np.uint32(size) + jax.lax.broadcasted_iota(
        jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding)
  # Knuth's multiplicative hash spreads neighbouring indices, so that swapped
  # elements change the sum. An odd number is invertible modulo 2^32, so that
  # no change of one element is multiplied away.
  weight = (index * np.uint32(2654435761) << 1) | 1
  return jnp.sum(bits * weight, dtype=jnp.uint32)
