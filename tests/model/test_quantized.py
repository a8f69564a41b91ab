"""Oracles: the NF4 table of the paper and rounding, one number at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.model import quantized
from tests import meshes

pytest.importorskip("qwix")

# QLoRA, arXiv 2305.14314, appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
       -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
       0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0]
AXES = {"q": ("layers", "embed", "kv_heads", "groups", "head_dim"),
        "o": ("layers", "kv_heads", "groups", "head_dim", "embed"),
        "gate": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")}
SHAPES = {"q": (2, 128, 2, 1, 4), "o": (2, 2, 1, 4, 128),
          "gate": (2, 128, 6), "down": (2, 6, 128)}


def blocks(w, name):
  """[blocks, 64] of a stacked matrix."""
  return np.moveaxis(
      np.asarray(w, np.float64), quantized.embed_axis(name), -1).reshape(-1, 64)


def stored(name, kind, seed=0):
  """The matrix, and its values and scales at rest on the current mesh."""
  w = np.random.default_rng(seed).normal(size=SHAPES[name]).astype(np.float32)
  return w, *quantized.quantize_stack(
      sharding.put(w, *AXES[name]), name, kind)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_number_is_the_nearest_that_its_block_can_hold(name, kind):
  with jax.set_mesh(meshes.one()):
    w, values, scale = stored(name, kind)
    found = quantized.dequantize_stack(values, scale, name, kind)
  for block, got in zip(blocks(w, name), blocks(found, name), strict=True):
    top = np.abs(block).max()
    if kind == "nf4":
      held = top * np.array(NF4)
    else:
      # The outer half of the last step is used too: top is high + 1/2 steps.
      high = {"int8": 127, "int4": 7}[kind]
      held = top / (high + 0.5) * np.arange(-high - 1, high + 1)
    distance = np.abs(held - block[:, None])
    np.testing.assert_allclose(
        np.abs(got - block), distance.min(1), rtol=0, atol=1e-6 * top)
    np.testing.assert_allclose(
        np.abs(held - got[:, None]).min(1), 0, rtol=0, atol=1e-6 * top)


@pytest.mark.parametrize("kind, bits", [("int8", 8), ("int4", 4), ("nf4", 4)])
def test_bytes_at_rest(kind, bits):
  """The buffers themselves are measured: 4 bits are 4 bits on a CPU too."""
  with jax.set_mesh(meshes.one()):
    w, values, scale = stored("gate", kind)
  size = lambda x: x.addressable_shards[0].data.on_device_size_in_bytes()
  assert size(values) == values.nbytes == w.size * bits / 8
  assert size(scale) == scale.nbytes == w.size / 64 * 4


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["q", "down"])
def test_a_mesh_changes_no_bit(name, kind):
  """Blocks of 64 along an axis of 128 that four devices share."""
  found = []
  for mesh in (meshes.one(), meshes.eight()):
    with jax.set_mesh(mesh):
      _, values, scale = stored(name, kind)
      whole = quantized.dequantize_stack(values, scale, name, kind)
      found.append(sharding.fetch((values, scale, whole)))
  jax.tree.map(np.testing.assert_array_equal, *found)
  assert "fsdp" in str(jax.typeof(values)) and "tensor" in str(
      jax.typeof(values))
  assert str(jax.typeof(values)).count("@") == str(
      jax.typeof(whole)).count("@") == 2


def test_what_the_mesh_does_not_divide_names_the_key():
  with jax.set_mesh(meshes.eight()):
    w = sharding.put(np.ones((2, 12, 4), np.float32), "layers", "embed", "mlp")
    quantized.quantize_stack(w, "gate", "int8")
    with pytest.raises(ValueError, match=r"nf4.*embed=12 in 6.*mesh.fsdp=4"):
      quantized.quantize_stack(w, "gate", "nf4")


def test_a_row_of_zeros_stays_zero():
  with jax.set_mesh(meshes.one()):
    w = jnp.zeros((1, 64, 2))
    for kind in ("int8", "int4", "nf4"):
      back = quantized.dequantize_stack(
          *quantized.quantize_stack(w, "gate", kind), "gate", kind)
      np.testing.assert_array_equal(back, 0)
