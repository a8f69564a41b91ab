"""What an objective declares decides what is computed, packed and skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.objectives import policy
from posttrain.objectives.columns import Term, needs
from posttrain.objectives.masked import masked_sum
from posttrain.rl import objective
from posttrain.rl.experience import FOR_LOSS
from tests import meshes, pipeline_run

CLIPS = dict(clip_low=0.2, clip_high=0.2)


def likelihood(columns):
  """Rejection sampling's loss, without advantages: it declares nothing."""
  logprobs, mask = columns["logprobs"], columns["loss_mask"]
  return {"likelihood": Term(
      -masked_sum(logprobs, mask),
      masked_sum(jnp.ones_like(logprobs), mask))}, {}


@needs("ref_logprobs", "old_logprobs")
def two_terms(columns):
  """The distance to the reference and to the old policy; and a drift."""
  mask, ones = columns["loss_mask"], jnp.ones_like(columns["logprobs"])
  square = lambda name: Term(masked_sum(
      (columns["logprobs"] - columns[name])**2, mask),
      masked_sum(ones, mask))
  terms, _ = likelihood(columns)
  return terms | {name: square(name) for name in (
      "ref_logprobs", "old_logprobs")}, {}


def first_updates(tmp_path, function):
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(tmp_path, [
        f"reason.loss.function=tests.rl.test_objective:{function}",
        "reason.num_epochs=2"])
    learner.collect()
    experience = learner.experience
    return experience, [learner.update() for _ in range(2)], learner


def test_what_is_not_declared_is_not_computed(tmp_path):
  """No pass for old logprobs, no advantages; every completion is packed."""
  experience, rows, learner = first_updates(tmp_path, "likelihood")
  assert not set(FOR_LOSS) & set(experience)
  assert learner.reference is None
  counted = experience["loss_mask"]
  assert set(np.unique(experience["completion_ids"][counted])) == set(range(16))
  assert rows[0]["loss"] == pytest.approx(
      -experience["sampler_logprobs"][counted].mean(), abs=1e-4)
  assert rows[1]["loss"] < rows[0]["loss"]
  assert "ratio/max_deviation" not in rows[0]


def test_what_is_declared_is_computed(tmp_path):
  """A reference without the trainer's KL: the weights at the start."""
  experience, rows, _ = first_updates(tmp_path, "two_terms")
  assert set(FOR_LOSS) & set(experience) == {"old_logprobs", "ref_logprobs"}
  np.testing.assert_array_equal(
      experience["old_logprobs"], experience["ref_logprobs"])
  first, second = rows
  assert first["loss/old_logprobs"] == 0 < second["loss/old_logprobs"]
  for row in rows:
    assert row["loss"] == pytest.approx(sum(row[f"loss/{name}"] for name in (
        "likelihood", "old_logprobs", "ref_logprobs")), rel=1e-6)


def test_silent_groups_are_skipped_where_the_denominator_is_told():
  make = objective.PolicyObjective
  assert not make(policy.policy_loss, CLIPS).needs_silent_groups
  assert make(likelihood, {}).needs_silent_groups
  assert make(two_terms, {}).needs_silent_groups
  assert make(policy.policy_loss, CLIPS, kl_coef=0.1).needs_silent_groups
  told = needs("denominator_shares")(lambda columns: None)
  assert make(told, {}).needs_silent_groups  # It takes no advantages.


def test_names_of_the_trainers_terms_and_sums_are_its_own():
  def named(columns):
    return {"kl": Term(1.0, 1.0)}, {"entropy": 1.0}

  ones = jnp.ones((1, 2))
  columns = dict.fromkeys((
      "logprobs", "ref_logprobs", "sampler_logprobs", "entropy",
      "token_weights", "denominator_shares"), ones) | {"loss_mask": ones > 0}
  for coefficient, name in ((0.1, "kl"), (0.0, "entropy")):
    with pytest.raises(ValueError, match=rf"returns {name}, which the trainer"):
      objective.PolicyObjective(named, {}, kl_coef=coefficient)(columns)


def test_loss_args_are_for_a_function_of_ones_own():
  with pytest.raises(ValueError, match=(
      r"loss\.args is .*are the keys loss\.clip_low, loss\.clip_high")):
    objective.make(
        function="posttrain.objectives.policy:policy_loss",
        args=dict(clip_low=0.1), **CLIPS)


def test_a_largest_value_is_no_mean():
  found = objective.metrics_of_sums(
      {"tokens": 4.0, "entropy": 2.0, "own": 6.0, "own_max": 3.0}, fresh=False)
  assert found == {"entropy": 0.5, "own": 1.5, "own_max": 3.0}
