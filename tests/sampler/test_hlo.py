"""Copies and moves of the compiled decode loop, here and on a TPU chip."""

import os

import jax
import pytest

from posttrain import sharding
from posttrain.model.config import ModelConfig
from tests import meshes
from tests.sampler import hlo

# Grouped queries, as large models have them; the cache outweighs the rest.
CONFIG = dict(
    vocab_size=4096, embed=1024, mlp=2816, heads=16, kv_heads=8,
    head_dim=128)
SHAPE = dict(rows=32, slots=2048, steps=8)


def assert_nothing_is_copied(compiled, weights, cache, layers):
  """A copy of one layer's keys alone would need a buffer of their size.

  A TPU's program may lay out the weights once per call, before the loop.
  """
  temporary = compiled.memory_analysis().temp_size_in_bytes
  keys = cache / (2 * layers)
  print(f"temporaries {temporary / 2**20:.0f} MiB, weights "
        f"{weights / 2**20:.0f}, a layer's keys {keys / 2**20:.0f}")
  assert temporary < weights + keys / 2


def test_the_loop_copies_no_cache():
  config = ModelConfig(**CONFIG, layers=2)
  with jax.set_mesh(meshes.one()):
    compiled, weights, cache = hlo.compile_decode(config, **SHAPE)
  assert_nothing_is_copied(compiled, weights, cache, config.layers)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["compute", "int8"])
def test_a_step_on_a_tpu_reads_weights_and_cache_once(dtype):
  """At most 1.1 times both, in the program compiled for one chip."""
  pytest.importorskip("libtpu", reason="the extra `tpu` has the compiler")
  from jax.experimental.topologies import get_topology_desc
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  chip = get_topology_desc(
      platform="tpu", topology_name="v5e:1x1",
      chips_per_host_bounds=(1, 1, 1)).devices
  # More weights than the chip's fast memory could keep between steps.
  config = ModelConfig(**CONFIG, layers=6, dtype="bfloat16")
  with jax.set_mesh(sharding.make_mesh(1, 1, devices=list(chip)[:1])):
    compiled, weights, cache = hlo.compile_decode(
        config, **SHAPE, cache_dtype=dtype, weights_dtype=dtype)
  assert_nothing_is_copied(compiled, weights, cache, config.layers)
  moved = hlo.step_bytes(compiled.as_text())
  print(f"{moved / 2**20:.1f} MiB a step, {moved / (weights + cache):.3f} of "
        f"weights and cache")
  assert moved < 1.1 * (weights + cache)
