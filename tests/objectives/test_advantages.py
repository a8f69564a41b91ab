"""Oracles: the worked values, a loop from the paper, identities."""

import json

import numpy as np
import pytest

from posttrain.objectives import advantages
from tests.objectives import oracles

CASES = [(json.loads(name), value) for name, value in oracles.named("adv ")]


@pytest.mark.parametrize("rewards,value", CASES, ids=str)
@pytest.mark.parametrize("column,options", [
    ("adv_pop_eps0", dict(eps=0.0)), ("adv_pop_1e-6", dict()),
    ("adv_sample_1e-4", dict(std="sample", eps=1e-4)),
    ("drgrpo", dict(std="none"))])
def test_worked_values(rewards, value, column, options):
  got = advantages.group_advantages(
      np.array(rewards, np.float32), np.zeros(len(rewards), int), **options)
  want = value[column]
  if isinstance(want, str):  # "all 0 (0/0 guarded)"
    want = np.zeros(len(rewards))
  # The values are given with six decimals, some with four.
  np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize("rewards,value", CASES, ids=str)
def test_leave_one_out_is_the_centred_reward_rescaled(rewards, value):
  size = len(rewards)
  got = advantages.group_advantages(
      np.array(rewards), np.zeros(size, int), std="none")
  np.testing.assert_allclose(got * size / (size - 1), value["rloo"], atol=1e-6)


def loop(rewards, prompt_id):
  """The paper's outcome reward, one completion at a time."""
  result = []
  for reward, prompt in zip(rewards, prompt_id, strict=True):
    group = [r for r, p in zip(rewards, prompt_id, strict=True) if p == prompt]
    result.append((reward - np.mean(group)) / (np.std(group) + 1e-6))
  return np.array(result)


def test_groups_by_id_whatever_their_order_and_size():
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=14)
  prompt_id = rng.permutation(np.repeat([700, 3, 5], [4, 2, 8]))
  got = advantages.group_advantages(rewards, prompt_id)
  np.testing.assert_allclose(got, loop(rewards, prompt_id), rtol=1e-5)
  for prompt in (700, 3, 5):
    assert abs(got[prompt_id == prompt].sum()) < 1e-5


@pytest.mark.parametrize("std", advantages.STANDARD_DEVIATIONS)
def test_a_unanimous_group_has_exactly_zero_advantage(std):
  """.1 + .1 + .1 is not .3, and a division must not magnify that."""
  rewards = np.array([0.1, 0.1, 0.1, 0, 1, 1])
  prompt_id = np.array([1, 1, 1, 2, 2, 2])
  got = advantages.group_advantages(rewards, prompt_id, std=std, eps=0.0)
  np.testing.assert_array_equal(got[:3], 0)
  assert (got[3:] != 0).all()
  np.testing.assert_array_equal(
      advantages.informative(rewards, prompt_id), prompt_id == 2)


def test_a_single_completion_is_an_error():
  with pytest.raises(ValueError, match=r"1 of 2 prompts .* group_size"):
    advantages.group_advantages(np.ones(3), np.array([0, 0, 1]))


def test_an_unknown_deviation_is_an_error():
  with pytest.raises(ValueError, match=r"loss.advantage_std is 'std'"):
    advantages.group_advantages(np.ones(2), np.zeros(2, int), std="std")


def test_rewards_that_do_not_apply_are_left_out():
  rewards = np.array([[1, np.nan], [0.5, 2], [np.nan, 4]])
  np.testing.assert_allclose(
      advantages.combine_rewards(rewards, np.array([1, 0.25])), [1, 1, 1])


def test_a_row_without_a_reward_is_an_error():
  with pytest.raises(ValueError, match=r"1 of 2 .*row 1"):
    advantages.combine_rewards(
        np.array([[1, 1], [np.nan, np.nan]]), np.ones(2))
  with pytest.raises(ValueError, match=r"function 1 .*row 0"):
    advantages.combine_rewards(np.array([[1, np.inf]]), np.ones(2))


@pytest.mark.parametrize("std", advantages.STANDARD_DEVIATIONS)
def test_what_could_not_be_scored_leaves_its_group(std):
  """The others' advantages are those of a group without it."""
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=12)
  prompt_id = rng.permutation(np.repeat([7, 3, 5], 4))
  unscored = np.zeros(12, bool)
  unscored[[1, 4]] = True
  # One group keeps a single member, which has nothing to differ from.
  unscored[np.flatnonzero(prompt_id == 5)[:3]] = True
  got = advantages.group_advantages(
      np.where(unscored, np.nan, rewards), prompt_id, std=std)
  rest = ~unscored & (prompt_id != 5)
  np.testing.assert_allclose(got[rest], advantages.group_advantages(
      rewards[rest], prompt_id[rest], std=std), rtol=1e-6)
  assert (got[~rest] == 0).all()
  np.testing.assert_array_equal(advantages.informative(
      np.where(unscored, np.nan, rewards), prompt_id), rest)


def test_centred_values_are_off_their_groups_mean():
  values = np.array([1.0, 3.0, np.nan, 10.0])
  np.testing.assert_array_equal(
      advantages.centred(values, np.array([2, 2, 2, 8])), [-1, 1, 0, 0])
