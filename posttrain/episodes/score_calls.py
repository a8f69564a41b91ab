"""Score calls: rewards and extractors as calls to workers, and their results.

A reward is called for each completion, unless `scoring.over` declares another
scope: the calls of a group, or of those that wait, are then made as one.
"""

import collections
import functools
import itertools
import json
from collections.abc import (
  Callable,
  Hashable,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any, NamedTuple, TypeVar

import numpy as np

from posttrain.episodes.call import Call, Gather, Result
from posttrain.episodes.workers import WorkerPool
from posttrain.tasks import loading, scoring
from posttrain.tasks.scoring import Score

Problem = Mapping[str, Any]
T = TypeVar("T", Score, "Extracted")
MODULE = scoring.__name__
AHEAD = 64  # Gold answers that are with the workers at once.


def calls(
    names: Sequence[str], problem: Problem, completion: scoring.Completion, *,
    group: tuple[Hashable, int],
) -> list[Call]:
  """Makes the calls that score one completion, one for each reward.

  Args:
    names: K rewards, as "module:function" or "file.py:function".
    problem: its columns.
    completion: what is judged.
    group: the key of the completion's group in the batch, and the number of
      completions in it, all of which are to be scored.
  """
  return [_call(name, problem, completion, group) for name in names]


def _call(
    name: str, problem: Problem, completion: scoring.Completion,
    group: tuple[Hashable, int],
) -> Call:
  scope = _scope_of(name)
  args = (name, dict(problem), completion)
  if scope == "sample":
    return Call(f"{MODULE}:call", args)
  key, size = group if scope == "group" else (None, 0)
  return Call(
      f"{MODULE}:call_joined", args, gather=Gather((name, key), size))


@functools.cache
def _scope_of(name: str) -> str:
  """Finds the scope once: to look a file up takes as long as a quick call."""
  return scoring.scope_of(loading.load_function(name))


def extract_call(name: str, answer: str) -> Call:
  """Makes the call of an extractor on an answer."""
  return Call(f"{MODULE}:extract", (name, answer))


def score_of(result: Result) -> Score:
  """Converts the result of a call of a reward to a score."""
  if result.status != "ok":
    return Score(None, result.status, result.reason)
  # Task code shares a process with what writes the reply.
  match result.value:
    case [None, "not_applicable" | "timeout" | "error" as status, str(reason)]:
      return Score(None, status, reason)
    case [int() | float() as value, "ok", str(reason)] if (
        abs(value) <= scoring.LARGEST):
      return Score(float(value), "ok", reason)
  return Score(None, "error", _no_reply(result))


class Extracted(NamedTuple):
  """Answer of an extractor.

  Attributes:
    answer: None without one.
    status: "ok", "timeout" or "error".
    reason: why it could not be extracted, for people.
  """

  answer: str | None
  status: str = "ok"
  reason: str = ""


def extracted(result: Result) -> Extracted:
  """Converts the result of a call of an extractor to its answer."""
  if result.status != "ok":
    return Extracted(None, result.status, result.reason)
  match result.value:
    case [None | str() as answer, "ok", str()]:
      return Extracted(answer)
    case [None, "error", str(reason)]:
      return Extracted(None, "error", reason)
  return Extracted(None, "error", _no_reply(result))


def describe_failed(
    answers: Sequence[Extracted], problems: Sequence[Problem]) -> str:
  """Says in a line which answers could not be extracted; "" where all could."""
  failed = [row for row, each in enumerate(answers) if each.status != "ok"]
  if not failed:
    return ""
  counts = collections.Counter(answers[row].status for row in failed)
  told = ", ".join(f"{status} {count}" for status, count in counts.items())
  return (f"{len(failed)} of {len(answers)} answers could not be extracted "
          f"({told}); the first is of problem {problems[failed[0]]['id']}: "
          f"{' '.join(answers[failed[0]].reason.split())[:200]}")


def _no_reply(result: Result) -> str:
  return ("the worker's reply has another form: "
          f"{json.dumps(result.value)[:80]}")


def of_results(results: Sequence[Sequence[Result]]) -> scoring.Scores:
  """Converts the results of B completions under K rewards to their scores."""
  shape = len(results), len(results[0]) if results else 0
  values = np.full(shape, np.nan, np.float32)
  statuses = np.zeros(shape, np.int8)
  reasons = []
  for b, k in itertools.product(*map(range, shape)):
    found = score_of(results[b][k])
    statuses[b, k] = scoring.STATUSES.index(found.status)
    if found.value is not None:
      values[b, k] = found.value
    if statuses[b, k] in scoring.UNSCORED:
      reasons.append((b, k, found.reason))
  return scoring.Scores(values, statuses, reasons)


# Checks of all problems, before the first step.


def check_gold(
    name: str, problems: Sequence[Problem], pool: WorkerPool, *,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
  """Raises ValueError if a problem's own `gold` does not score 1.

  A reward over a group or a batch is given each gold alone.

  Args:
    name: the verifier: the first reward of a stage, as "module:function".
    pool: worker pool that makes the calls.
    progress: takes the number of problems that are checked.
  """
  asked = (Call(f"{MODULE}:call", (
      name, dict(problem), _gold_of(f"the verifier {name}", problem)))
           for problem in problems)
  for done, (problem, found) in enumerate(zip(
      problems, _in_order(asked, pool, score_of), strict=True)):
    progress(done)
    gold = _shown_gold(problem)
    if scoring.STATUSES.index(found.status) in scoring.UNSCORED:
      raise ValueError(
          f"The verifier {name} could not judge {gold}, twice: "
          f"{found.status}, {found.reason or 'no reason given'}. A right "
          f"answer could not be rewarded. {REMEDIES[found.status]}")
    if found.value != 1:
      raise ValueError(
          f"The verifier {name} gives {found.value} to {gold}, where 1 is "
          "needed. Mend the problem (gold is the answer alone, without "
          "thinking) or the verifier: a policy cannot be taught by a verifier "
          "that rejects the right answer.")


def check_extract(
    name: str, problems: Sequence[Problem], pool: WorkerPool, *,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
  """Raises ValueError if an extractor fails on a problem's own `gold`.

  Its arguments are those of `check_gold`.
  """
  asked = (
      extract_call(name, _gold_of(f"the extractor {name}", problem).answer)
      for problem in problems)
  for done, (problem, found) in enumerate(zip(
      problems, _in_order(asked, pool, extracted), strict=True)):
    progress(done)
    if found.status != "ok":
      raise ValueError(
          f"The extractor {name} could not read {_shown_gold(problem)}, twice: "
          f"{found.status}, {found.reason}. {REMEDIES[found.status]}")


REMEDIES = {
    "timeout": "Raise workers.seconds, take a machine that is less busy, or "
               "leave the problem out.",
    "error": "Mend the function or the problem, or leave the problem out."}


def _gold_of(who: str, problem: Problem) -> scoring.Completion:
  gold = problem.get("gold")
  if not isinstance(gold, str):
    raise ValueError(
        f"Problem {problem.get('id')} has no text as its column gold, with "
        f"which {who} is checked. Add an answer that scores 1.")
  return scoring.Completion(gold, full_text=gold)


def _shown_gold(problem: Problem) -> str:
  return (f"problem {problem.get('id')}'s own gold answer "
          f"{problem['gold'][-80:]!r}")


def _in_order(
    asked: Iterable[Call], pool: WorkerPool, convert: Callable[[Result], T],
) -> Iterator[T]:
  """Makes calls, some ahead; yields what they gave in the calls' order.

  What could not be judged is asked once more: a busy machine may be late.
  """
  calls = enumerate(asked)
  waiting: dict[int, tuple[int, Call]] = {}  # By the pool's number of the job.
  done: dict[int, T] = {}
  again: set[int] = set()
  try:
    for number in itertools.count():
      while number not in done:
        room = max(0, AHEAD - len(waiting) - len(done))
        for at, call in itertools.islice(calls, room):
          waiting[pool.submit(call)] = at, call
        if not waiting:
          return
        for job, result in pool.poll(1.0):
          at, call = waiting.pop(job)
          found = convert(result)
          if found.status in ("timeout", "error") and at not in again:
            again.add(at)
            waiting[pool.submit(call)] = at, call
          else:
            done[at] = found
      yield done.pop(number)
  finally:
    if waiting:
      pool.cancel()
