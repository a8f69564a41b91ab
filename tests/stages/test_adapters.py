"""Stages that train adapters: resumed, continued, evaluated, and shared.

The base is quantised, which is all that a plain one does and more.
"""

import shutil

import jax
import numpy as np
import pytest

from posttrain.model import lora
from posttrain.telemetry import metrics
from posttrain.train import preemption, trainable
from tests import meshes, pipeline_run
from tests.stages import sft_run
from tests.stages.test_sft import leave_at, parameters, repeatable, rows_of

pytest.importorskip("qwix")

SFT = ["cold_start.lora.rank=4", "cold_start.learning_rate=0.02",
       "compute.frozen_dtype=nf4"]
CHAIN = ["stages=cold_start,reason,measure", "compute.frozen_dtype=int8",
         "cold_start.lora.rank=4", "reason.lora.rank=4",
         "reason.loss.kl_coef=0.05", "reason.checkpoint.every=3",
         "measure.max_thinking_tokens=2", "measure.num_waits=0"]


def bases(path):
  return sorted(folder.name for folder in (path / "frozen").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  path = tmp_path_factory.mktemp("whole")
  with jax.set_mesh(meshes.one()):
    return path, sft_run.run(path, SFT)


def test_sft_of_adapters_left_and_resumed_is_bitwise_the_whole_run(
    whole, tmp_path, monkeypatch):
  path, model = whole
  with jax.set_mesh(meshes.one()):
    leave_at(monkeypatch, 6)
    with pytest.raises(preemption.Preempted, match="saved at step 6"):
      sft_run.run(tmp_path, SFT)
    leave_at(monkeypatch)
    resumed = sft_run.run(tmp_path, SFT)
  assert repeatable(rows_of(tmp_path)) == repeatable(rows_of(path))
  for a, b in zip(parameters(model), parameters(resumed), strict=True):
    np.testing.assert_array_equal(a, b)
  losses = [row["loss"] for row in rows_of(path)]
  assert np.mean(losses[-3:]) < 0.9 * losses[0]


def test_a_checkpoint_holds_what_is_trained_and_the_base_is_kept_once(whole):
  path, _ = whole
  saved = sft_run.saved_state(path)
  model = [name for name in saved if name.startswith("['model']")]
  assert len(model) == 14 and all("_lora_" in name for name in model)
  moments = [name for name in saved if "['mu']" in name or "['nu']" in name]
  assert len(moments) == 28
  assert len(bases(path)) == 1


def test_another_base_is_refused_by_its_hash(whole, tmp_path):
  """As if the file that `init` reads had changed between two starts."""
  with jax.set_mesh(meshes.one()):
    context = sft_run.make_context(tmp_path, SFT)
    shutil.copytree(whole[0] / "cold_start", tmp_path / "cold_start")
    model = jax.tree.map(lambda w: w * 1.01, sft_run.start(context))
    with pytest.raises(ValueError, match="was made with frozen='"):
      sft_run.sft.run(context, model)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  """SFT, then GRPO on the same adapters, then evaluation."""
  path = tmp_path_factory.mktemp("chain")
  with jax.set_mesh(meshes.one()):
    pipeline_run.train(path, CHAIN)
  return path


def test_stages_share_one_base_and_go_on_with_the_adapters(chain):
  assert len(bases(chain)) == 1
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(chain, CHAIN)
    before, after = run.weights_of("cold_start"), run.weights_of("reason")
    fresh = run.weights_of("init")
  assert before.config == after.config and before.config.lora.rank == 4
  moved = {path for path, a, b in zip(
      trainable.paths(before), jax.tree.leaves(before),
      jax.tree.leaves(after), strict=True) if not np.array_equal(a, b)}
  assert moved == {path for path in trainable.paths(before)
                   if lora.is_adapter(path)}
  assert before.blocks.q[...].dtype == np.int8
  assert fresh.config.lora is None
  assert (chain / "measure/eval").is_dir()


def test_the_sampler_and_the_trainer_agree_on_live_quantised_weights(chain):
  rows = [row for row in metrics.read(chain / "metrics.jsonl")
          if row["stage"] == "reason" and not row["skipped_updates"]]
  assert rows
  for row in rows:
    assert row["sampling/logp_difference/max"] < 5e-5
    assert row["ratio/max_deviation"] == 0


def test_without_its_base_a_checkpoint_says_what_is_missing(chain, tmp_path):
  shutil.copytree(chain / "reason", tmp_path / "moved" / "reason")
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path / "run", CHAIN)
    with pytest.raises(FileNotFoundError, match=r"frozen.*does not exist"):
      run.weights_of(f"{tmp_path}/moved/reason/checkpoints")
    shutil.copytree(chain / "frozen", tmp_path / "moved" / "frozen")
    run.weights_of(f"{tmp_path}/moved/reason/checkpoints")


@pytest.mark.parametrize("reference, steps", [
    ("", 0), ("adapter_off", 0), ("", 1), ("adapter_off", 1)])
def test_the_reference_is_the_policys_own_buffers(tmp_path, reference, steps):
  """And beside them, after a stage that trained them, the old adapters."""
  assignments = [
      "reason.lora.rank=4", "reason.loss.kl_coef=0.1",
      *([f"reason.reference={reference}"] if reference else [])]
  with jax.set_mesh(meshes.one()):
    start = pipeline_run.start(pipeline_run.make_pipeline(
        tmp_path, assignments))
    if steps:
      start = lora.add(start, lora.LoraConfig(rank=4), jax.random.key(0))
    run = pipeline_run.make_pipeline(tmp_path, assignments)
    learner = pipeline_run.Learner(run.context("reason"), start)
    base = {id(w) for w in jax.tree.leaves(learner.state.frozen)}
    own = [path for path, w in zip(
        trainable.paths(learner.reference),
        jax.tree.leaves(learner.reference), strict=True) if id(w) not in base]
    assert len(jax.tree.leaves(learner.reference)) - len(own) == len(base)
    if steps and not reference:
      assert len(own) == 14 and all(map(lora.is_adapter, own))
    else:
      assert not own and learner.reference.config.lora is None
    policy_start = learner.state.model
    np.testing.assert_array_equal(
        learner.reference.blocks.q[...], policy_start.blocks.q[...])
