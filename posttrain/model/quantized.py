"""Quantisation of a block's matrices to 8 or 4 bits at rest, through qwix.

A matrix is cut into blocks of 64 numbers along its embed axis, each with a
float32 scale: 8.5 or 4.5 bits a number (QLoRA, arXiv 2305.14314, section 3,
without the double quantisation of the scales). Every matrix has that axis, and
it is whole wherever a weight is used, so that no block is split between
devices. Two numbers of 4 bits share a byte, on every backend.

In the module a quantised matrix `q` has a `q_scale` next to it, and
`ModelConfig.quantized` names the kind. Functions here see one layer.

The sampler's int8 has another form: one float32 scale for each output of a
matrix (`per_output`), named `q_channels`. It multiplies the product, so that
the product reads the 8-bit numbers, as a TPU can.

  D: embed   the other axes of a matrix are as in `block`
"""

import functools
import math
from types import ModuleType

import jax
import jax.numpy as jnp

from posttrain import sharding
from posttrain.model.config import MATRIX_AXES

BLOCK = 64
SCALE, CHANNELS = "_scale", "_channels"
HIGH = 127  # The largest 8-bit number of `symmetric`; -128 is not used.


def embed_axis(name: str) -> int:
  """Returns the axis of D in the matrix of this name, from the end."""
  axes = MATRIX_AXES[name]
  return axes.index("embed") - len(axes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize_stack(
    w: jax.Array, name: str, kind: str) -> tuple[jax.Array, jax.Array]:
  """Quantises a matrix of all layers, [L, ...]; see `quantize`."""
  return jax.lax.map(lambda w: quantize(w, kind, embed_axis(name)), w)


@functools.partial(jax.jit, static_argnums=(2, 3))
def dequantize_stack(
    values: jax.Array, scale: jax.Array, name: str, kind: str) -> jax.Array:
  """Dequantises a matrix of all layers to float32, laid out as `values`."""
  def layer(stored):
    values, scale = stored
    w = dequantize(values, scale, kind, embed_axis(name), jnp.float32)
    return jax.sharding.reshard(w, jax.typeof(values).sharding.spec)

  return jax.lax.map(layer, (values, scale))


def quantize(
    w: jax.Array, kind: str, axis: int) -> tuple[jax.Array, jax.Array]:
  """Quantises one layer's matrix, sharded at rest.

  Args:
    w: floating point, D at `axis`.
    kind: "int8", "int4" or "nf4".

  Returns:
    Values, int8 [.., D, ..] or uint8 [.., D/2, ..], laid out as `w`; and
    scales, float32 [.., D/block, ..], whole along D where the mesh does not
    divide them.

  Raises:
    ValueError: the mesh does not divide the values, or qwix is missing.
  """
  qwix, size = _qwix(kind), w.shape[axis]
  stored, parts = size if kind == "int8" else size // 2, sharding.axis_size(
      "embed")
  if stored % parts or size % 2:
    key = " * ".join(f"mesh.{name}" for name in sharding.mesh_axes("embed"))
    raise ValueError(
        f"compute.frozen_dtype={kind!r} keeps the model's embed={size} in "
        f"{stored} bytes a row, which {key}={parts} does not divide. Use a "
        "smaller mesh.fsdp, or int8.")
  tile = {axis % w.ndim: math.gcd(size, BLOCK)}
  channels = [a for a in range(w.ndim) if a not in tile]

  def local(w):
    found = qwix.quantize(
        w.astype(jnp.float32), kind, channelwise_axes=channels,
        tiled_axes=tile)
    return _pack(found.qvalue, kind, axis), found.scale

  # Gathered first, as FSDP may split the embed axis within a block of 64.
  at_rest = jax.typeof(w).sharding.spec
  values, scale = sharding.per_shard(local, sharding.gather_fsdp(w))
  if scale.shape[axis] % parts == 0:
    scale = jax.sharding.reshard(scale, at_rest)
  return jax.sharding.reshard(values, at_rest), scale


def dequantize(
    values: jax.Array, scale: jax.Array, kind: str, axis: int, dtype,
) -> jax.Array:
  """Dequantises one layer's matrix to `dtype`, gathered; see `quantize`."""
  qwix = _qwix(kind)

  def local(values, scale):
    return qwix.dequantize(qwix.QArray(
        _unpack(values, kind, axis), scale, None, kind)).astype(dtype)

  return sharding.per_shard(
      local, sharding.gather_fsdp(values), sharding.gather_fsdp(scale))


def symmetric(
    x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """Quantises x to int8 with a float32 scale: x = int8 * scale, rounded.

  Args:
    x: floating point.
    axes: that share a scale; the scale does not have them.

  Returns:
    int8 as x, and the scale: the largest magnitude over the axes divided by
    127; 0 where all are 0.
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / HIGH
  steps = jnp.round(x / jnp.where(scale > 0, scale, 1))
  return steps.astype(jnp.int8), jnp.squeeze(scale, axes)


def per_output(w: jax.Array, inputs: int) -> tuple[jax.Array, jax.Array]:
  """Quantises a layer's matrix to int8, a scale per output; see `symmetric`.

  Args:
    w: floating point, in any layout; the values have the same.
    inputs: how many leading axes a product sums over.
  """
  return symmetric(w, tuple(range(inputs)))


def _pack(values: jax.Array, kind: str, axis: int) -> jax.Array:
  """Packs two neighbours along the axis into a byte; int8 stays."""
  if kind == "int8":
    return values
  nibbles = values.astype(jnp.uint8) & 15
  pair = jnp.moveaxis(nibbles, axis, -1)
  pair = pair.reshape(*pair.shape[:-1], -1, 2)
  return jnp.moveaxis(pair[..., 0] | pair[..., 1] << 4, -1, axis)


def _unpack(packed: jax.Array, kind: str, axis: int) -> jax.Array:
  """Unpacks bytes to qwix's form: int8; -8 .. 7 of int4; 0 .. 15 of nf4."""
  if kind == "int8":
    return packed
  packed = jnp.moveaxis(packed, axis, -1)
  nibbles = jnp.stack([packed & 15, packed >> 4], axis=-1)
  nibbles = jnp.moveaxis(
      nibbles.reshape(*packed.shape[:-1], -1), -1, axis)
  if kind == "nf4":
    return nibbles
  return ((nibbles ^ 8).astype(jnp.int8) - 8)  # Extends the sign bit.


def _qwix(kind: str) -> ModuleType:
  """Imports qwix, an optional package; ValueError if it is missing."""
  try:
    import qwix
  except ImportError as error:
    raise ValueError(
        f"compute.frozen_dtype={kind!r} needs the package qwix: "
        "pip install 'posttrain[qlora]'.") from error
  return qwix
