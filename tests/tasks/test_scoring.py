"""Rewards are called with every column; what they may not return."""

import asyncio
import os
import sys

import numpy as np
import pytest

from posttrain.objectives import advantages
from posttrain.tasks import gsm8k, scoring
from posttrain.tasks.grading import Grade
from posttrain.tasks.scoring import STATUSES, Completion, Score

PROBLEMS = [
    dict(id=7, prompt="a b", gold="yes", wanted="yes"),
    dict(id=8, prompt="c", gold="no", wanted="no")]


def right(prompt, completion, *, wanted, **columns):
  return completion == wanted


def length(prompt, completion, **columns):
  return len(completion) if prompt == "c" else None


def text(answer):
  return Completion(answer, full_text=answer)


def score(reward, completion="x", problem=PROBLEMS[0], name="odd"):
  """The value and the status of one reward on one completion."""
  found = scoring.score({name: reward}, [problem], [text(completion)])
  return float(found.values[0, 0]), STATUSES[found.statuses[0, 0]]


def test_scores_are_those_of_the_functions_one_by_one():
  values, statuses, reasons = scoring.score(
      {"right": right, "length": length}, PROBLEMS,
      [text("yes"), text("nope")])
  assert values.dtype == np.float32 and not reasons
  np.testing.assert_array_equal(values, [[1, np.nan], [0, 4]])
  assert [[STATUSES[code] for code in row] for row in statuses] == [
      ["ok", "not_applicable"], ["ok", "ok"]]
  np.testing.assert_allclose(
      advantages.combine_rewards(values, np.array([1.0, 0.5])), [1, 2])


def test_a_reward_sees_all_columns_and_only_the_policys_completion():
  seen = []
  def look(prompt, completion, **columns):
    seen.append((prompt, completion, columns))
    return np.float32(0.5)
  row = dict(id=1, prompt="p", completion="the demonstration", gold="g")
  assert score(look, "text", row) == (0.5, "ok")
  assert seen == [("p", "text", dict(id=1, gold="g"))]


def test_a_reward_is_given_of_a_completion_what_it_names():
  """And the answer in any case; what it does not name, **columns has not."""
  seen = {}
  def look(completion, *, thinking, finish_reason, num_tokens, **columns):
    seen.update(columns, completion=completion, thinking=thinking,
                num_tokens=num_tokens, finish_reason=finish_reason)
    return 0
  scoring.score({"look": look}, [dict(id=1)], [Completion(
      "so 3", thinking="1 + 2", full_text="<a> 1 + 2 <b> so 3", num_tokens=9,
      finish_reason="length")])
  assert seen == dict(
      prompt="", completion="so 3", thinking="1 + 2", num_tokens=9,
      finish_reason="length", id=1)


def test_a_conversation_has_an_empty_prompt_and_its_messages():
  seen = {}
  def look(prompt, completion, *, messages, **columns):
    seen.update(prompt=prompt, messages=messages)
    return 1
  messages = [dict(role="user", content="hello")]
  score(look, "", dict(id=1, messages=messages))
  assert seen == dict(prompt="", messages=messages)


@pytest.mark.parametrize("value, shown", [
    ("1", "'1'"), (float("nan"), "nan"), (float("inf"), "inf"),
    ([1.0], r"\[1.0\]"), (10**400, "an int of 1329 bits"),
    pytest.param(10**6000, "an int of 19932 bits", id="huge"),
    (1e300, r"1e\+300"),
    (-1e39, r"-1e\+39"), (1j, "1j"),
    (np.complex64(1), r"np.complex64\(1\+0j\)"),
    ({1: 2}, "{1: 2}"), ("long" * 1000, "'longlong.{1,100}longlong'"),
    (Score(1e300), r"1e\+300"), (Score("1"), "'1'")])
def test_what_is_no_finite_number_is_an_error(value, shown):
  message = rf"^The reward odd returned .?{shown}.? on problem 7; a finite"
  with pytest.raises(ValueError, match=message) as error:
    score(lambda **columns: value)
  assert len(str(error.value)) < 300


@pytest.mark.parametrize("value, number", [
    (True, 1), (np.bool_(True), 1), (3, 3), (np.int64(-2), -2), (0.5, 0.5),
    (np.float16(0.5), 0.5), (3e38, np.float32(3e38)), (Score(2), 2),
    (Grade(1.0, "ok", "5"), 1), (Grade(0.0, "wrong", "6"), 0),
    (Grade(0.0, "unparseable", None), 0)])
def test_what_is_a_number(value, number):
  assert score(lambda **columns: value) == (number, "ok")


@pytest.mark.parametrize("value, status", [
    (None, "not_applicable"), (Score(None, "not_applicable"), "not_applicable"),
    (Score(None, "timeout", "5 s"), "timeout"), (Score(1, "error"), "error"),
    (Grade(0.0, "timeout", "5"), "timeout"),
    (Grade(0.0, "error", "5"), "error")])
def test_what_could_not_be_judged_has_no_number(value, status):
  """A grader's time-out was a 0 that nobody could tell from a wrong answer."""
  number, found = score(lambda **columns: value)
  assert np.isnan(number) and found == status


def test_a_completion_is_scored_if_all_that_apply_could_judge():
  statuses = np.array([[scoring.OK, scoring.OK],
                       [scoring.OK, scoring.NOT_APPLICABLE],
                       [scoring.NOT_APPLICABLE, scoring.NOT_APPLICABLE],
                       [scoring.OK, scoring.TIMEOUT],
                       [scoring.ERROR, scoring.NOT_APPLICABLE]])
  assert scoring.scored(statuses).tolist() == [True, True, False, False, False]


