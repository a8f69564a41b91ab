"""Scaling of accuracy with thinking tokens: s1's metrics and its baseline.

A *point* is one evaluation run: mean thinking tokens a question, and accuracy.
Slopes have the unit of the accuracies (give percent for percentage points).

s1 defines Scaling as the mean slope over all pairs of points, per token
(https://arxiv.org/abs/2501.19393, equation 2). Its published values follow
from its tables only with log2 of the tokens, and so are per doubling; both are
here.
"""

from typing import NamedTuple

import numpy as np


class Flips(NamedTuple):
  """Answers to the same n questions that changed from one step to the next."""
  correct_to_wrong: int
  wrong_to_correct: int
  n: int


def control(
    thinking_tokens: np.ndarray, maximum: np.ndarray,
    minimum: np.ndarray | float = 0,
) -> float:
  """Share of runs (or of samples) whose thinking kept within its bounds.

  Args:
    thinking_tokens: [N], mean tokens of each run, as s1 counts, or the tokens
      of each sample, which is stricter.
    maximum, minimum: [N] or scalars; both bounds are allowed values.
  """
  tokens = np.asarray(thinking_tokens)
  return float(np.mean((tokens >= minimum) & (tokens <= maximum)))


def scaling_per_doubling(
    thinking_tokens: np.ndarray, accuracy: np.ndarray,
) -> float | None:
  """Mean accuracy gained per doubling of thinking, over all pairs of points.

  Comparable to the paper's published Scaling. A point without thinking has no
  doubling, and two points of equal tokens no slope: both are left out, as in
  `scaling_per_1k`.

  Args:
    thinking_tokens, accuracy: [N], one entry for each run.

  Returns:
    The mean, or None if no pair has a slope.
  """
  tokens, accuracy = _points(thinking_tokens, accuracy)
  some = tokens > 0
  return _mean_slope(np.log2(tokens[some]), accuracy[some])


def scaling_per_1k(
    thinking_tokens: np.ndarray, accuracy: np.ndarray,
) -> float | None:
  """Mean accuracy gained per 1,000 thinking tokens, over all pairs of points.

  Arguments and result as in `scaling_per_doubling`.
  """
  tokens, accuracy = _points(thinking_tokens, accuracy)
  return _mean_slope(tokens / 1000, accuracy)


def performance(accuracy: np.ndarray) -> float:
  """Best accuracy of any run (s1's Performance)."""
  return float(np.max(accuracy))


def flips(before: np.ndarray, after: np.ndarray) -> Flips:
  """Counts answers that changed between right and wrong.

  Args:
    before, after: [Q] bool, for the same questions (or samples) in the same
      order.

  Raises:
    ValueError: they differ in length.
  """
  before, after = np.asarray(before, bool), np.asarray(after, bool)
  if before.shape != after.shape:
    raise ValueError(
        f"Outcomes of shape {before.shape} and {after.shape} are not of the "
        "same questions.")
  return Flips(int((before & ~after).sum()), int((~before & after).sum()),
               before.size)


def majority_at_tokens(
    budget: float, tokens: np.ndarray, accuracy: np.ndarray,
) -> float | None:
  """Accuracy of a majority vote that spends `budget` tokens a question.

  The baseline at equal tokens for a run that thinks `budget` tokens on the
  average. Between k and k + 1 samples it is the line through both, which is
  what voting with k + 1 samples on a random share of the questions attains.

  Args:
    budget: mean thinking tokens a question.
    tokens, accuracy: [M] each, see `summary.majority_baseline`.

  Returns:
    None if the budget is below a single sample's tokens, or above those of all
    samples.
  """
  if not tokens[0] <= budget <= tokens[-1]:
    return None
  return float(np.interp(budget, tokens, accuracy))


def _points(
    tokens: np.ndarray, accuracy: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  tokens = np.asarray(tokens, np.float64)
  accuracy = np.asarray(accuracy, np.float64)
  if tokens.shape != accuracy.shape or tokens.ndim != 1:
    raise ValueError(
        f"Tokens of shape {tokens.shape} and accuracies of shape "
        f"{accuracy.shape} are not the points of one curve.")
  return tokens, accuracy


def _mean_slope(x: np.ndarray, y: np.ndarray) -> float | None:
  i, j = np.triu_indices(x.size, k=1)
  # Two points with equal tokens have no slope between them.
  apart = x[i] != x[j]
  i, j = i[apart], j[apart]
  if i.size == 0:
    return None
  return float(np.mean((y[j] - y[i]) / (x[j] - x[i])))
