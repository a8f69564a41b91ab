"""Scoring: plain reward functions give scores, each with a status.

A reward is `def reward(prompt, completion, **columns) -> float | None`. It is
called by its name ("module:function") in a worker process, with a deadline. Its
`completion` is the answer alone: the text after the thinking, "" if the
thinking never ended, and all of the text if there is no thinking. If it has
these parameters it is also given

  thinking       the text of the thinking section, without its delimiters
  full_text      the whole completion, thinking and delimiters included
  num_tokens     number of tokens of the whole completion
  finish_reason  why it ended: "eos", "budget", "length", ...
  messages       the conversation: the prompt's messages, then the completion's

With `@over("group")` it is called once for all completions of a problem, and
with `@over("batch")` for those that happen to wait. It is then `def
reward(prompts, completions, **columns) -> list`, where every argument is a list
with an element for each completion.

None means that the reward does not apply. A `Score`, or a grader's `Grade`, may
say that the completion could not be judged (`timeout`, `error`). So do an
exception, an exit, a missed deadline and what is no finite number. A completion
that could not be judged leaves its group and is counted.

The first reward of a list is the verifier: it must give 1 to every problem's
`gold`, which is an answer.

`call`, `call_joined` and `extract` run in the worker. Their results are JSON.
"""

import collections
import contextlib
import functools
import inspect
import reprlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from posttrain.tasks import loading
from posttrain.tasks.grading import Grade

T = TypeVar("T")

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
  """Texts and facts of a completion for rewards; see the module's text.

  `messages` are those behind the prompt, each with `role` and `content`.
  Without any the answer is the assistant's message.
  """

  answer: str
  thinking: str = ""
  full_text: str = ""
  num_tokens: int = 0
  finish_reason: str = "eos"
  messages: Sequence[Mapping[str, str]] = ()


OFFERED = Completion._fields[1:]
SCOPES = ("sample", "group", "batch")


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


def over(scope: str) -> Callable[[T], T]:
  """Declares that a reward judges a "group" or a "batch" in one call.

  A group is all completions of one problem in a batch of rollouts, or in a cell
  of an evaluation. A batch is whichever completions wait for the reward.

  Raises:
    ValueError: there is no such scope.
  """
  if scope not in SCOPES:
    raise ValueError(
        f"A reward's scope is {shown(scope)}, and one of {', '.join(SCOPES)} "
        "is needed.")
  return functools.partial(_mark, "scope", scope)


def prepared_by(prepare: Callable[[], Any]) -> Callable[[T], T]:
  """Declares what a worker calls once behind the import of a reward.

  It has a deadline of its own, as the import has, so that the first completion
  is not late.
  """
  return functools.partial(_mark, "prepare", prepare)


def scope_of(reward: Reward) -> str:
  """Returns the scope that `over` gave a reward, of `SCOPES`."""
  return getattr(reward, "scope", "sample")


def _mark(attribute: str, value: Any, function: T) -> T:
  setattr(function, attribute, value)
  return function


# In a worker.


def _imports(names: Callable[..., list[str]]) -> Callable[[T], T]:
  """Tells the worker which functions a call will load.

  They are imported before the call's deadline begins.
  """
  return functools.partial(_mark, "imports", names)


@_imports(lambda name, *_: [name])
def call(
    name: str, problem: Mapping[str, Any], completion: Completion,
) -> list[Any]:
  """Calls a reward on one completion.

  A reward over a group or a batch is given one of this completion alone.

  Args:
    name: "module:function" or "file.py:function".
    problem: the reward is given all of its columns.
    completion: what is judged.

  Returns:
    Value, status and reason of a `Score`.
  """
  def judge() -> Score:
    reward = loading.load_function(name)
    if scope_of(reward) != "sample":
      return Score(*call_joined([(name, problem, completion)])[0])
    return _score_of(reward(**arguments(reward, problem, completion)))
  return list(_guarded(judge))


@_imports(lambda members: [members[0][0]])
def call_joined(
    members: Sequence[tuple[str, Mapping[str, Any], Completion]],
) -> list[list[Any]]:
  """Calls a reward once on several completions.

  Args:
    members: the arguments of `call` for each, with one name.

  Returns:
    A list for each, as `call` returns it.
  """
  size = len(members)

  def judge() -> list[Any]:
    reward = loading.load_function(members[0][0])
    found = reward(**joined_arguments(
        reward, *zip(*(member[1:] for member in members), strict=True)))
    if not isinstance(found, (list, tuple, np.ndarray)) or len(found) != size:
      raise Refused(
          f"found {shown(found)}, and a list of {size} scores is needed")
    return list(found)
  found = _guarded(judge)
  if isinstance(found, Score):
    return [list(found)] * size
  return [list(_guarded(functools.partial(_score_of, one))) for one in found]


