"""It is printed before weights are made, and knows how the cache grows."""

import jax
import pytest
from ml_collections import config_dict

from posttrain import config as config_lib
from posttrain import pipeline, sharding
from posttrain.model.presets import PRESETS
from posttrain.sampler import sampler
from posttrain.stages import memory_estimate
from posttrain.telemetry import memory
from tests import meshes, pipeline_run
from tests.sampler import numpy_sampler
from tests.sampler.test_sampler import UNUSED


@pytest.mark.parametrize("stage, parts", [
    ("cold_start", "parameters optimizer gradients"),
    ("reason", "parameters optimizer reference gradients cache"),
    ("measure", "parameters cache")])
def test_the_line_comes_before_the_weights(
    tmp_path, monkeypatch, capsys, stage, parts):
  def weights_of(self, source):
    raise MemoryError(source)
  monkeypatch.setattr(pipeline.Pipeline, "weights_of", weights_of)
  with jax.set_mesh(meshes.one()), pytest.raises(MemoryError):
    pipeline.run_stage(pipeline_run.make_pipeline(tmp_path, [
        *pipeline_run.ALL, "reason.loss.kl_coef=0.1"]), stage, None)
  [line] = [line for line in capsys.readouterr().out.splitlines()
            if "memory per device" in line]
  for part in ("parameters", "optimizer", "reference", "gradients", "cache"):
    assert (f"{part} " in line) == (part in parts.split()), part


def estimate(section, compute):
  with jax.set_mesh(meshes.one()):
    sizes = memory_estimate.sizes_of(section, compute, PRESETS["qwen3-4b"])
  return memory_estimate.of_sizes(sizes, compute, sharding.MeshSizes())


@pytest.mark.parametrize("stage", ["reason", "measure"])
def test_sampling_in_int8_is_counted(stage):
  def sampling(*assignments):
    config = config_lib.assign(
        pipeline_run.CONFIG, [*pipeline_run.ALL, *assignments], "test")
    return estimate(config[stage], config.compute).sampling

  correction = {"reason": ["reason.loss.importance_sampling=truncate"]}
  floats, int8 = sampling(), sampling(
      f"{stage}.rollout.cache_dtype=int8",
      f"{stage}.rollout.weights_dtype=int8", *correction.get(stage, []))
  assert int8["decode weights"] * 4 == floats["decode weights"]
  assert int8["cache"] * 4 * 128 == floats["cache"] * (128 + 4)


@pytest.mark.parametrize("changes, rows", [
    ([], 4096), (["measure.problems.count=5"], 10),
    (["measure.problems.count=5", "measure.majority.max_samples=7"], 35),
    (["measure.problems.count=5000"], 4096)])
def test_no_more_rows_are_counted_than_an_evaluation_draws(changes, rows):
  def cache(*assignments):
    config = config_lib.assign(
        pipeline_run.CONFIG, [*pipeline_run.ALL, "measure.num_waits=",
                              "measure.max_thinking_tokens=",
                              "measure.rollout.temperature=1.0",
                              "measure.samples_per_problem=2",
                              "measure.pass_at=1",
                              "measure.majority.max_samples=0", *assignments],
        "test")
    return estimate(config.measure, config.compute).sampling["cache"]

  one = cache("measure.samples_per_problem=1", "measure.rollout.max_num_seqs=1",
              "measure.problems.count=0")
  found = cache("measure.rollout.max_num_seqs=4096", "measure.problems.count=0",
                *changes)
  assert found == rows * one


@pytest.mark.parametrize("max_tokens, slots", [
    (3, 128), (28, 128), (29, 160), (924, 1024)])
def test_a_cache_holds_prompt_and_completion_in_whole_tiles(max_tokens, slots):
  rollout = config_dict.ConfigDict(dict(
      max_prompt_tokens=100, chunk=8, max_tokens=max_tokens,
      max_episode_tokens=0))
  assert memory_estimate.cache_slots(rollout) == slots
  # As the engine of the stage has it.
  some = numpy_sampler.make_sampler(UNUSED, max_prompt_tokens=100, chunk=8)
  with jax.set_mesh(meshes.one()):
    found = some.engine_settings(some.make_requests(
        [[6]], sampler.Limits(max_tokens), prompt_id=[0]))
  assert found.sizes[-1] == slots


@pytest.mark.parametrize("tokens, caches", [(0, 1), (96, 1 / 16), (97, 1 / 8)])
def test_turns_that_are_kept_have_a_cache_of_their_own(tokens, caches):
  """A prompt of 6 and 60 tokens behind it have 96 slots; 16 rows have those."""
  config = config_lib.assign(pipeline_run.CONFIG, [
      "reason.episode=posttrain.episodes.calculator:calculator",
      "reason.sequence_length=66", "reason.rollout.max_episode_tokens=60",
      f"reason.rollout.prefix_cache_tokens={tokens}"], "test")
  found = estimate(config.reason, config.compute).sampling
  assert found["prefix cache"] == caches * found["cache"]


def test_devices_that_only_sample_have_a_line_of_their_own(tmp_path):
  """Nothing of an update there, and no cache where updates are made."""
  changes = ["mesh.roles=split", "mesh.sampling.devices=4",
             "mesh.sampling.tensor=2", "mesh.fsdp=2", "mesh.tensor=2"]
  run = pipeline_run.make_pipeline(tmp_path, changes)
  with jax.set_mesh(sharding.mesh_of(run.config.mesh)):
    found = memory_estimate.of_stage(run.context("reason"), run.model)
  assert not found["training"].sampling and found["training"].training
  assert not found["sampling"].training
  assert list(found["sampling"].persistent) == ["parameters"]
  for estimate in found.values():
    assert estimate.persistent["parameters"] == (
        memory.FLOAT32 * memory.parameters(run.model) // 4)
