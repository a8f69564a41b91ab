"""Devices that only sample: oracles are shared devices, and who drew what."""

import json

import jax
import numpy as np
import pytest

from posttrain import config as config_lib
from posttrain import sharding
from posttrain.rl import rollout_worker
from posttrain.train import preemption
from tests import pipeline_run
from tests.stages.test_rl import repeatable, rollouts_of

SPLIT = ["mesh.roles=split", "mesh.sampling.devices=4"]
LEARNS = ["reason.num_steps=8", "reason.num_minibatches=2",
          "reason.loss.kl_coef=0.1", "reason.checkpoint.every=2",
          "reason.save_rollouts_every=2", "reason.rollout.chunk=5"]
STALE = [*SPLIT, *LEARNS, "reason.staleness=1",
         "reason.loss.importance_sampling=truncate"]


def completions(path):
  return [[(row["prompt_id"], row["sample_id"], row["completion"])
           for row in map(json.loads, text.splitlines())]
          for text in rollouts_of(path).values()]


def test_split_is_shared_on_other_devices(tmp_path):
  """Other layouts round otherwise; a tie would end what is compared."""
  shared, split = tmp_path / "shared", tmp_path / "split"
  steps = ["reason.num_steps=3"]
  elsewhere = [*steps, *SPLIT, "mesh.sampling.tensor=2"]
  pipeline_run.train(shared, steps)
  pipeline_run.train(split, elsewhere)
  assert completions(split) == completions(shared)
  for a, b in zip(repeatable(shared), repeatable(split), strict=True):
    assert a.keys() == b.keys()
    assert b.get("loss", 0) == pytest.approx(
        a.get("loss", 0), rel=1e-4, abs=1e-6)
    assert "sampling/logp_difference/max" not in b or (
        b["sampling/logp_difference/max"] < 5e-5)
  a = pipeline_run.parameters(shared, steps)
  for name, found in pipeline_run.parameters(split, elsewhere).items():
    np.testing.assert_allclose(found, a[name], rtol=0, atol=1e-5)


def numbers(model):
  return [np.asarray(x).copy() for x in jax.tree.leaves(jax.device_get(model))]


@pytest.mark.parametrize(
    "staleness", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_batch_is_by_the_policy_that_its_number_says(
    tmp_path, monkeypatch, staleness):
  drawn = {}
  collect = rollout_worker.RolloutWorker.collect

  def keep(self, model, indices, *, step):
    batch = step // 2
    assert batch not in drawn and step % 2 == 0
    devices = {d.id for d in model.embedding[...].sharding.device_set}
    drawn[batch] = numbers(model), devices
    return collect(self, model, indices, step=step)

  monkeypatch.setattr(rollout_worker.RolloutWorker, "collect", keep)
  changes = [*STALE, f"reason.staleness={staleness}"]
  config = config_lib.assign(pipeline_run.CONFIG, changes, "test")
  before, rows = [], []
  with jax.set_mesh(sharding.mesh_of(config.mesh)):
    learner = pipeline_run.make_learner(tmp_path, changes)
    for _ in range(4):
      before.append(numbers(learner.state.model))
      learner.collect()
      while True:
        rows.append(learner.update())
        if learner.experience is None:
          break
        assert not learner.may_save
      assert learner.may_save
  assert sorted(drawn) == [0, 1, 2, 3]
  for batch, (weights, devices) in drawn.items():
    assert devices == {0, 1, 2, 3}
    for a, b in zip(
        weights, before[max(0, batch - staleness)], strict=True):
      np.testing.assert_array_equal(a, b)
  assert any((a != b).any() for a, b in zip(before[0], before[1], strict=True))
  assert [row["staleness"] for row in rows[::2]] == [
      min(batch, staleness) for batch in range(4)]
  for row in rows:
    assert "sampling/logp_difference/max" not in row
    assert row["importance/min"] <= row["importance/ratio"]
    assert row["importance/ratio"] <= row["importance/max"]
  same, other = rows[0], rows[2 * staleness]
  assert same["importance/max"] == pytest.approx(1, abs=1e-4)
  assert other["importance/max"] > 1.001


@pytest.mark.parametrize(
    "staleness", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_left_and_resumed_is_bitwise_the_whole_run(
    tmp_path, monkeypatch, staleness):
  """SIGTERM within a batch; what was drawn ahead is in the checkpoint."""
  changes = [*STALE, f"reason.staleness={staleness}"]
  whole, left = tmp_path / "whole", tmp_path / "left"
  pipeline_run.train(whole, changes)
  with monkeypatch.context() as patch:
    patch.setattr(preemption, "leave_if_requested", lambda: None)
    for call, step in ((1, 2), (3, 6)):
      count = iter(range(1, 100))
      patch.setattr(preemption, "requested", lambda: next(count) >= call)
      with pytest.raises(preemption.Preempted, match=f"saved at step {step}"):
        pipeline_run.train(left, changes)
  pipeline_run.train(left, changes)
  assert repeatable(left) == repeatable(whole)
  assert rollouts_of(left) == rollouts_of(whole)
  a, b = (pipeline_run.parameters(path, changes) for path in (whole, left))
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(
    "staleness", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_left_while_drawing_ahead_it_goes_back_to_the_last_checkpoint(
    tmp_path, monkeypatch, staleness):
  """The policy that drew is gone: its updates and its draw are made again.

  In a draw of the first policy, then in one that waits on a checkpoint.
  """
  changes = [*STALE, f"reason.staleness={staleness}",
             "reason.checkpoint.every=4"]
  whole, left = tmp_path / "whole", tmp_path / "left"
  with monkeypatch.context() as patch:
    chunks = pipeline_run.count_chunks(patch)
    pipeline_run.train(whole, changes)
    count = len(chunks)
    pipeline_run.count_chunks(patch, 2)
    with pytest.raises(preemption.Preempted, match="nothing to save yet"):
      pipeline_run.train(left, changes)
    # The last draw is of batch 3, beside the updates of batch 3 - staleness.
    kept = {1: "saved at step 4;", 3: "nothing to save yet"}[staleness]
    pipeline_run.count_chunks(patch, count)
    with pytest.raises(preemption.Preempted, match=kept):
      pipeline_run.train(left, changes)
    pipeline_run.count_chunks(patch)
    pipeline_run.train(left, changes)
  assert repeatable(left) == repeatable(whole)
  assert rollouts_of(left) == rollouts_of(whole)
  a, b = (pipeline_run.parameters(path, changes) for path in (whole, left))
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("changes, message", [
    (["reason.staleness=1"], r"Set mesh\.roles='split'"),
    ([*SPLIT, "reason.staleness=1"], "need loss.importance_sampling"),
    ([*STALE, "reason.checkpoint.every=3"], "3 is not a multiple of the 2"),
    ([*SPLIT, "stages=cold_start"], "mesh.roles: 'split' has no effect"),
    (["mesh.sampling.devices=2"], "no effect unless mesh.roles == 'split'"),
    ([*SPLIT, "compute.offload=optimizer"], "has devices of its own"),
    (["reason.loss.importance_sampling_cap=3.0"],
        "importance_sampling != 'none'"),
    ([*STALE, "reason.loss.importance_sampling_floor=0.4"], "== 'mask'")])
def test_what_would_have_no_effect_is_refused(changes, message):
  with pytest.raises(config_lib.ConfigError, match=message):
    config_lib.assign(pipeline_run.CONFIG, changes, "test")
