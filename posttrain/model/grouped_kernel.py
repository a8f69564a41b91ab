"""Grouped matrix product (MegaBlocks), for mixtures of experts on TPUs.

`jax.lax.ragged_dot` is a kernel on a TPU, and so is its gradient for the rows.
The gradient for the matrices XLA computes as one dense product of all rows with
every group, which is as many times the work as there are groups, and rows in no
group are computed too. Here it is `tgmm`, JAX's kernel of MegaBlocks (arXiv
2211.15841), which visits the rows of each group only.

  M: rows  E: groups  D, F: sizes of a matrix
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

LANES = 128
# Tiles of the rows and of the matrix's two sides, which fit a core's 16 MiB.
TILES = (512, 1024, 1024)


def product(
    rows: jax.Array, matrices: jax.Array, sizes: jax.Array, *,
    interpret: bool = False,
) -> jax.Array:
  """Multiplies the rows of each group by the group's matrix.

  Args:
    rows: [M, D], sorted by group. matrices: [E, D, F].
    sizes: [E] int32, rows of each group; the rows behind them are in no group.
    interpret: run the gradient's kernel step by step, on any device.

  Returns:
    [M, F]; rows in no group are undefined.
  """
  return _product(interpret, rows, matrices, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(interpret, rows, matrices, sizes):
  """Computes `product`, with `_backward` as its gradient."""
  del interpret
  return jax.lax.ragged_dot(rows, matrices, group_sizes=sizes)


def _forward(interpret, rows, matrices, sizes):
  """Computes the product, and keeps what its gradient reads."""
  return _product(interpret, rows, matrices, sizes), (rows, matrices, sizes)


def _backward(interpret, residuals, cotangent):
  """Computes the gradients for the rows and for the matrices."""
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
  """Computes the gradient for the matrices: [E, D, F] in the rows' dtype."""
  # `tgmm` takes whole tiles of rows; those that are added are in no group.
  tile = min(TILES[0], -(-rows.shape[0] // LANES) * LANES)
  whole = lambda x: jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))
  rows, cotangent = whole(rows), whole(cotangent)
  return tgmm(
      rows.T, cotangent, sizes, preferred_element_type=rows.dtype,
      tiling=(tile, min(TILES[1], rows.shape[1]),
              min(TILES[2], cotangent.shape[1])), interpret=interpret)
