"""Oracle: plain attention under the mask that the positions say.

The kernel is interpreted here; that Mosaic takes it is shown by compiling for
a TPU, which need not be here.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.model import attention, decode_kernel, transformer
from posttrain.model import cache as kv
from posttrain.model.config import ModelConfig
from tests import meshes
from tests.model import build, test_cache
from tests.sampler import hlo

B, K, G, H, S = 4, 2, 3, 8, 40


def random_ring(rng):
  """[B, S] positions: a run around the end, holes in it; the last row empty.

  And the position of each row's newest token, -1 of the empty row.
  """
  positions = np.full((B, S), -1, np.int32)
  for row in positions[:-1]:
    length = rng.integers(1, S + 1)
    row[(rng.integers(S) + np.arange(length)) % S] = np.arange(length)
    row[(rng.random(S) < 0.2) & (row < length - 1)] = -1
  return positions, positions.max(1)


@functools.partial(jax.jit, static_argnames=("window", "block"))
def both(q, k, v, positions, query, dtype, window, block):
  """Computes attention by the kernel and by the plain form."""
  layer = kv.stored(k, v, dtype.dtype)
  newer = query[:, None] - positions
  mask = (positions >= 0) & (newer >= 0) & (newer < (window or S))
  how = dict(scale=0.7, softcap=2.0)
  want = attention.attend(
      q, kv.heads_first(layer.k), kv.heads_first(layer.v), mask[:, None],
      k_scale=layer.k_scale, v_scale=layer.v_scale, **how)
  return decode_kernel.attend(
      q, layer, positions, query, window=window, block=block, interpret=True,
      **how), want


@pytest.mark.parametrize("dtype, window, block", [
    ("float32", 6, 16), ("int8", 0, 16), ("int8", 5, 40)])
def test_the_kernel_is_plain_attention(dtype, window, block):
  """16 does not divide the 40 slots."""
  rng = np.random.default_rng(block)
  with jax.set_mesh(meshes.one()):
    for _ in range(20):
      q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in
                 ((B, 1, K, G, H), (B, S, K, H), (B, S, K, H)))
      positions, query = random_ring(rng)
      got, want = both(q, k, v, positions, query, jnp.zeros((), dtype),
                       window=window, block=block)
      np.testing.assert_allclose(got[:-1], want[:-1], rtol=0, atol=2e-6)
      np.testing.assert_array_equal(got[-1], 0)


@pytest.mark.parametrize("window", [0, 6])
def test_only_blocks_with_something_to_see_are_fetched(window):
  rng = np.random.default_rng(window)
  find = jax.jit(functools.partial(
      decode_kernel.visible_blocks, window=window, block=16))
  for _ in range(20):
    positions, query = random_ring(rng)
    blocks, counts = jax.device_get(find(positions, query))
    for row in range(B):
      seen = [i for i, p in enumerate(positions[row])
              if p >= 0 and not (window and query[row] - p >= window)]
      want = sorted({i // 16 for i in seen})
      assert counts[row] == len(want)
      # Fetched again is not fetched at all: the block is there.
      want += [want[-1] if want else 0] * (3 - len(want))
      assert blocks[row].tolist() == want


@pytest.mark.parametrize("option, mesh", [
    ("gemma", meshes.one), ("everything", meshes.eight)])
def test_decode_by_the_kernel_is_the_full_forward(option, mesh):
  config = build.make_config(
      **build.OPTIONS[option], decode_attention="interpreted")
  with jax.set_mesh(mesh()):
    test_cache.assert_decodes(config, build.random_params(config))


def test_what_cannot_be_had_names_the_key():
  wide = ModelConfig(**build.BASE | dict(head_dim=128),
                     decode_attention="kernel")
  narrow = build.make_config(decode_attention="kernel")
  with jax.set_mesh(meshes.one()):
    with pytest.raises(ValueError, match=(
        r"'kernel' is .* for TPUs.*" + repr(jax.devices()[0].platform))):
      transformer.abstract(wide)
    with pytest.raises(ValueError, match=r"'kernel'.*multiple of 128.* is 8"):
      transformer.abstract(narrow)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["compute", "int8"])
def test_mosaic_takes_it_on_a_mesh(dtype):
  """Rows over two devices, heads over two; a window, a cap, and all slots."""
  pytest.importorskip("libtpu", reason="the extra `tpu` has the compiler")
  from jax.experimental.topologies import get_topology_desc
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  chips = get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
  config = ModelConfig(
      vocab_size=512, embed=256, mlp=256, heads=8, kv_heads=4, head_dim=128,
      layers=2, layer_pattern=("local", "global"), sliding_window=512,
      attention_softcap=50.0, dtype="bfloat16", decode_attention="kernel")
  with jax.set_mesh(sharding.make_mesh(2, 2, devices=list(chips))):
    compiled, *_ = hlo.compile_decode(
        config, rows=8, slots=2080, steps=2, cache_dtype=dtype)
  calls = [line for line in compiled.as_text().splitlines()
           if "decode_attention" in line and "tpu_custom_call" in line]
  number = "s8" if dtype == "int8" else "bf16"
  # Of each layer one, over a device's own rows and heads.
  assert len(calls) == 2
  assert all(f"{number}[4,2,2080,128]" in call for call in calls)