def test_a_status_that_there_is_not_is_an_error():
  with pytest.raises(ValueError, match="status 'late' on problem 7; one of ok"):
    score(lambda **columns: Score(None, "late"))
  with pytest.raises(ValueError, match="ok without a value on problem 7"):
    score(lambda **columns: Score(None))


def test_a_reward_that_fails_is_named_with_its_problem():
  def broken(prompt, completion, **columns):
    return 1 / len(completion)
  with pytest.raises(
      ValueError, match="broken failed on problem 7 with ZeroDivisionError"):
    score(broken, "", name="broken")


@pytest.mark.parametrize("leave, said", [
    (lambda: sys.exit(0), "SystemExit: 0"), (lambda: sys.exit(), "SystemExit"),
    (lambda: os._exit(0), r"os\._exit\(0\)"), (quit, "SystemExit"),
    (lambda: next(iter(())), "StopIteration"),
    (lambda: asyncio.run(cancelled()), "CancelledError")])
def test_a_reward_that_leaves_is_a_failure_of_the_run(leave, said):
  """Status 0 is what a launcher takes for finished."""
  before = os._exit
  with pytest.raises(ValueError, match=f"odd failed on problem 7 with {said}"):
    score(lambda **columns: leave())
  assert os._exit is before


async def cancelled():
  raise asyncio.CancelledError


def test_a_child_that_a_reward_forks_may_leave():
  def forks(**columns):
    child = os.fork()
    if not child:
      os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  assert score(forks) == (3, "ok")


def test_gold_is_what_the_verifier_is_checked_with():
  told = []
  scoring.check_gold("right", right, PROBLEMS, progress=told.append)
  assert told == [0, 1]
  wrong = [*PROBLEMS, dict(id=9, prompt="d", gold="yes", wanted="no")]
  with pytest.raises(ValueError, match=r"gives 0\.0 to problem 9's own gold"):
    scoring.check_gold("right", right, wrong)
  with pytest.raises(ValueError, match=r"gives None to problem 7's own gold"):
    scoring.check_gold("length", length, PROBLEMS)
  for row in (dict(id=3, prompt="a"), dict(id=3, prompt="a", gold=None)):
    with pytest.raises(ValueError, match="Problem 3 has no text as its column"):
      scoring.check_gold("right", right, [row])


def test_a_gold_that_could_not_be_judged_is_asked_again():
  """A busy machine is late once; that is not the problem's fault."""
  late = iter([Score(None, "timeout", "5 s"), 1, 1])
  scoring.check_gold("late", lambda **columns: next(late), PROBLEMS)
  with pytest.raises(ValueError, match=(
      "The verifier late could not judge problem 7's own gold answer 'yes', "
      r"twice: timeout, 5 s.*machine that is less busy")):
    scoring.check_gold(
        "late", lambda **columns: Score(None, "timeout", "5 s"), PROBLEMS)


def test_a_reward_takes_the_columns_of_all_problems():
  """It is not called; the last problem of many lacks what it needs."""
  def needs(prompt, completion, *, wanted, **columns):
    raise AssertionError
  rows = [*PROBLEMS, dict(id=9, prompt="e", gold="yes")]
  scoring.check_arguments("needs", needs, PROBLEMS)
  with pytest.raises(ValueError, match=(
      r"needs does not take the columns of problem 9 \(gold, id, prompt\): "
      "missing a required argument: 'wanted'")):
    scoring.check_arguments("needs", needs, rows)
  def few(prompt, completion, wanted):
    raise AssertionError
  with pytest.raises(ValueError, match=r"few does not take .* problem 7"):
    scoring.check_arguments("few", few, PROBLEMS)


def test_a_column_is_not_taken_for_a_part_of_the_completion():
  def looks(prompt, completion, *, thinking, **columns):
    raise AssertionError
  rows = [*PROBLEMS, dict(id=9, prompt="", gold="", thinking="of the teacher")]
  with pytest.raises(ValueError, match=(
      "looks asks for thinking of the completion, and problem 9 has a column")):
    scoring.check_arguments("looks", looks, rows)
  scoring.check_arguments("right", length, rows)


@pytest.mark.parametrize("answer", ["so it may be 18 but", ""])
def test_an_empty_answer_is_given_to_graders(answer):
  """Thinking that was never left is none, whatever stands in it."""
  row = dict(id=1, prompt="", answer="18")
  [[value]] = scoring.score({"gsm8k": gsm8k.reward}, [row], [
      Completion("", thinking=answer, full_text=answer)]).values
  assert value == 0
  assert scoring.extract("gsm8k", gsm8k.extract, [row], [Completion("")]) == [
      None]


def test_an_extractor_is_held_to_a_text():
  extract = lambda function: scoring.extract(
      "cut", function, PROBLEMS, [text("a b"), text("c")])
  assert extract(lambda text: text[2:] or None) == ["b", None]
  with pytest.raises(ValueError, match="cut returned 3 on problem 7; a text"):
    extract(lambda text: 3)
  with pytest.raises(ValueError, match=(
      "cut failed on problem 8 with IndexError")):
    extract(lambda text: text.split()[1])


@pytest.mark.parametrize("ids, message", [
    ([1, 2, 1], "Two problems of the task have id=1"),
    ([0, "a"], "Problem 1 of the task has id='a'"),
    ([None], "id=None"), ([True], "id=True"), ([2**31], "id=2147483648")])
def test_problems_are_told_apart_by_their_id(ids, message):
  """A group is what has one id, so two of one would be one group."""
  with pytest.raises(ValueError, match=message):
    scoring.check_ids([dict(id=value) for value in ids])
  scoring.check_ids([dict(id=value) for value in (0, np.int32(1), -2**31)])
