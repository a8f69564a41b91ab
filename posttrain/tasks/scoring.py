"""Scoring: plain reward functions give scores, each with a status.

A reward is `def reward(prompt, completion, **columns) -> float | None`. Its
`completion` is the answer alone: the text after the thinking, "" if the
thinking never ended, and all of the text if there is no thinking. If it has
these parameters it is also given

  thinking       the text of the thinking section, without its delimiters
  full_text      the whole completion, thinking and delimiters included
  num_tokens     number of tokens of the whole completion
  finish_reason  why it ended: "eos", "budget", "length", ...

None means that the reward does not apply. A `Score`, or a grader's `Grade`, may
say that the completion could not be judged (`timeout`, `error`); it then leaves
its group and is counted. An exception is a failure of the run. The first reward
of a list is the verifier: it must give 1 to every problem's `gold`, which is an
answer.
"""

import collections
import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from posttrain.tasks import exits
from posttrain.tasks.grading import Grade

STATUSES = ("ok", "not_applicable", "timeout", "error")
OK, NOT_APPLICABLE, TIMEOUT, ERROR = range(len(STATUSES))
UNSCORED = (TIMEOUT, ERROR)
LARGEST = float(np.finfo(np.float32).max)  # The largest reward.


class Score(NamedTuple):
  """A score with a status; a reward may return it in place of a number.

  Attributes:
    value: None if the status is not "ok".
    status: one of `STATUSES`.
    reason: why there was a time-out or an error, for people.
  """

  value: float | None
  status: str = "ok"
  reason: str = ""


Reward = Callable[..., float | Score | Grade | None]


class Completion(NamedTuple):
  """Texts and facts of a completion for rewards; see the module's text."""

  answer: str
  thinking: str = ""
  full_text: str = ""
  num_tokens: int = 0
  finish_reason: str = "eos"


OFFERED = Completion._fields[1:]


class Scores(NamedTuple):
  """Scores of B completions under K rewards.

  Attributes:
    values: [B, K] float32, NaN where the status is not "ok".
    statuses: [B, K] int8, indices into `STATUSES`.
    reasons: row, column and reason of each score that could not be given.
  """

  values: np.ndarray
  statuses: np.ndarray
  reasons: list[tuple[int, int, str]]


def scored(statuses: np.ndarray) -> np.ndarray:
  """Marks completions that have a score: [B] bool, from [B, K] statuses.

  At least one reward must apply, and none may have failed: a sum without the
  failed one would be compared with other completions' full sums.
  """
  return (~np.isin(statuses, UNSCORED)).all(axis=1) & (
      statuses == OK).any(axis=1)


def score(
    rewards: Mapping[str, Reward], problems: Sequence[Mapping[str, Any]],
    completions: Sequence[Completion],
) -> Scores:
  """Calls every reward on every completion.

  Args:
    rewards: K reward functions, by name.
    problems: [B], the problem of each completion; a reward is given all of
      its columns.
    completions: [B].

  Raises:
    ValueError: a reward fails, tries to exit, or returns no finite number;
      names the reward, the problem and the value.
  """
  shape = len(completions), len(rewards)
  values = np.full(shape, np.nan, np.float32)
  statuses = np.zeros(shape, np.int8)
  reasons = []
  for b, (problem, completion) in enumerate(
      zip(problems, completions, strict=True)):
    for k, (name, reward) in enumerate(rewards.items()):
      found = _call(name, reward, problem, completion)
      statuses[b, k] = STATUSES.index(found.status)
      if found.value is not None:
        values[b, k] = found.value
      if statuses[b, k] in UNSCORED:
        reasons.append((b, k, found.reason))
  return Scores(values, statuses, reasons)


def extract(
    name: str, function: Callable[[str], str | None],
    problems: Sequence[Mapping[str, Any]], completions: Sequence[Completion],
) -> list[str | None]:
  """Extracts the answers in a canonical spelling, for majority votes.

  Raises:
    ValueError: the function fails, or returns neither a text nor None.
  """
  found = []
  for problem, completion in zip(problems, completions, strict=True):
    where = f"The extractor {name}"
    value = _guarded(where, problem, lambda: function(completion.answer))
    if not (value is None or isinstance(value, str)):
      raise ValueError(
          f"{where} returned {shown(value)} on problem {problem.get('id')}; a "
          "text or None is needed.")
    found.append(value)
  return found


