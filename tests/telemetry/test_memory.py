"""The estimate against real arrays, and against the compiler's own figure."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.model import cache as kv
from posttrain.model import token_logprobs, transformer
from posttrain.model.presets import PRESETS
from posttrain.objectives.columns import Term
from posttrain.telemetry import memory
from posttrain.train import optimizer, state, step
from tests import meshes

TINY = dataclasses.replace(
    PRESETS["tiny"], vocab_size=100, qk_norm="head")
ROWS, LENGTH, CHUNK = 16, 128, 64
BLOCKS = dict(attention="blocks", attention_block=32)


def size(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied):
  config = dataclasses.replace(
      TINY, vocab_size=300, tied_embeddings=tied, qkv_bias=True)
  with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
    model = transformer.abstract(config)
  assert memory.parameters(config) * 4 == size(model)


@pytest.mark.parametrize("dtype", ["compute", "int8"])
def test_cache_is_that_of_the_model(dtype):
  config = dataclasses.replace(TINY, dtype="bfloat16")
  with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
    cache = jax.eval_shape(lambda: kv.empty(config, 6, 32, dtype))
  expected = size(cache.layers)
  count = functools.partial(
      memory.cache_bytes, config, rows=6, slots=32, dtype=dtype)
  assert count() == expected
  assert count(parts=3, tensor=2) == expected // 6


@pytest.mark.parametrize("dtype", ["compute", "int8"])
def test_decode_weights_are_those_of_the_loop(dtype):
  """But for norms and scales, which stay float32."""
  config = dataclasses.replace(TINY, dtype="bfloat16")
  with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
    blocks = jax.eval_shape(
        lambda model: model.unstacked(dtype), transformer.abstract(config))
  matrices = [w for w in jax.tree.leaves(blocks) if w.dtype != jnp.float32]
  estimate = memory.estimate(
      config, cache_rows=1, cache_slots=1, weights_dtype=dtype)
  assert estimate.sampling["decode weights"] == size(matrices)


def test_experts_are_counted_with_the_parameters():
  config = dataclasses.replace(
      TINY, num_experts=8, experts_per_token=2, tied_embeddings=False)
  with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
    model = transformer.abstract(config)
  assert memory.parameters(config) * 4 == size(model)


def loss(model, batch):
  logprobs, _, _ = token_logprobs.token_logprobs(model, batch, chunk=CHUNK)
  return {"all": Term(-jnp.sum(logprobs), jnp.float32(ROWS * LENGTH))}, {}


def compiled_update(config):
  schedule = optimizer.make_schedule(
      schedule="constant", learning_rate=1e-3, warmup_steps=0, num_steps=10,
      final_learning_rate=0.0)
  adamw = optimizer.make_optimizer(
      beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
  train_state = jax.eval_shape(
      lambda model: state.create(model, adamw), transformer.abstract(config))
  batch = {
      name: sharding.put(
          np.ones((2, ROWS, LENGTH), np.int32), None, "batch", "length")
      for name in ("tokens", "positions", "segment_ids")}
  update = functools.partial(
      step.update, loss=loss, optimizer=adamw, schedule=schedule)
  return jax.jit(update, donate_argnums=0).lower(
      train_state, batch, 2).compile().memory_analysis()


def case(*values, slow=True):
  return pytest.param(*values, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("remat, fields, sizes", [
    case("full", {}, {}, slow=False), case("none", {}, {}),
    case("dots", {}, {}), case("none", {}, dict(fsdp=4, tensor=2)),
    case("full", {}, dict(fsdp=4, tensor=2)),
    case("none", {}, dict(fsdp=2, tensor=2, data=2)),
    case("full", {}, dict(fsdp=2, tensor=2, context=2)),
    case("none", BLOCKS, {}, slow=False), case("dots", BLOCKS, {}),
    case("full", BLOCKS, dict(fsdp=4, tensor=2))],
    ids=lambda x: x if isinstance(x, str) else "x".join(x) or "one")
def test_an_update_needs_what_the_compiler_says(remat, fields, sizes):
  config = dataclasses.replace(TINY, remat=remat, **fields)
  with jax.set_mesh(meshes.mesh(**(dict(fsdp=1, tensor=1) | sizes))):
    analysis = compiled_update(config)
  estimate = memory.estimate(
      config, **sizes, rows=ROWS, sequence_length=LENGTH, loss_chunk=CHUNK)
  # The batch itself and the parameters that no mesh splits are left out.
  assert sum(estimate.persistent.values()) == pytest.approx(
      analysis.argument_size_in_bytes, rel=0.1)
  assert sum(estimate.training.values()) == pytest.approx(
      analysis.temp_size_in_bytes, rel=1 / 3)


@pytest.mark.parametrize("remat, expert", [
    case("none", 1), case("full", 1), case("none", 2)])
def test_experts_need_what_the_compiler_says(remat, expert):
  """In the dense form: the other's product is lowered otherwise on a CPU."""
  config = dataclasses.replace(
      TINY, num_experts=8, experts_per_token=2, mlp=96, moe="dense",
      remat=remat)
  devices = jax.devices()[:expert]
  with jax.set_mesh(sharding.make_mesh(
      1, 1, devices=devices, expert=expert)):
    analysis = compiled_update(config)
  estimate = memory.estimate(
      config, expert=expert, rows=ROWS, sequence_length=LENGTH,
      loss_chunk=CHUNK)
  assert sum(estimate.persistent.values()) == pytest.approx(
      analysis.argument_size_in_bytes, rel=0.1)
  assert sum(estimate.training.values()) == pytest.approx(
      analysis.temp_size_in_bytes, rel=1 / 3)


