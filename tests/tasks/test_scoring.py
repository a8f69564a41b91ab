"""Rewards are called with every column; what they may not return."""

import numpy as np
import pytest

from posttrain.objectives import advantages
from posttrain.tasks import scoring

PROBLEMS = [
    dict(id=7, prompt="a b", gold="yes", wanted="yes"),
    dict(id=8, prompt="c", gold="no", wanted="no")]


def right(prompt, completion, *, wanted, **columns):
  return completion == wanted


def length(prompt, completion, **columns):
  return len(completion) if prompt == "c" else None


def test_scores_are_those_of_the_functions_one_by_one():
  texts = ["yes", "nope"]
  scores = scoring.score({"right": right, "length": length}, PROBLEMS, texts)
  assert scores.dtype == np.float32
  np.testing.assert_array_equal(scores, [[1, np.nan], [0, 4]])
  np.testing.assert_allclose(
      advantages.combine_rewards(scores, np.array([1.0, 0.5])), [1, 2])


def test_a_reward_sees_all_columns_and_only_the_policys_completion():
  seen = []
  def look(prompt, completion, **columns):
    seen.append((prompt, completion, columns))
    return np.float32(0.5)
  row = dict(id=1, prompt="p", completion="the demonstration", gold="g")
  assert scoring.score({"look": look}, [row], ["text"]).tolist() == [[0.5]]
  assert seen == [("p", "text", dict(id=1, gold="g"))]


def test_a_conversation_has_an_empty_prompt_and_its_messages():
  seen = {}
  def look(prompt, completion, *, messages, **columns):
    seen.update(prompt=prompt, messages=messages)
    return 1
  messages = [dict(role="user", content="hello")]
  scoring.score({"look": look}, [dict(id=1, messages=messages)], [""])
  assert seen == dict(prompt="", messages=messages)


@pytest.mark.parametrize("value", ["1", float("nan"), float("inf"), [1.0]])
def test_what_is_no_finite_number_is_an_error(value):
  with pytest.raises(ValueError, match=r"The reward odd returned .* problem 7"):
    scoring.score({"odd": lambda **columns: value}, PROBLEMS[:1], ["x"])


def test_a_reward_that_fails_is_named_with_its_problem():
  def broken(prompt, completion, **columns):
    return 1 / len(completion)
  with pytest.raises(
      ValueError, match="broken failed on problem 8 with ZeroDivisionError"):
    scoring.score({"broken": broken}, PROBLEMS, ["x", ""])


def test_gold_is_what_the_verifier_is_checked_with():
  scoring.check_gold("right", right, PROBLEMS)
  wrong = [*PROBLEMS, dict(id=9, prompt="d", gold="yes", wanted="no")]
  with pytest.raises(ValueError, match=r"gives 0\.0 to problem 9's own gold"):
    scoring.check_gold("right", right, wrong)
  with pytest.raises(ValueError, match=r"gives None to problem 7's own gold"):
    scoring.check_gold("length", length, PROBLEMS)
  with pytest.raises(ValueError, match="Problem 3 has no column gold"):
    scoring.check_gold("right", right, [dict(id=3, prompt="a")])


@pytest.mark.parametrize("ids, message", [
    ([1, 2, 1], "Two problems of the task have id=1"),
    ([0, "a"], "Problem 1 of the task has id='a'"),
    ([None], "id=None"), ([True], "id=True"), ([2**31], "id=2147483648")])
def test_problems_are_told_apart_by_their_id(ids, message):
  """A group is what has one id, so two of one would be one group."""
  with pytest.raises(ValueError, match=message):
    scoring.check_ids([dict(id=value) for value in ids])
  scoring.check_ids([dict(id=value) for value in (0, np.int32(1), -2**31)])
