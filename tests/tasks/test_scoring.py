"""Rewards are called with every column; what they may not return."""

import asyncio
import json
import re
import sys
import types

import numpy as np
import pytest

from posttrain.tasks import checks, scoring
from posttrain.tasks.grading import Grade
from posttrain.tasks.scoring import Completion, Score

PROBLEMS = [
    dict(id=7, prompt="a b", gold="yes", wanted="yes"),
    dict(id=8, prompt="c", gold="no", wanted="no")]


def right(prompt, completion, *, wanted, **columns):
  return completion == wanted


def length(prompt, completion, **columns):
  return len(completion) if prompt == "c" else None


def text(answer):
  return Completion(answer, full_text=answer)


def by_name(reward):
  """A name that stands for the function."""
  sys.modules["odd_rewards"] = module = types.ModuleType("odd_rewards")
  module.odd = reward
  return "odd_rewards:odd"


def call(reward, problem=PROBLEMS[0], completion=None):
  """Value, status and reason, as the run gets them from a worker."""
  return json.loads(json.dumps(scoring.call(
      by_name(reward), problem, completion or text("x"))))


def score(reward, completion="x", problem=PROBLEMS[0]):
  """The value and the status of one reward on one completion."""
  return tuple(call(reward, problem, text(completion))[:2])


def test_scores_are_those_of_the_functions_one_by_one():
  assert score(right, "yes", PROBLEMS[0]) == (1, "ok")
  assert score(right, "nope", PROBLEMS[1]) == (0, "ok")
  assert score(length, "yes", PROBLEMS[0]) == (None, "not_applicable")
  assert score(length, "nope", PROBLEMS[1]) == (4, "ok")


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
  call(look, dict(id=1), Completion(
      "so 3", thinking="1 + 2", full_text="<a> 1 + 2 <b> so 3", num_tokens=9,
      finish_reason="length"))
  assert seen == dict(
      prompt="", completion="so 3", thinking="1 + 2", num_tokens=9,
      finish_reason="length", id=1)


def test_messages_are_the_conversation_for_whom_names_them():
  seen = []
  def look(prompt, completion, *, messages, **columns):
    seen.append((prompt, messages))
    return 1
  asked = [dict(role="user", content="hello")]
  more = [dict(role="assistant", content="2 + 2"),
          dict(role="tool", content="4"), dict(role="assistant", content="so")]
  call(look, dict(id=1, messages=asked), Completion("so", messages=more))
  call(look, dict(id=1, messages=asked), Completion("hi"))
  call(look, dict(id=1, prompt="hello"), Completion("hi"))
  said = [dict(role="assistant", content="hi")]
  assert seen == [
      ("", asked + more), ("", asked + said), ("hello", asked + said)]
  assert score(lambda **columns: columns["messages"] == asked, "",
               dict(id=1, messages=asked)) == (1, "ok")


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
  found, status, reason = call(lambda **columns: value)
  assert found is None and status == "error" and len(reason) < 300
  assert re.match(rf"found .?{shown}.?, and a finite number", reason)


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
  assert score(lambda **columns: value) == (None, status)


def test_a_completion_is_scored_if_all_that_apply_could_judge():
  statuses = np.array([[scoring.OK, scoring.OK],
                       [scoring.OK, scoring.NOT_APPLICABLE],
                       [scoring.NOT_APPLICABLE, scoring.NOT_APPLICABLE],
                       [scoring.OK, scoring.TIMEOUT],
                       [scoring.ERROR, scoring.NOT_APPLICABLE]])
  assert scoring.scored(statuses).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("found, reason", [
    (Score(None, "late"), "found the status 'late', and one of ok"),
    (Score(None), "found the status ok without a value")])
def test_a_status_that_there_is_not_is_an_error(found, reason):
  value, status, said = call(lambda **columns: found)
  assert value is None and status == "error" and said.startswith(reason)


def test_a_reward_that_fails_is_told_with_its_line(capsys):
  def broken(prompt, completion, **columns):
    return 1 / len(completion)
  line = broken.__code__.co_firstlineno + 1
  assert call(broken, PROBLEMS[0], Completion("")) == [
      None, "error",
      f"ZeroDivisionError: division by zero (test_scoring.py, line {line})"]
  assert "1 / len(completion)" in capsys.readouterr().err


@pytest.mark.parametrize("leave, said", [
    (lambda: sys.exit(0), "SystemExit: 0"), (lambda: sys.exit(), "SystemExit"),
    (quit, "SystemExit"), (lambda: next(iter(())), "StopIteration"),
    (lambda: asyncio.run(cancelled()), "CancelledError")])
def test_a_reward_that_leaves_is_an_error(leave, said):
  value, status, reason = call(lambda **columns: leave())
  assert value is None and status == "error" and reason.startswith(said)


async def cancelled():
  raise asyncio.CancelledError


def joined(reward, members):
  name = by_name(reward)
  return json.loads(json.dumps(scoring.call_joined(
      [(name, *member) for member in members])))


