"""Plain reward functions -> an array of scores.

A reward is `def reward(prompt, completion, **columns) -> float | None`; None
means that it does not apply to this problem. The first reward of a list is
the verifier: it must give 1 to every problem's `gold`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Reward = Callable[..., float | None]


def score(
    rewards: Mapping[str, Reward], problems: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
) -> np.ndarray:
  """Calls every reward on every completion.

  Args:
    rewards: by name.
    problems: [B], the problem of each completion; a reward is given all of
      its columns.
    completions: [B] texts.

  Returns:
    [B, K] float32, NaN where a reward does not apply.

  Raises:
    ValueError: a reward fails or returns something that is no finite number;
      names the reward and the problem.
  """
  scores = np.full((len(completions), len(rewards)), np.nan, np.float32)
  for b, (problem, text) in enumerate(zip(problems, completions, strict=True)):
    for k, (name, reward) in enumerate(rewards.items()):
      value = _call(name, reward, problem, text)
      if value is not None:
        scores[b, k] = value
  return scores


def brevity(prompt: str, completion: str, **columns: Any) -> float:
  """1 / (1 + words). The `:debug` configs add it to their verifier.

  A model that is never right would leave every group without a signal, and
  the learner would not run.
  """
  del prompt, columns
  return 1 / (1 + len(completion.split()))


def _call(name, reward, problem, completion) -> float | None:
  columns = {key: value for key, value in problem.items()
             if key not in ("prompt", "completion")}
  try:
    value = reward(
        prompt=problem.get("prompt", ""), completion=completion, **columns)
  except Exception as error:
    raise ValueError(
        f"The reward {name} failed on problem {problem.get('id')} with "
        f"{type(error).__name__}: {error}") from error
  if value is None:
    return None
  if not isinstance(value, (bool, int, float, np.number)) or not np.isfinite(
      value):
    raise ValueError(
        f"The reward {name} returned {value!r} on problem "
        f"{problem.get('id')}; a finite number or None is needed.")
  return float(value)


def check_ids(problems: Sequence[Mapping[str, Any]]) -> None:
  """Raises ValueError where problems are not told apart by their `id`.

  Groups and random bits go by it: two problems of one id would be one group.
  """
  seen = set()
  for number, problem in enumerate(problems):
    value = problem.get("id")
    if isinstance(value, bool) or not (
        isinstance(value, (int, np.integer)) and -2**31 <= value < 2**31):
      raise ValueError(
          f"Problem {number} of the task has id={value!r}, and a whole number "
          "of at most 31 bits is needed.")
    if value in seen:
      raise ValueError(
          f"Two problems of the task have id={value}. Give each its own.")
    seen.add(value)


def check_gold(
    name: str, verifier: Reward, problems: Sequence[Mapping[str, Any]],
) -> None:
  """Raises ValueError where a problem's own `gold` does not score 1."""
  for problem in problems:
    if "gold" not in problem:
      raise ValueError(
          f"Problem {problem.get('id')} has no column gold, with which the "
          f"verifier {name} is checked. Add a completion that scores 1.")
    value = _call(name, verifier, problem, problem["gold"])
    if value != 1:
      raise ValueError(
          f"The verifier {name} gives {value} to problem "
          f"{problem.get('id')}'s own gold answer {problem['gold'][-80:]!r}, "
          "where 1 is needed. Mend the problem or the verifier: a policy "
          "cannot be taught by a verifier that rejects the right answer.")
