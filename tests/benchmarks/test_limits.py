"""FLOPs against XLA's own count, bytes against real arrays, lines as JSON."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import __main__ as command
from benchmarks import limits, runs
from posttrain import sharding
from posttrain.model import transformer
from posttrain.model.presets import PRESETS
from posttrain.train import flops

CONFIG = dataclasses.replace(
    PRESETS["tiny"], vocab_size=512, embed=256, mlp=1024,
    layers=2, head_dim=64, unroll=2)


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
    yield


def xla_flops(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("tied, length", [(True, 32), (False, 128)])
def test_forward_flops_are_those_that_xla_counts(tied, length):
  """The program computes all T x T scores: the context is then T."""
  config = dataclasses.replace(CONFIG, tied_embeddings=tied)
  tokens = jax.ShapeDtypeStruct((4, length), jnp.int32)
  counted = xla_flops(
      lambda model, x: model.logits(model(x, x, x)),
      transformer.abstract(config), tokens)
  ours = flops.forward(
      config, 4 * length, length, logits=4 * length)
  # XLA also counts what is not a product: softmax, norms, rotations.
  assert ours == pytest.approx(counted, rel=0.05) and ours < counted


def test_a_decode_step_reads_the_cache_and_the_weights_once():
  tokens = jax.ShapeDtypeStruct((6, 32), jnp.int32)
  model = transformer.abstract(CONFIG)
  _, cache = jax.eval_shape(
      transformer.Transformer.prefill, model, tokens, tokens, tokens)
  size = lambda tree: sum(4 * x.size for x in jax.tree.leaves(tree))
  norms = size([model.blocks.attn_norm, model.blocks.mlp_norm,
                model.final_norm])
  step = limits.decode_step(CONFIG, rows=6, context=31)
  assert step.bytes == size(cache.layers) + size(model) - norms


def test_an_update_is_three_forward_passes_over_causal_attention():
  update = limits.update(CONFIG, segments=5, length=9)
  # 1 + 2 + ... + 9 = 45 keys for 9 queries.
  forward = flops.forward(CONFIG, 45, 5.0, logits=45)
  assert update.flops == 3 * forward
  assert limits.update(
      CONFIG, segments=5, length=9, times_forward=1).flops == forward


def test_the_limit_is_the_slower_of_arithmetic_and_traffic():
  work = limits.Work(flops=100.0, bytes=10.0) + limits.Work(0.0, 10.0) * 2
  assert work.seconds(flops_per_sec=10.0, bytes_per_sec=1.0) == 30.0
  assert work.seconds(flops_per_sec=1.0, bytes_per_sec=1.0) == 100.0


SMALL = runs.Shapes(
    rows=1, length=32, segment=16, groups=2, group_size=2, prompt=4,
    completion=4, minibatches=2, microbatch_rows=2, loss_chunk=16)


MINIATURE = dataclasses.replace(
    CONFIG, embed=32, mlp=32, head_dim=8, layers=1, unroll=1, vocab_size=64)


@pytest.mark.parametrize("name, tokens", [
    pytest.param("sft", 32, marks=pytest.mark.slow),
    pytest.param("grpo_step", 16, marks=pytest.mark.slow)])
def test_steps_run_again_and_again(name, tokens):
  timed = runs.BENCHMARKS[name](MINIATURE, SMALL)
  assert timed.tokens == tokens
  for _ in range(2):  # Donated buffers are replaced.
    metrics = jax.device_get(timed.run())
    assert metrics["denominator"] > 0


def test_generation_does_all_of_its_work():
  """No row ends early: as many tokens as are counted."""
  timed = runs.generation(MINIATURE, SMALL)
  rollouts = timed.run()
  assert rollouts.lengths.tolist() == [SMALL.completion] * 4
  assert timed.tokens == rollouts.lengths.sum()


def test_the_lines_are_json_with_shares(monkeypatch):
  rates = {"matmul_flops_per_sec": 1e12, "memory_bytes_per_sec": 1e11}
  monkeypatch.setattr(command.machine, "measure", lambda *a, **k: rates)
  monkeypatch.setattr(
      command.machine, "seconds_of", lambda run, repeats: [4.0, 2.0, 9.0])
  work = (limits.Work(1e12, 1.0), limits.Work(1.0, 5e10))  # 1 s and 0.5 s.
  monkeypatch.setitem(
      runs.BENCHMARKS, "sft",
      lambda config, shapes: runs.Timed(lambda: None, 100 * shapes.rows, work))
  lines = command.lines(command.parse(["--only=sft", "--rows=2"]))
  machine, sft = (json.loads(json.dumps(line)) for line in lines)
  assert machine["benchmark"] == "machine" and machine["rows"] == 2
  assert machine["parameters"] > 600_000
  assert sft["benchmark"] == "sft" and sft["seconds"] == 4.0
  assert sft["tokens_per_sec"] == 200 / 4.0
  assert sft["share_of_limit"] == pytest.approx(1.5 / 4.0)


def test_the_machine_is_measured(monkeypatch):
  """Given times: 0.01 s for the first size, 0.05 s for all that follows."""
  monkeypatch.setattr(
      command.machine, "TRAFFIC_BYTES", {jax.default_backend(): 2**20})
  monkeypatch.setattr(command.machine, "MATMUL_SIZES", (64, 128, 256))
  seconds = itertools.chain([0.01], itertools.repeat(0.05))
  monkeypatch.setattr(
      command.machine, "seconds_of",
      lambda run, repeats: [next(seconds)] * repeats)
  devices = jax.device_count()
  rates = command.machine.measure("float32", repeats=3)
  # The third size is not tried; a copy moves its array twice.
  assert rates == {
      "matmul_flops_per_sec": pytest.approx(2 * devices * 128**3 / 0.05),
      "memory_bytes_per_sec": pytest.approx(2 * devices * 2**20 / 0.05)}


def test_runs_are_warmed_up_and_all_timed():
  calls = []
  seconds = command.machine.seconds_of(lambda: calls.append(1), repeats=4)
  assert len(seconds) == 4 and len(calls) == 5