def test_a_group_is_judged_at_once_in_lists():
  """Oracle: TRL's convention, spelled out by hand."""
  seen = {}
  @scoring.over("group")
  def best(prompts, completions, *, wanted, num_tokens, **columns):
    seen.update(columns, prompts=prompts, completions=completions,
                wanted=wanted, num_tokens=num_tokens)
    longest = max(num_tokens)
    return [Score(None, "timeout", "late") if n == 0 else n == longest
            for n in num_tokens]
  members = [(PROBLEMS[0], Completion("a", num_tokens=3)),
             (PROBLEMS[1], Completion("b", num_tokens=0)),
             (PROBLEMS[0] | dict(more=5), Completion("c", num_tokens=4))]
  assert joined(best, members) == [
      [0, "ok", ""], [None, "timeout", "late"], [1, "ok", ""]]
  assert seen == dict(
      prompts=["a b", "c", "a b"], completions=["a", "b", "c"],
      wanted=["yes", "no", "yes"], num_tokens=[3, 0, 4], id=[7, 8, 7],
      gold=["yes", "no", "yes"], more=[None, None, 5])
  # Alone it is a group of one: a gold answer.
  assert call(best, PROBLEMS[0], Completion("", num_tokens=2))[:2] == [1, "ok"]


@pytest.mark.parametrize("found, statuses", [
    ([1, "2"], ["ok", "error"]), ((0, None), ["ok", "not_applicable"]),
    (np.array([1, np.nan], np.float32), ["ok", "error"]),
    ([1], ["error"] * 2), ([1, 2, 3], ["error"] * 2), ("12", ["error"] * 2),
    (3, ["error"] * 2), (None, ["error"] * 2)])
def test_what_a_group_may_get(found, statuses):
  result = joined(
      scoring.over("batch")(lambda **columns: found),
      [(row, text("x")) for row in PROBLEMS])
  assert [status for _, status, _ in result] == statuses


def test_a_scope_is_one_of_three():
  with pytest.raises(ValueError, match="scope is 'all', and one of sample"):
    scoring.over("all")
  assert scoring.scope_of(right) == "sample"


def test_a_reward_takes_the_columns_of_all_problems():
  """It is not called; the last problem of many lacks what it needs."""
  def needs(prompt, completion, *, wanted, **columns):
    raise AssertionError
  rows = [*PROBLEMS, dict(id=9, prompt="e", gold="yes")]
  checks.check_arguments("needs", needs, PROBLEMS)
  with pytest.raises(ValueError, match=(
      r"needs does not take the columns of problem 9 \(gold, id, prompt\): "
      "missing a required argument: 'wanted'")):
    checks.check_arguments("needs", needs, rows)
  def few(prompt, completion, wanted):
    raise AssertionError
  with pytest.raises(ValueError, match=r"few does not take .* problem 7"):
    checks.check_arguments("few", few, PROBLEMS)


def test_a_column_is_not_taken_for_a_part_of_the_completion():
  def looks(prompt, completion, *, thinking, **columns):
    raise AssertionError
  rows = [*PROBLEMS, dict(id=9, prompt="", gold="", thinking="of the teacher")]
  with pytest.raises(ValueError, match=(
      "looks asks for thinking of the completion, and problem 9 has a column")):
    checks.check_arguments("looks", looks, rows)
  checks.check_arguments("right", length, rows)


@pytest.mark.parametrize("answer", ["so it may be 18 but", ""])
def test_an_empty_answer_is_given_to_graders(answer):
  """Thinking that was never left is none, whatever stands in it."""
  row = dict(id=1, prompt="", answer="18")
  assert scoring.call(
      "posttrain.tasks.gsm8k:reward", row, Completion(
          "", thinking=answer, full_text=answer))[0] == 0
  assert scoring.extract("posttrain.tasks.gsm8k:extract", "") == [
      None, "ok", ""]


def test_an_extractor_is_held_to_a_text():
  extract = lambda function, answer: scoring.extract(by_name(function), answer)
  cut = lambda text: text[2:] or None
  assert extract(cut, "a b") == ["b", "ok", ""]
  assert extract(cut, "c") == [None, "ok", ""]
  assert extract(lambda text: 3, "c") == [
      None, "error", "found 3, and a text or None is needed"]
  found = extract(lambda text: text.split()[1], "c")
  assert found[:2] == [None, "error"] and found[2].startswith("IndexError")


@pytest.mark.parametrize("ids, message", [
    ([1, 2, 1], "Two problems of the task have id=1"),
    ([0, "a"], "Problem 1 of the task has id='a'"),
    ([None], "id=None"), ([True], "id=True"), ([2**31], "id=2147483648")])
def test_problems_are_told_apart_by_their_id(ids, message):
  """A group is what has one id, so two of one would be one group."""
  with pytest.raises(ValueError, match=message):
    checks.check_ids([dict(id=value) for value in ids])
  checks.check_ids([dict(id=value) for value in (0, np.int32(1), -2**31)])