def test_the_line_names_every_part():
  config = PRESETS["qwen3-8b"]
  estimate = memory.estimate(
      dataclasses.replace(config, remat="full", dtype="bfloat16"), fsdp=16,
      rows=16, sequence_length=4096, loss_chunk=512, cache_rows=256,
      cache_slots=4096, reference_bytes=2 * memory.parameters(config))
  line = estimate.line(available=16 * 2**30)
  for part in ("parameters", "optimizer", "reference", "gradients",
               "activations", "logits", "cache", "decode weights",
               "of 16.0 GiB"):
    assert part in line
  # 8.19e9 parameters in float32 over 16 devices.
  assert f"parameters {memory.format_bytes(8.19e9 * 4 / 16)}" in line


def test_the_peak_is_the_larger_of_the_two_phases():
  estimate = memory.Estimate({"p": 10}, {"a": 5, "b": 2}, {"c": 6})
  assert estimate.peak == 17
  assert dataclasses.replace(estimate, sampling={"c": 60}).peak == 70


def test_what_waits_on_the_hosts_is_there_for_its_phase_only():
  """2 bytes a parameter of a reference, 8 of the moments, over 16 devices."""
  config = dataclasses.replace(
      PRESETS["qwen3-8b"], remat="full", dtype="bfloat16")
  n = memory.parameters(config)
  of = lambda *names: memory.estimate(
      config, fsdp=16, rows=16, sequence_length=512, loss_chunk=128,
      cache_rows=1024, cache_slots=4096, reference_bytes=2 * n, offload=names)
  all_there, moved = of(), of("reference", "optimizer")
  assert sum(all_there.persistent.values()) - sum(
      moved.persistent.values()) == 2 * n // 16 + 8 * n // 16
  assert moved.training["optimizer"] == 8 * n // 16
  assert moved.scoring["reference"] == 2 * n // 16
  # The cache is what needs most here.
  assert all_there.peak - moved.peak == 2 * n // 16 + 8 * n // 16
  assert "scoring adds reference" in moved.line()


@pytest.mark.parametrize("count, text", [
    (12, "12 B"), (2048, "2.0 KiB"), (3 * 2**20, "3.0 MiB"),
    (5 * 2**30, "5.0 GiB"), (3 * 2**40, "3.0 TiB")])
def test_bytes(count, text):
  assert memory.format_bytes(count) == text
