"""A pool that answers in any order, and what a hostile worker may reply."""

import random

import numpy as np
import pytest

from posttrain.episodes import score_calls, workers
from posttrain.episodes.call import Gather, Result
from posttrain.tasks import loading, scoring
from posttrain.tasks.scoring import Completion, Score

HERE = f"{__file__}:"
ROWS = [dict(id=7, prompt="a b", gold="yes", wanted="yes"),
        dict(id=8, prompt="c", gold="no", wanted="no")]


def right(prompt, completion, *, wanted, **columns):
  return completion == wanted


def silent(prompt, completion, **columns):
  return None


@scoring.over("group")
def best(prompts, completions, **columns):
  return [float(text == max(completions, key=len)) for text in completions]


@scoring.over("batch")
def together(prompts, completions, **columns):
  return [len(completions)] * len(completions)


def second(completion):
  return completion.split()[1]


class Pool:
  """Makes calls here and answers them in a random order.

  Attributes:
    late: how often the next calls with these arguments time out.
    most: the most jobs that were there at once.
  """

  def __init__(self, late=()):
    self.late, self.most, self.canceled = dict(late), 0, False
    self.jobs, self.made, self.random = {}, 0, random.Random(0)

  def submit(self, call):
    self.jobs[self.made] = call
    self.made += 1
    self.most = max(self.most, len(self.jobs))
    return self.made - 1

  def poll(self, timeout):
    number = self.random.choice(list(self.jobs))
    call = self.jobs.pop(number)
    key = call.args[1]["id"] if isinstance(call.args[1], dict) else None
    if self.late.get(key):
      self.late[key] -= 1
      return [(number, Result("timeout", reason="5 s"))]
    value = loading.load_function(call.function)(*call.args)
    return [(number, Result("ok", value))]

  def cancel(self):
    self.jobs.clear()
    self.canceled = True


def answer(call):
  return loading.load_function(call.function)(*call.args)


def test_a_call_for_each_reward_by_its_scope():
  names = [HERE + name for name in ("right", "best", "together")]
  one, group, batch = score_calls.calls(
      names, ROWS[0], Completion("yes"), group=((3, 7), 4))
  assert one.gather is None
  assert group.gather == Gather((HERE + "best", (3, 7)), 4)
  assert batch.gather == Gather((HERE + "together", None), 0)
  assert answer(one) == [1, "ok", ""]
  other, *_ = score_calls.calls(
      [HERE + "best"], ROWS[0], Completion("longer"), group=((3, 7), 4))
  # One list, of the arguments of each.
  assert loading.load_function(group.function)([group.args, other.args]) == [
      [0, "ok", ""], [1, "ok", ""]]


@pytest.mark.parametrize("result, score", [
    (Result("ok", [1, "ok", ""]), Score(1.0)),
    (Result("ok", [0.25, "ok", ""]), Score(0.25)),
    (Result("ok", [None, "not_applicable", ""]), Score(None, "not_applicable")),
    (Result("ok", [None, "timeout", "5 s"]), Score(None, "timeout", "5 s")),
    (Result("timeout", None, "10 s"), Score(None, "timeout", "10 s")),
    (Result("error", None, "signal 9"), Score(None, "error", "signal 9"))])
def test_the_score_of_a_result(result, score):
  assert score_calls.score_of(result) == score


@pytest.mark.parametrize("value", [
    None, 1, "ok", [], [1], [1, "ok"], [1, "ok", "", ""], [None, "ok", ""],
    ["1", "ok", ""], [1, "late", ""], [1, "error", ""], [10**400, "ok", ""],
    [float("nan"), "ok", ""], [float("inf"), "ok", ""], [1e39, "ok", ""],
    [1, "ok", None], {"0": 1}, [[1], "ok", ""]])
def test_what_a_worker_must_not_reply(value):
  """A reward shares the process with what writes the reply."""
  found = score_calls.score_of(Result("ok", value))
  assert found[:2] == (None, "error") and "another form" in found.reason


def test_extracted():
  extracted = lambda *args: tuple(score_calls.extracted(Result(*args)))
  assert extracted("ok", ["5", "ok", ""]) == ("5", "ok", "")
  assert extracted("ok", [None, "ok", ""]) == (None, "ok", "")
  assert extracted("ok", [None, "error", "why"]) == (None, "error", "why")
  assert extracted("timeout", None, "10 s") == (None, "timeout", "10 s")
  for value in ([5, "ok", ""], ["5", "error", ""], "5"):
    assert extracted("ok", value)[:2] == (None, "error")