def brevity(
    prompt: str, completion: str, *, full_text: str, **columns: Any) -> float:
  """Scores 1 / (1 + words), thinking included; `:debug` configs add it.

  A tiny model is never right, which would leave every group without a signal,
  and the learner would not run.
  """
  del prompt, completion, columns
  return 1 / (1 + len(full_text.split()))


def judged(grade: Grade) -> float | Score:
  """Converts a grade to a reward: its number, or a Score without one."""
  return grade.score if grade.status not in STATUSES[TIMEOUT:] else Score(
      None, grade.status, f"comparing {shown(grade.parsed)}")


def arguments(
    reward: Reward, problem: Mapping[str, Any], completion: Completion,
) -> dict[str, Any]:
  """Builds the keyword arguments of a reward."""
  columns = {key: value for key, value in problem.items()
             if key not in ("prompt", "completion")}
  # Only parameters that it names: a reward with **columns gets the problem's
  # columns, and not the completion's as well.
  columns |= {name: getattr(completion, name) for name in _named(reward)}
  return dict(prompt=problem.get("prompt", ""), completion=completion.answer,
              **columns)


def shown(value: Any) -> str:
  """Shows a value that unknown code returned: a short `repr`."""
  try:
    return _repr.repr(value)
  except Exception:  # Such as an integer of 5,000 digits.
    return f"<{type(value).__name__}>"


class _Repr(reprlib.Repr):

  def repr_int(self, x: int, level: int) -> str:
    if abs(x) >= 10**40:
      return f"<an int of {x.bit_length()} bits>"
    return repr(x)


_repr = _Repr()
_repr.maxstring = _repr.maxother = 80


def _named(reward: Reward) -> tuple[str, ...]:
  """Lists the parts of a completion that a reward has as parameters."""
  try:
    parameters = inspect.signature(reward).parameters
  except (TypeError, ValueError):  # A function in C has no signature.
    return ()
  return tuple(name for name in OFFERED if name in parameters)


def _guarded(
    where: str, problem: Mapping[str, Any], call: Callable[[], Any]) -> Any:
  """Calls a task's code, which may not end the run by itself."""
  try:
    with exits.raised():
      return call()
  except KeyboardInterrupt:
    raise
  # Also SystemExit, which would end an unfinished run with status 0.
  except BaseException as error:
    said = " ".join(str(error).split())[:500]
    kind = "" if isinstance(error, exits.Left) else f"{type(error).__name__}: "
    raise ValueError(
        f"{where} failed on problem {problem.get('id')} with {kind}{said}"
    ) from error


def _call(
    name: str, reward: Reward, problem: Mapping[str, Any],
    completion: Completion,
) -> Score:
  where = f"The reward {name}"
  found = _guarded(where, problem, lambda: reward(
      **arguments(reward, problem, completion)))
  # A grader's result may be returned as it is, and keeps its status.
  if isinstance(found, Grade):
    found = judged(found)
  if isinstance(found, Score):
    if found.status not in STATUSES:
      raise ValueError(
          f"{where} returned the status {shown(found.status)} on problem "
          f"{problem.get('id')}; one of {', '.join(STATUSES)} is needed.")
    if found.status != "ok":
      return found._replace(value=None)
    found = found.value
    if found is None:
      raise ValueError(
          f"{where} returned the status ok without a value on problem "
          f"{problem.get('id')}.")
  if found is None:
    return Score(None, "not_applicable")
  value = _number(found)
  if value is None:
    raise ValueError(
        f"{where} returned {shown(found)} on problem {problem.get('id')}; a "
        f"finite number (of at most {LARGEST:.2g}, as rewards are float32) or "
        "None is needed.")
  return Score(value)


def _number(value: Any) -> float | None:
  """Converts to float; None if it is no number, or too large for float32."""
  if not isinstance(value, (
      bool, int, float, np.bool_, np.integer, np.floating)):
    return None
  try:
    number = float(value)
  except OverflowError:  # 10**400.
    return None
  return number if abs(number) <= LARGEST else None


