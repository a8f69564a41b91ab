"""Each epoch asks every problem at most once, in an order of its own."""

import numpy as np
import pytest

from posttrain.data import prompts


def batches(problems, groups, numbers, seed=0, stage="reason"):
  return [prompts.problems_of_batch(
      problems, groups, batch=b, seed=seed, stage=stage) for b in numbers]


@pytest.mark.parametrize("problems, groups", [(12, 4), (13, 4), (5, 5)])
def test_an_epoch_has_no_problem_twice(problems, groups):
  per_epoch = problems // groups
  epochs = [
      np.concatenate(batches(
          problems, groups, range(e * per_epoch, (e + 1) * per_epoch)))
      for e in range(3)]
  for epoch in epochs:
    assert len(set(epoch)) == len(epoch) == per_epoch * groups
    assert epoch.min() >= 0 and epoch.max() < problems
  assert len({tuple(epoch) for epoch in epochs}) == 3


def test_what_one_epoch_leaves_out_comes_up_in_another():
  asked = np.concatenate(batches(7, 3, range(40)))
  counts = np.bincount(asked, minlength=7)
  # 120 of 7 problems: each 17 times on the average, none forgotten.
  assert counts.min() >= 10


def test_a_batch_is_a_function_of_its_number_and_the_seed():
  np.testing.assert_array_equal(
      batches(50, 8, [9]), batches(50, 8, range(10))[9:])
  assert not np.array_equal(batches(50, 8, [9]), batches(50, 8, [9], seed=1))


def test_too_few_problems_are_an_error():
  with pytest.raises(ValueError, match="has 3 problems, and a batch needs 4"):
    prompts.problems_of_batch(3, 4, batch=0, seed=0, stage="a")


def test_two_stages_ask_in_different_orders():
  asked = [np.concatenate(batches(50, 8, range(6), stage=stage))
           for stage in ("reason", "reason_2")]
  # Two random orders agree in 48 places about once: 8 is no accident
  # (false alarm below 1e-5).
  assert np.sum(asked[0] == asked[1]) < 8
