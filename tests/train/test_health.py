"""Limits: the rules fire at `patience`, not before, and name what to change."""

import numpy as np
import pytest

from posttrain.train import health


def test_a_non_finite_loss_saves_its_batch(tmp_path):
  batch = {"tokens": np.arange(6).reshape(2, 3), "loss_mask": np.ones(3, bool)}
  health.check_finite(1, {"loss": 1.0, "grad_norm": 2.0}, batch, tmp_path)
  for values in ({"loss": np.nan, "grad_norm": 1.0},
                 {"loss": 1.0, "grad_norm": np.float32("inf")}):
    with pytest.raises(health.HealthError, match="learning_rate") as caught:
      health.check_finite(7, values, batch, tmp_path / "bad")
    path = tmp_path / "bad" / "bad_batch_step_000007.npz"
    assert str(path) in str(caught.value)
    with np.load(path) as saved:
      assert set(saved.files) == set(batch)
      for name in batch:
        np.testing.assert_array_equal(saved[name], batch[name])
    path.unlink()
  with pytest.raises(health.HealthError):
    health.check_finite(
        7, {"loss": np.nan}, batch, tmp_path / "other", write=False)
  assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("bad, advice", [
    (dict(clipped_ratio=1.0, frac_reward_zero_std=0.5), "rollout.max_tokens"),
    (dict(clipped_ratio=0.5, frac_reward_zero_std=1.0), "group_size"),
])
def test_patience(bad, advice):
  good = dict(clipped_ratio=0.99, frac_reward_zero_std=0.99)
  rules = health.RolloutHealth(patience=3)
  for step, figures in enumerate([bad, bad, good, bad, bad]):
    rules.update(step, **figures)
  resumed = health.RolloutHealth(patience=3)
  resumed.set_state(rules.get_state())
  for each in (rules, resumed):
    with pytest.raises(health.HealthError, match=f"Step 5: .*{advice}"):
      each.update(5, **bad)


def test_two_conditions_in_turn_are_no_streak():
  rules = health.RolloutHealth(patience=2)
  for step in range(6):
    odd = step % 2
    rules.update(step, clipped_ratio=odd, frac_reward_zero_std=1 - odd)
    assert max(rules.get_state().values()) == 1


def test_patience_is_at_least_one():
  with pytest.raises(ValueError, match=r"health\.patience is 0"):
    health.RolloutHealth(patience=0)