def describe_unscored(
    scores: Scores, problems: Sequence[Mapping[str, Any]],
    names: Sequence[str],
) -> str:
  """Says in a line what has no score; "" where all have one."""
  silent = int(
      (scores.statuses == NOT_APPLICABLE).all(axis=1).sum())
  if not scores.reasons:
    return (f"no reward applies to {silent} of {len(problems)} completions"
            if silent else "")
  counts = collections.Counter(
      f"{names[k]}: {STATUSES[scores.statuses[b, k]]}"
      for b, k, _ in scores.reasons)
  row, _, reason = scores.reasons[0]
  told = ", ".join(f"{name} {count}" for name, count in counts.items())
  lost = int((~scored(scores.statuses)).sum())
  return (f"{lost} of {len(problems)} completions have no score ({told}"
          + f", no reward applies: {silent}" * (silent > 0)
          + f"); the first is of problem {problems[row]['id']}"
          + (f": {' '.join(reason.split())[:200]}" if reason else ""))


# Checks of all problems, before the first step.


def check_ids(problems: Sequence[Mapping[str, Any]]) -> None:
  """Raises ValueError if two problems have the same `id`, or one has none.

  Groups and random bits go by it: two problems with one id would be one group.
  """
  seen = set()
  for number, problem in enumerate(problems):
    value = problem.get("id")
    if isinstance(value, bool) or not (
        isinstance(value, (int, np.integer)) and -2**31 <= value < 2**31):
      raise ValueError(
          f"Problem {number} of the task has id={shown(value)}, and a whole "
          "number of at most 31 bits is needed.")
    if value in seen:
      raise ValueError(
          f"Two problems of the task have id={value}. Give each its own.")
    seen.add(value)


def check_arguments(
    name: str, reward: Reward, problems: Sequence[Mapping[str, Any]],
) -> None:
  """Raises ValueError if a reward does not take a problem's columns.

  It is not called.
  """
  try:
    signature = inspect.signature(reward)
  except (TypeError, ValueError):  # A function in C has no signature.
    return
  # Once per set of columns: a task of a million problems has very few.
  fine = set()
  for problem in problems:
    columns = frozenset(problem)
    if columns in fine:
      continue
    twice = columns.intersection(_named(reward))
    if twice:
      raise ValueError(
          f"The reward {name} asks for {', '.join(sorted(twice))} of the "
          f"completion, and problem {problem.get('id')} has a column of that "
          "name. Rename the column.")
    try:
      signature.bind(**arguments(reward, problem, Completion("")))
    except TypeError as error:
      raise ValueError(
          f"The reward {name} does not take the columns of problem "
          f"{problem.get('id')} ({', '.join(sorted(columns))}): {error}. Give "
          "the problem what is missing, or let the reward take **columns."
      ) from error
    fine.add(columns)


def check_gold(
    name: str, verifier: Reward, problems: Sequence[Mapping[str, Any]], *,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
  """Raises ValueError if a problem's own `gold` does not score 1.

  Args:
    name: the verifier's name.
    verifier: the first reward of a stage.
    progress: takes the number of problems that are checked.
  """
  for done, problem in enumerate(problems):
    progress(done)
    if not isinstance(problem.get("gold"), str):
      raise ValueError(
          f"Problem {problem.get('id')} has no text as its column gold, with "
          f"which the verifier {name} is checked. Add an answer that scores "
          "1.")
    gold = problem["gold"]
    completion = Completion(gold, full_text=gold)
    found = _call(name, verifier, problem, completion)
    # A busy machine may make one comparison late: try once more.
    if STATUSES.index(found.status) in UNSCORED:
      found = _call(name, verifier, problem, completion)
    shown_gold = f"problem {problem.get('id')}'s own gold answer {gold[-80:]!r}"
    if STATUSES.index(found.status) in UNSCORED:
      raise ValueError(
          f"The verifier {name} could not judge {shown_gold}, twice: "
          f"{found.status}, {found.reason or 'no reason given'}. A right "
          "answer could not be rewarded. Give the verifier more time or a "
          "machine that is less busy, or leave the problem out.")
    if found.value != 1:
      raise ValueError(
          f"The verifier {name} gives {found.value} to {shown_gold}, where 1 "
          "is needed. Mend the problem (gold is the answer alone, without "
          "thinking) or the verifier: a policy cannot be taught by a verifier "
          "that rejects the right answer.")