@_imports(lambda name, *_: [name])
def extract(name: str, completion: str) -> list[Any]:
  """Extracts the answer in a canonical spelling, for majority votes.

  Returns:
    The answer or None, then status and reason as `call` has them.
  """
  def cut() -> tuple[str | None, str, str]:
    found = loading.load_function(name)(completion)
    if not (found is None or isinstance(found, str)):
      raise Refused(f"found {shown(found)}, and a text or None is needed")
    return found, "ok", ""
  return list(_guarded(cut))


class Refused(ValueError):
  """A value that a task's code may not return."""


def _guarded(judge: Callable[[], Any]) -> Any:
  """Calls a task's code; a `Score` with the status "error" if it fails."""
  try:
    return judge()
  except Refused as error:
    return Score(None, "error", str(error))
  # Also SystemExit, and what a task raises that is no Exception.
  except BaseException as error:
    with contextlib.suppress(Exception):  # It may have closed the stream.
      traceback.print_exc()
    return Score(None, "error", _told(error))


def _told(error: BaseException) -> str:
  """Says in a line what was raised, and in which line of code."""
  by = traceback.extract_tb(error.__traceback__, limit=-1)[0]
  said = " ".join(str(error).split())[:400]
  return (f"{type(error).__name__}" + f": {said}" * bool(said)
          + f" ({by.filename.rpartition('/')[2]}, line {by.lineno})")


def _score_of(found: Any) -> Score:
  """Converts what a reward returned.

  Raises:
    Refused: it is none of the things that a reward may return.
  """
  # A grader's result may be returned as it is, and keeps its status.
  if isinstance(found, Grade):
    found = judged(found)
  if isinstance(found, Score):
    if found.status not in STATUSES:
      raise Refused(
          f"found the status {shown(found.status)}, and one of "
          f"{', '.join(STATUSES)} is needed")
    if found.status != "ok":
      return Score(None, found.status, str(found.reason)[:500])
    found = found.value
    if found is None:
      raise Refused("found the status ok without a value")
  if found is None:
    return Score(None, "not_applicable")
  value = _number(found)
  if value is None:
    raise Refused(
        f"found {shown(found)}, and a finite number (of at most "
        f"{LARGEST:.2g}, as rewards are float32) or None is needed")
  return Score(value)


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
  """Builds the keyword arguments of a reward for one completion."""
  columns = {key: value for key, value in problem.items()
             if key not in ("prompt", "completion")}
  # Only parameters that it names: a reward with **columns gets the problem's
  # columns, and not the completion's as well.
  columns |= {name: getattr(completion, name) for name in named(reward)}
  if "messages" in named(reward):
    columns["messages"] = _conversation(problem, completion)
  return dict(prompt=problem.get("prompt", ""), completion=completion.answer,
              **columns)


def joined_arguments(
    reward: Reward, problems: Sequence[Mapping[str, Any]],
    completions: Sequence[Completion],
) -> dict[str, list[Any]]:
  """Builds the keyword arguments of a reward over a group or a batch.

  A column that a problem does not have is None there.
  """
  rows = [arguments(reward, *row)
          for row in zip(problems, completions, strict=True)]
  plural = {"prompt": "prompts", "completion": "completions"}
  return {plural.get(name, name): [row.get(name) for row in rows]
          for name in dict.fromkeys(name for row in rows for name in row)}


def _conversation(
    problem: Mapping[str, Any], completion: Completion,
) -> list[Mapping[str, str]]:
  asked = problem.get("messages") or [
      dict(role="user", content=problem.get("prompt", ""))]
  return [*asked, *(completion.messages or [
      dict(role="assistant", content=completion.answer)])]


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


def named(reward: Reward) -> tuple[str, ...]:
  """Lists the parts of a completion that a reward has as parameters."""
  try:
    parameters = inspect.signature(reward).parameters
  except (TypeError, ValueError):  # A function in C has no signature.
    return ()
  return tuple(name for name in OFFERED if name in parameters)


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
