"""Language-model head: float32 logits, whatever the hidden states' dtype.

A matrix unit multiplies bfloat16, and makes a float32 product
(`Precision.HIGHEST`) of six such products, of the parts of both factors. Hidden
states in bfloat16 are the first of their own parts and have no others: three
products, with those of the table, say the same.

  D: embed  V: vocabulary, padded
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Parts = tuple[jax.Array, ...]
# A head: [B, C, D] -> [B, C, V] float32; padded ids at a huge negative value.
Head = Callable[[jax.Array], jax.Array]


def product(x: jax.Array, table: jax.Array) -> jax.Array:
  """[..., D] times [D, V], float32."""
  return jnp.einsum(
      "...d,dv->...v", x.astype(jnp.float32), table.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST)


def parts_of(table: jax.Array) -> Parts:
  """bfloat16 arrays whose sum is the table, to its last bit."""
  rest = jax.lax.stop_gradient(table)
  if rest.dtype == jnp.bfloat16:
    return (rest,)
  parts = []
  for _ in range(3):  # Of 8 bits each; a float32 has 24.
    # A cast there and back XLA may leave out, as if nothing were rounded.
    part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
    parts.append(part.astype(jnp.bfloat16))
    rest = rest - part
  return tuple(parts)


@jax.custom_vjp
def product_of_parts(
    x: jax.Array, table: jax.Array, parts: Parts) -> jax.Array:
  """`product` of bfloat16 `x`, with gradients of single bfloat16 products.

  Args:
    x: [B, C, D] bfloat16.
    table: [D, V], which the gradient is of.
    parts: of the table.
  """
  del table
  # The smallest first: of a sum that begins with the largest they are lost.
  return functools.reduce(jnp.add, (
      jnp.einsum("bcd,dv->bcv", x, part, preferred_element_type=jnp.float32)
      for part in reversed(parts)))


def _forward(x, table, parts):
  return product_of_parts(x, table, parts), (x, table, parts)


def _backward(saved, cotangent):
  x, table, parts = saved
  cotangent = cotangent.astype(x.dtype)
  like = lambda operand: jax.typeof(operand).sharding.spec
  to_x = jnp.einsum(
      "bcv,dv->bcd", cotangent, parts[0], out_sharding=like(x))
  to_table = jnp.einsum(
      "bcd,bcv->dv", x, cotangent, out_sharding=like(table),
      preferred_element_type=jnp.float32)
  return to_x, to_table.astype(table.dtype), tuple(
      jnp.zeros_like(part) for part in parts)


product_of_parts.defvjp(_forward, _backward)
