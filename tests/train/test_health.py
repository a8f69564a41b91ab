"""Limits: the rules fire at `patience`, not before, and name what to change."""

import numpy as np
import pytest

from posttrain.train import health

FINE = {"loss": 1.0, "grad_norm": 2.0}
SPIKE = FINE | {"spike": 1.0}
BATCH = {"tokens": np.arange(6).reshape(2, 3), "loss_mask": np.ones(3, bool)}


@pytest.mark.parametrize("bad", [
    {"loss": np.nan, "grad_norm": 1.0},
    {"loss": 1.0, "grad_norm": np.float32("inf")}, SPIKE])
def test_a_bad_step_saves_its_batch(tmp_path, bad):
  rules = health.StepHealth(tmp_path / "bad")
  assert rules.update(1, FINE | {"spike": 0.0}, BATCH) == ""
  with pytest.raises(health.HealthError, match="learning_rate") as caught:
    rules.update(7, bad, BATCH)
  path = tmp_path / "bad" / "bad_batch_step_000007.npz"
  assert str(path) in str(caught.value)
  with np.load(path) as saved:
    assert set(saved.files) == set(BATCH)
    for name in BATCH:
      np.testing.assert_array_equal(saved[name], BATCH[name])


def test_other_hosts_save_no_batch(tmp_path):
  with pytest.raises(health.HealthError):
    health.StepHealth(tmp_path / "other", write=False).update(
        7, {"loss": np.nan}, BATCH)
  assert not (tmp_path / "other").exists()


def test_so_many_in_a_row_are_skipped(tmp_path):
  """And a resumed run stops at the same step."""
  rules = health.StepHealth(tmp_path, max_skips=2)
  nan = {"loss": np.nan, "grad_norm": 1.0}
  for step, values in enumerate([SPIKE, nan, FINE, nan, SPIKE], 1):
    assert bool(rules.update(step, values, BATCH)) == (values is not FINE)
  assert "nan" in health.StepHealth(tmp_path, max_skips=2).update(
      1, nan, BATCH)
  resumed = health.StepHealth(tmp_path, max_skips=2)
  resumed.set_state(rules.get_state())
  assert not list(tmp_path.iterdir())
  for each in (rules, resumed):
    with pytest.raises(
        health.HealthError, match=r"Step 6 is not finite: loss=nan, as were "
        r"the 2 before \(health\.max_skips=2\)"):
      each.update(6, nan, BATCH)


def rollout_rules(
    patience=1000, max_unscored=1.0, unscored_patience=1):
  """Rules of rollouts; those that a test leaves out never fire."""
  return health.RolloutHealth(
      patience=patience, max_unscored=max_unscored,
      unscored_patience=unscored_patience)


def rollout_metrics(
    clipped_ratio=0.5, frac_reward_zero_std=0.5, frac_unscored=0.0):
  return {"completions/clipped_ratio": clipped_ratio,
          "frac_reward_zero_std": frac_reward_zero_std,
          "frac_unscored": frac_unscored}


@pytest.mark.parametrize("bad, advice", [
    (dict(clipped_ratio=1.0, frac_reward_zero_std=0.5), "rollout.max_tokens"),
    (dict(clipped_ratio=0.5, frac_reward_zero_std=1.0), "group_size"),
])
def test_patience(bad, advice):
  good = dict(clipped_ratio=0.99, frac_reward_zero_std=0.99)
  rules = rollout_rules(patience=3)
  for step, figures in enumerate([bad, bad, good, bad, bad]):
    rules.update(step, rollout_metrics(**figures))
  resumed = rollout_rules(patience=3)
  resumed.set_state(rules.get_state())
  for each in (rules, resumed):
    with pytest.raises(health.HealthError, match=f"Step 5: .*{advice}"):
      each.update(5, rollout_metrics(**bad))


def test_two_conditions_in_turn_are_no_streak():
  rules = rollout_rules(patience=2)
  for step in range(6):
    odd = step % 2
    rules.update(step, rollout_metrics(odd, 1 - odd))
    assert max(rules.get_state().values()) == 1


def test_patience_is_at_least_one():
  with pytest.raises(ValueError, match=r"health\.patience is 0"):
    rollout_rules(patience=0)


@pytest.mark.parametrize("denominator", [0.0, -1.0, np.nan])
def test_a_loss_without_a_denominator_is_named(tmp_path, denominator):
  values = {"loss": np.nan, "grad_norm": np.nan,
            "denominator/policy": denominator}
  with pytest.raises(health.HealthError, match=(
      r"term 'policy' has a denominator of .* see loss\.function.*before it\.$"
  )):
    health.StepHealth(tmp_path).update(1, values, BATCH)


def test_completions_without_a_score_are_bounded():
  """Above the share, and so many times in a row; a resume counts on."""
  rules = rollout_rules(max_unscored=0.25, unscored_patience=3)
  for share in (1.0, 0.3, 0.25, 1.0, 0.26):
    rules.update(1, rollout_metrics(frac_unscored=share))
  resumed = rollout_rules(max_unscored=0.25, unscored_patience=3)
  resumed.set_state(rules.get_state())
  for each in (rules, resumed):
    with pytest.raises(health.HealthError, match=(
        r"Step 9: 50% of the completions could not be scored, and more than "
        r"25% in each of the last 3 batches .*raise health\.max_unscored")):
      each.update(9, rollout_metrics(frac_unscored=0.5))
  for _ in range(9):
    rollout_rules(max_unscored=1.0, unscored_patience=1).update(
        1, rollout_metrics(frac_unscored=1.0))
