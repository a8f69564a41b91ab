"""Problems that a batch asks more than once: draws, groups and the record."""

import jax
import numpy as np
import pytest

from posttrain.data import random_streams
from posttrain.data.problem_cursor import ProblemCursor
from posttrain.objectives import advantages as advantages_lib
from posttrain.rl import rollout_buffer, rollout_worker
from posttrain.stages import rl
from posttrain.train import preemption
from tests import meshes, pipeline_run

ASKED = np.array([2, 5, 2, 2])  # Of problems; four completions of each.


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
  """The worker, its model and a batch of step 3."""
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path_factory.mktemp("drawn"))
    worker = rl.make_rollout_worker(
        run.context("reason"), pipeline_run.calls())
    model = pipeline_run.start(run)
    return worker, model, worker.collect(model, ASKED, step=3)


def test_a_problem_asked_again_has_sample_ids_that_go_on(drawn):
  _, _, batch = drawn
  found = batch.rollouts
  assert found.prompt_id.reshape(4, 4)[:, 0].tolist() == [2, 5, 2, 2]
  np.testing.assert_array_equal(
      found.sample_id.reshape(4, 4), np.add.outer([0, 0, 4, 8], np.arange(4)))
  texts = [[found.completion(4 * ask + i) for i in range(4)]
           for ask in (0, 2, 3)]
  assert texts[0] != texts[1] != texts[2] != texts[0]


def test_its_draws_are_those_of_the_sample_ids_alone(drawn):
  """One call asks for the same ids in another order, and gets the same."""
  worker, model, batch = drawn
  prompt = batch.rollouts.prompts[0]
  with jax.set_mesh(meshes.one()):
    other = worker.sampler.sampler.generate(
        model, [prompt] * 4, worker.limits, prompt_id=[2] * 4, group_size=4,
        seed=0, stage="reason", step=3, first_sample=np.array([8, 12, 4, 0]))
  for ask, place in ((0, 3), (2, 2), (3, 0)):
    for i in range(4):
      assert batch.rollouts.completion(4 * ask + i) == other.completion(
          4 * place + i)


def test_each_ask_is_a_group(drawn):
  """Advantages against the mean of the ask, not of the problem's 12."""
  _, _, batch = drawn
  rewards = np.arange(16.0) ** 2
  found = advantages_lib.group_advantages(
      rewards, batch.group_ids, std="none")
  for ask in range(4):
    mine = rewards[4 * ask:4 * ask + 4]
    np.testing.assert_allclose(
        found[4 * ask:4 * ask + 4], mine - mine.mean(), rtol=1e-6)


def make_buffer(worker):
  return rollout_buffer.RolloutBuffer(
      worker, ProblemCursor(len(worker.problems), 0, "reason"), num_groups=4,
      num_batches=9, updates=1, staleness=2, sync=None)


def test_batches_that_wait_keep_their_problems_in_a_checkpoint(drawn):
  """They are the recorded ones, wherever the cursor stands; the next is its.
  """
  worker, model, _ = drawn
  with jax.set_mesh(meshes.one()):
    buffer = make_buffer(worker)
    buffer.take(model, 0)
    buffer.draw_ahead(0)
    state, arrays = buffer.cursor.get_state(), buffer.to_arrays()
    assert state["position"] == 12
    for position in (12, 4):
      again = make_buffer(worker)
      again.restore(state | {"position": position}, arrays)
      first, second = again.take(model, 1), again.take(model, 2)
      for found, wanted in zip((first, second), buffer._drawn, strict=True):
        assert found.problems == wanted.problems
        assert found.rollouts.prompts == wanted.rollouts.prompts
        np.testing.assert_array_equal(found.indices, wanted.indices)
        np.testing.assert_array_equal(
            found.rollouts.tokens, wanted.rollouts.tokens)
        np.testing.assert_array_equal(found.rewards, wanted.rewards)
      again.draw_ahead(2)
      np.testing.assert_array_equal(again._drawn[0].indices, first_epoch(
          len(worker.problems))[position:position + 4])


def test_entropy_and_confidence_go_to_metrics_records_and_checkpoints(
    drawn, tmp_path):
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path, [
        "reason.rollout.confidence_window=4",
        "reason.rollout.confidence_top_k=3"])
    worker = rl.make_rollout_worker(
        run.context("reason"), pipeline_run.calls())
    model = pipeline_run.start(run)
    batch = worker.collect(model, ASKED, step=3)
    buffer = make_buffer(worker)
    buffer._drawn = [batch, batch]
    again = make_buffer(worker)
    again.restore(buffer.cursor.get_state(), buffer.to_arrays())
  rollouts = batch.rollouts
  np.testing.assert_array_equal(rollouts.tokens, drawn[2].rollouts.tokens)
  for restored in again._drawn:
    np.testing.assert_array_equal(restored.rollouts.entropy, rollouts.entropy)
    np.testing.assert_array_equal(
        restored.rollouts.confidence, rollouts.confidence)
  zeros = np.zeros(16)
  found = rollout_worker.metrics(batch, zeros, ["reward"])
  records = rollout_worker.records(batch, zeros, ["reward"], worker, 3)
  per_row = [rollouts.confidence[row, rollouts.loss_mask[row]]
             for row in range(16)]
  assert found["sampling/confidence"] == pytest.approx(
      np.concatenate(per_row).mean())
  assert 0 < found["sampling/entropy"] < np.log(
      worker.sampler.sampler.tables.vocab_size)
  for record, values in zip(records, per_row, strict=True):
    assert record["mean_confidence"] == pytest.approx(values.mean())
    assert record["tail_confidence"] == pytest.approx(values[-4:].mean())
    windows = [values[i:i + 4].mean() for i in range(len(values) - 3)]
    assert record["lowest_group_confidence"] == pytest.approx(
        min(windows) if windows else values.mean())
  assert not any("confidence" in name for name in rollout_worker.metrics(
      drawn[2], zeros, ["reward"]))


def first_epoch(problems):
  return random_streams.stream(0, "reason", "problems", 0).permutation(problems)


def test_a_batch_that_is_left_half_drawn_asks_the_same_again(
    drawn, monkeypatch):
  worker, model, _ = drawn
  buffer = make_buffer(worker)
  with monkeypatch.context() as patch:
    patch.setattr(type(worker), "collect", leaves)
    with pytest.raises(preemption.Preempted):
      buffer.take(model, 0)
  assert buffer.cursor == ProblemCursor(len(worker.problems), 0, "reason")


def leaves(*args, **kwargs):
  raise preemption.Preempted("in a rollout")
