"""The splash kernel, step by step on a CPU, is attention over a mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.model import attention, splash, transformer
from tests import meshes
from tests.model import build
from tests.model.test_blockwise_attention import ANY, packed

ROWS, LENGTH, KV, GROUPS, WIDTH = 4, 256, 2, 2, 16
HEADS = ("batch", "length", "kv_heads", "groups", "head_dim")


def rows():
  """Segments that end within blocks and at their edge, and padding."""
  return packed([60, 68, 100, 256, 1, 200, 130, 70], ROWS, LENGTH)


@pytest.mark.parametrize("window, softcap, mesh", [
    (None, 0.0, meshes.one),
    pytest.param(40, 2.0, meshes.eight, marks=pytest.mark.slow),
    pytest.param(200, 0.0, meshes.one, marks=pytest.mark.slow)])
def test_the_kernel_is_the_mask(window, softcap, mesh):
  rng = np.random.default_rng(0)

  def draw(*heads):
    shape = (ROWS, LENGTH, KV, *heads, WIDTH)
    axes = HEADS if heads else (*HEADS[:3], "head_dim")
    return sharding.put(rng.normal(size=shape).astype(np.float32), *axes)

  def over_mask(q, k, v, positions, segment_ids):
    distance = positions[:, :, None] - positions[:, None]
    mask = attention.causal_mask(positions, segment_ids)
    return attention.attend(
        q, k, v, mask & (distance < (window or ANY)), scale=0.3,
        softcap=softcap)

  def kernel(q, k, v, positions, segment_ids):
    return splash.attend(
        q, k, v, segment_ids, window=window, block=128, scale=0.3,
        softcap=softcap, interpret=True)

  @functools.partial(jax.jit, static_argnums=0)
  def run(attend, q, k, v, cotangent, positions, segment_ids):
    real = (segment_ids > 0)[:, :, None, None, None]
    out, pull = jax.vjp(
        lambda *x: attend(*x, positions, segment_ids), q, k, v)
    return jnp.where(real, out, 0), pull(jnp.where(real, cotangent, 0))

  with jax.set_mesh(mesh()):
    inputs = draw(GROUPS), draw(), draw(), draw(GROUPS)
    marks = build.put_rows(*rows())
    want, got = (run(f, *inputs, *marks) for f in (over_mask, kernel))
  for a, b in zip(*map(jax.tree.leaves, (want, got)), strict=True):
    np.testing.assert_allclose(np.asarray(b), np.asarray(a), atol=5e-6)


def test_a_length_of_broken_blocks_is_refused():
  q = jax.ShapeDtypeStruct((2, 200, 2, 2, 16), jnp.float32)
  with pytest.raises(ValueError, match="200 tokens are no multiple"):
    splash.attend(q, q, q, q, window=None, block=128, scale=1.0)


def test_other_devices_than_tpus_are_refused():
  config = build.make_config(attention="splash")
  with jax.set_mesh(meshes.one()), pytest.raises(
      ValueError, match="is a kernel for TPUs, and these devices"):
    transformer.abstract(config)
