"""One 32-bit number per array, computed where the array lives.

The sum, modulo 2^32, of the elements' bits, each times an odd number that
depends on its index. Integer sums do not depend on their order, so that every
mesh gives the same number; and a change of any one element changes it. It
finds damage, not malice.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


def of(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
  """Fingerprints by name.

  Args:
    arrays: global arrays of any shape; all on the same devices.
  """
  values = jax.device_get(fingerprints(list(arrays.values())))
  return {
      name: int(value) for name, value in zip(arrays, values, strict=True)}


@jax.jit
def fingerprints(arrays: list[jax.Array]) -> list[jax.Array]:
  """The compiled part of `of`."""
  return [_fingerprint(x) for x in arrays]


def _fingerprint(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    bits = x.astype(jnp.uint32)
  else:
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  index: jax.Array | np.uint32 = np.uint32(0)
  for axis, size in enumerate(x.shape):
    index = index * np.uint32(size) + jax.lax.broadcasted_iota(
        jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding)
  weight = (index * np.uint32(2654435761) << 1) | 1  # Odd: invertible.
  return jnp.sum(bits * weight, dtype=jnp.uint32)