def test_failed_extractors_are_told():
  fine, late = score_calls.Extracted("5"), score_calls.Extracted(
      None, "timeout", "more than\n10 s")
  rows = [dict(id=7), dict(id=8), dict(id=9)]
  assert score_calls.describe_failed([fine, fine], rows[:2]) == ""
  assert score_calls.describe_failed([fine, late, late], rows) == (
      "2 of 3 answers could not be extracted (timeout 2); the first is of "
      "problem 8: more than 10 s")


def test_arrays_of_scores():
  scores = score_calls.of_results([
      [Result("ok", [1, "ok", ""]), Result("ok", [None, "not_applicable", ""])],
      [Result("timeout", reason="10 s"), Result("ok", [0.5, "ok", ""])]])
  np.testing.assert_array_equal(scores.values, [[1, np.nan], [np.nan, 0.5]])
  assert scores.values.dtype == np.float32
  assert scores.statuses.tolist() == [[0, 1], [2, 0]]
  assert scores.reasons == [(1, 0, "10 s")]


def many(count):
  return [dict(id=i, prompt="", gold=f"{i}", wanted=f"{i}")
          for i in range(count)]


def test_gold_is_what_the_verifier_is_checked_with():
  told, pool = [], Pool()
  score_calls.check_gold(
      HERE + "right", many(300), pool, progress=told.append)
  assert told == list(range(300)) and pool.made == 300
  assert pool.most <= score_calls.AHEAD and not pool.canceled
  # Alone in its group, each is the best.
  score_calls.check_gold(HERE + "best", many(3), Pool())


def test_the_first_gold_that_is_refused_is_told():
  rows = many(100)
  for i in (70, 71, 40):
    rows[i]["wanted"] = "other"
  pool = Pool()
  with pytest.raises(ValueError, match=r"gives 0\.0 to problem 40's own gold"):
    score_calls.check_gold(HERE + "right", rows, pool)
  assert pool.canceled and not pool.jobs
  with pytest.raises(ValueError, match=r"gives None to problem 7's own gold"):
    score_calls.check_gold(HERE + "silent", ROWS, Pool())
  for row in (dict(id=3, prompt="a"), dict(id=3, prompt="a", gold=None)):
    with pytest.raises(ValueError, match="Problem 3 has no text as its column"):
      score_calls.check_gold(HERE + "right", [row], Pool())


def test_a_gold_that_could_not_be_judged_is_asked_again():
  """A busy machine is late once; that is not the problem's fault."""
  pool = Pool(late={3: 1, 5: 1})
  score_calls.check_gold(HERE + "right", many(9), pool)
  assert pool.made == 11
  with pytest.raises(ValueError, match=(
      "right could not judge problem 5's own gold answer '5', twice: timeout, "
      r"5 s\. .*Raise workers\.seconds")):
    score_calls.check_gold(HERE + "right", many(9), Pool(late={5: 2}))
  with pytest.raises(ValueError, match=(
      r"could not judge problem 1's .*twice: error, TypeError: .*'wanted'.*"
      r"Mend the function")):
    score_calls.check_gold(HERE + "right", [dict(id=1, gold="1")], Pool())


def test_an_extractor_reads_every_gold():
  rows = [dict(id=1, gold="a b"), dict(id=2, gold="a")]
  score_calls.check_extract(HERE + "second", rows[:1], Pool())
  with pytest.raises(ValueError, match=(
      "second could not read problem 2's own gold answer 'a', twice: error, "
      "IndexError")):
    score_calls.check_extract(HERE + "second", rows, Pool())


def test_real_workers():
  """Formulas by hand; one that never ends does not stop the others."""
  reward = "posttrain.tasks.math500:reward"
  asked = [("7", r"\boxed{7}"), ("7", r"\boxed{9^{9^{9^{9}}}}"),
           ("7", r"\boxed{8}"), (r"\frac{1}{2}", r"so \boxed{0.5}"), ("7", "")]
  found, jobs = {}, {}
  with workers.WorkerPool(workers.Settings(seconds=1.0)) as pool:
    score_calls.check_gold(
        reward, [dict(id=1, gold=r"\boxed{x+1}", answer="1+x")], pool)
    score_calls.check_extract(
        "posttrain.tasks.gsm8k:extract", [dict(id=1, gold="#### 5")], pool)
    for row, (answer, said) in enumerate(asked):
      [call] = score_calls.calls(
          [reward], dict(id=row, answer=answer), Completion(said), group=(0, 5))
      jobs[pool.submit(call)] = row
    while pool.pending:
      found |= {jobs[job]: result for job, result in pool.poll(1.0)}
  scores = [score_calls.score_of(found[row]) for row in range(len(asked))]
  assert [score.status for score in scores] == [
      "ok", "timeout", "ok", "ok", "ok"]
  assert [score.value for score in scores] == [1, None, 0, 1, 0]
  assert not any(found[row].output for row in range(len(asked)))
