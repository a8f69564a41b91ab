"""A product of each group's rows with its own matrix, for training on TPUs.

`jax.lax.ragged_dot` is a kernel there, and so is its gradient of the rows. That
of the matrices XLA writes as one dense product of all rows with every group: as
many times the work as there are groups, and again for rows in none. Here it is
`tgmm`, JAX's kernel of MegaBlocks (arXiv 2211.15841), which visits the rows of
each group.

  M: rows  E: groups  D, F: sizes of a matrix
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

LANES = 128
# Rows, and the two sides of a matrix: what fits into a core's 16 MiB.
TILES = (512, 1024, 1024)


def product(
    rows: jax.Array, matrices: jax.Array, sizes: jax.Array, *,
    interpret: bool = False,
) -> jax.Array:
  """[M, F], the rows of each group times its matrix; of no group: anything.

  Args:
    rows: [M, D], sorted by group. matrices: [E, D, F].
    sizes: [E] int32, rows of each group; those behind them are of none.
    interpret: run the gradient's kernel step by step, on any device.
  """
  return _product(interpret, rows, matrices, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(interpret, rows, matrices, sizes):
  del interpret
  return jax.lax.ragged_dot(rows, matrices, group_sizes=sizes)


def _forward(interpret, rows, matrices, sizes):
  return _product(interpret, rows, matrices, sizes), (rows, matrices, sizes)


def _backward(interpret, residuals, cotangent):
  rows, matrices, sizes = residuals
  d_rows = jax.lax.ragged_dot(
      cotangent, jnp.swapaxes(matrices, 1, 2), group_sizes=sizes)
  return d_rows, _of_matrices(
      rows, cotangent, sizes, interpret=interpret), None


_product.defvjp(_forward, _backward)


def _of_matrices(
    rows: jax.Array, cotangent: jax.Array, sizes: jax.Array, *,
    interpret: bool,
) -> jax.Array:
  """[E, D, F], in the dtype of the rows."""
  tile = min(TILES[0], -(-rows.shape[0] // LANES) * LANES)
  whole = lambda x: jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))
  rows, cotangent = whole(rows), whole(cotangent)
  return tgmm(
      rows.T, cotangent, sizes, preferred_element_type=rows.dtype,
      tiling=(tile, min(TILES[1], rows.shape[1]),
              min(TILES[2], cotangent.shape[1])), interpret=interpret)
