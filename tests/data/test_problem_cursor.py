"""Each epoch asks every problem at most once, in an order of its own."""

import json

import numpy as np
import pytest

from posttrain.data import random_streams
from posttrain.data.problem_cursor import ProblemCursor, earlier_asks


def batches(problems, sizes, seed=0, stage="reason"):
  cursor, found = ProblemCursor(problems, seed, stage), []
  for size in sizes:
    indices, cursor = cursor.take(size)
    found.append(indices)
  return found


@pytest.mark.parametrize("problems, groups", [(12, 4), (13, 4), (5, 5)])
def test_an_epoch_has_no_problem_twice(problems, groups):
  per_epoch = problems // groups
  found = batches(problems, [groups] * 3 * per_epoch)
  epochs = [
      np.concatenate(found[e * per_epoch:(e + 1) * per_epoch])
      for e in range(3)]
  for epoch in epochs:
    assert len(set(epoch)) == len(epoch) == per_epoch * groups
    assert epoch.min() >= 0 and epoch.max() < problems
  assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("problems, groups", [(12, 4), (13, 4), (7, 3), (5, 5)])
def test_equal_batches_cut_each_epochs_order_into_whole_ones(problems, groups):
  """Batch b by its number alone, from the contract's stream."""
  per_epoch = problems // groups
  for b, found in enumerate(batches(problems, [groups] * 20)):
    order = random_streams.stream(
        0, "reason", "problems", b // per_epoch).permutation(problems)
    start = b % per_epoch * groups
    np.testing.assert_array_equal(found, order[start:start + groups])


def test_what_one_epoch_leaves_out_comes_up_in_another():
  asked = np.concatenate(batches(7, [3] * 40))
  counts = np.bincount(asked, minlength=7)
  # 120 of 7 problems: each 17 times on the average, none forgotten.
  assert counts.min() >= 10


def test_batches_of_any_size_go_through_an_epoch():
  found = batches(10, [4, 1, 3, 2, 5])
  assert sorted(np.concatenate(found[:4])) == list(range(10))
  assert len(set(found[4])) == 5


def test_a_restored_cursor_goes_on_and_an_unused_take_changes_nothing():
  cursor = ProblemCursor(13, 3, "reason")
  for size in (4, 4, 4, 4, 2, 5):
    state = json.loads(json.dumps(cursor.get_state()))
    again = ProblemCursor(13, 3, "reason").at(state)
    assert again == cursor
    cursor.take(size)  # Of a batch that is never finished.
    indices, cursor = cursor.take(size)
    np.testing.assert_array_equal(again.take(size)[0], indices)
  assert cursor.get_state() == {"num_problems": 13, "epoch": 1, "position": 11}


def test_another_seed_asks_in_another_order():
  assert not np.array_equal(
      batches(50, [8] * 10), batches(50, [8] * 10, seed=1))


def test_too_few_problems_are_an_error():
  with pytest.raises(ValueError, match="has 3 problems, and a batch needs 4"):
    ProblemCursor(3, 0, "a").take(4)


def test_another_number_of_problems_is_an_error():
  state = ProblemCursor(24, 0, "a").get_state()
  with pytest.raises(ValueError, match=r"a\.problems: .* had 24 .* it has 23"):
    ProblemCursor(23, 0, "a").at(state)


def test_two_stages_ask_in_different_orders():
  asked = [np.concatenate(batches(50, [8] * 6, stage=stage))
           for stage in ("reason", "reason_2")]
  # Two random orders agree in 48 places about once: 8 is no accident
  # (false alarm below 1e-5).
  assert np.sum(asked[0] == asked[1]) < 8


def test_earlier_asks_count_within_the_batch():
  np.testing.assert_array_equal(
      earlier_asks(np.array([5, 2, 5, 5, 7, 2])), [0, 0, 1, 2, 0, 1])
