"""Statistics of evaluations: accuracies, votes and their errors, in NumPy.

  Q: questions    M: samples per question, of which k are used

A score is 0 or 1, or a mean of such. An answer is a canonical text, or None if
a sample gave none: such a sample is wrong, takes up its place among the k, and
abstains from votes.

References: pass@k, https://arxiv.org/abs/2107.03374; errors,
https://arxiv.org/abs/2411.00640; votes, https://arxiv.org/abs/2203.11171.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Z = 1.959963984540054  # Two-sided 95 % of a normal distribution.
ENOUGH_CLUSTERS = 10  # With fewer, the variance between them is hardly known.


class Estimate(NamedTuple):
  """A mean, its standard error, and the number of scores in it."""
  mean: float
  error: float
  n: int


def estimate(
    scores: np.ndarray, cluster: np.ndarray | None = None,
) -> Estimate:
  """Computes the mean and its standard error over questions.

  With several samples a question, give each question's mean score: its samples
  are not independent draws of questions.

  Args:
    scores: [Q].
    cluster: [Q], equal for related questions (those of one passage, or of one
      multiset of numbers); None: questions are independent.

  Returns:
    The error is cluster-robust: with r the sum of s - mean over each of the C
    clusters, sqrt(sum r^2 / Q^2 * C / (C - 1)) (Miller 2024, equation 4, with
    the correction for few clusters). If each question is a cluster, that is
    sqrt(sum (s - mean)^2 / (Q (Q - 1))). It is NaN for a single cluster, whose
    r is 0 for any scores.

  Raises:
    ValueError: there are no scores.
  """
  scores = np.asarray(scores, np.float64)
  n = scores.size
  if n == 0:
    raise ValueError("There are no scores to average.")
  mean = scores.mean()
  residuals = scores - mean
  if cluster is not None:
    _, group = np.unique(cluster, return_inverse=True)
    residuals = np.bincount(group, residuals)
  clusters = residuals.size
  if clusters == 1:
    return Estimate(float(mean), math.nan, n)
  variance = np.sum(residuals**2) / n**2 * clusters / (clusters - 1)
  return Estimate(float(mean), math.sqrt(variance), n)


def caution(num_clusters: int | None) -> str:
  """Warns of standard errors with few clusters; "" if there are enough.

  Args:
    num_clusters: None if questions are independent.
  """
  if num_clusters is None or num_clusters >= ENOUGH_CLUSTERS:
    return ""
  if num_clusters == 1:
    return ("All questions are of one cluster, so the standard error is "
            "undefined (n/a).")
  freedom = num_clusters - 1
  return (f"The questions are of {num_clusters} clusters, fewer than "
          f"{ENOUGH_CLUSTERS}: standard errors are rough, and an interval "
          f"needs Student's t with {freedom} degree{'s' * (freedom > 1)} of "
          "freedom.")


def cautions(cells: Iterable[Mapping[str, Any]]) -> list[str]:
  """Lists the warnings about saved cells, each once."""
  said = (caution(cell.get("num_clusters")) for cell in cells)
  return list(dict.fromkeys(filter(None, said)))


def paired_difference(
    scores: np.ndarray, baseline: np.ndarray,
    cluster: np.ndarray | None = None,
) -> Estimate:
  """Computes mean and standard error of `scores - baseline`, paired.

  Args:
    scores, baseline: [Q], for the same questions in the same order.
    cluster: as in `estimate`; the error is NaN for a single one.

  Raises:
    ValueError: the two differ in length, or are empty.
  """
  return estimate(_difference(scores, baseline), cluster)


def wilson(
    correct: float, n: int, *, z: float = Z,
) -> tuple[float, float]:
  """Wilson's interval for a proportion of single yes-or-no outcomes.

  Raises:
    ValueError: n is 0, or `correct` is not in 0..n.
  """
  if n < 1 or not 0 <= correct <= n:
    raise ValueError(f"{correct} of {n} is not a proportion.")
  p, z2 = correct / n, z * z
  centre = (p + z2 / (2 * n)) / (1 + z2 / n)
  half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
  return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(
    scores: np.ndarray, baseline: np.ndarray | None = None, *, seed: int,
    resamples: int = 10_000, level: float = 0.95,
) -> tuple[float, float]:
  """Percentile interval of a mean, or of a paired difference of means.

  Args:
    scores: [Q].
    baseline: [Q], for the same questions, subtracted; None for none.
    seed: seed of the resampling.
    resamples: number of draws of Q questions with replacement.
    level: the share of resampled means inside the interval.

  Raises:
    ValueError: there are no scores, or the two differ in length.
  """
  scores = np.asarray(scores, np.float64)
  if baseline is not None:
    scores = _difference(scores, baseline)
  if scores.size == 0:
    raise ValueError("There are no scores to resample.")
  rng = np.random.default_rng(seed)
  means = np.array([
      scores[rng.integers(scores.size, size=scores.size)].mean()
      for _ in range(resamples)])
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def pass_at_k(n: int, correct: int, k: int) -> float:
  """Unbiased pass@k: P(one of k samples is right) = 1 - C(n-c, k) / C(n, k).

  Args:
    n: number of samples of the question.
    correct: number of right samples, c.
    k: number of samples that are drawn without replacement.

  Raises:
    ValueError: k is not in 1..n, or `correct` not in 0..n.
  """
  _check_counts(n, correct, k)
  # Python's integers are exact here, where products of floats would not be.
  return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def pass_hat_k(n: int, correct: int, k: int) -> float:
  """Unbiased pass^k: P(all of k samples are right); arguments as `pass_at_k`.
  """
  _check_counts(n, correct, k)
  return math.comb(correct, k) / math.comb(n, k)


def maj_at_k(
    answers: Sequence[str | None], correct: Sequence[bool], k: int,
) -> float:
  """Majority vote of k samples (maj@k): P(it is right), over all subsets.

  The most frequent answer wins; answers with equally many votes win equally
  often. A sample without an answer does not vote, even if it is right: its
  extractor may have failed. If nobody votes the result is wrong. A grader may
  have found some samples of one answer right and others wrong (two spellings, a
  time-out): then any of the samples that voted for it speaks for it, equally
  often.

  Args:
    answers: [M], M up to 1,000.
    correct: [M] bool.
    k: number of samples that vote, drawn without replacement.

  Raises:
    ValueError: k is not in 1..M, or the lengths differ.
  """
  _check_votes(answers, correct, k)
  votes = Counter(answer for answer in answers if answer is not None)
  right = Counter(
      answer for answer, c in zip(answers, correct, strict=True) if c)
  abstaining = len(answers) - votes.total()
  wins = 0.0
  for answer, n in votes.items():
    if not right[answer]:
      continue
    # Counted over subsets rather than sampled: for each number of votes `top`
    # of this answer, the ways to draw the other votes so that it wins.
    others = [m for other, m in votes.items() if other != answer]
    ways = sum(math.comb(n, top) * _share(others, abstaining, top, k - top)
               for top in range(1, min(n, k) + 1))
    wins += ways * right[answer] / n
  return wins / math.comb(len(answers), k)


def best_of_n(
    scores: Sequence[float], correct: Sequence[bool], n: int,
) -> float:
  """Best of n: P(the highest-scored of n samples is right), over all subsets.

  Args:
    scores: [M], a verifier's; samples with equal scores are chosen equally
      often.
    correct: [M] bool.
    n: number of samples that are drawn without replacement.

  Raises:
    ValueError: n is not in 1..M, or the lengths differ.
  """
  if len(scores) != len(correct):
    raise ValueError(
        f"{len(scores)} scores and {len(correct)} outcomes differ in number.")
  total = len(scores)
  _check_counts(total, 0, n)
  values, outcomes = np.asarray(scores, float), np.asarray(correct, float)
  wins = 0.0
  for value in np.unique(values):
    below, upto = int((values < value).sum()), int((values <= value).sum())
    # Subsets whose highest score is this value: all within it, less those
    # below it.
    ways = math.comb(upto, n) - math.comb(below, n)
    wins += ways * float(outcomes[values == value].mean())
  return wins / math.comb(total, n)


def _share(
    others: Sequence[int], abstaining: int, top: int, places: int,
) -> float:
  """Counts the ways to fill the other places, each as a share of the win.

  The answer in question has `top` votes. No other may have more; if t have as
  many, it wins one time in 1 + t. A table over (places filled, t) is extended
  by one answer at a time.
  """
  ties = places // top
  table = np.zeros((places + 1, ties + 1))
  for n in range(min(abstaining, places) + 1):
    table[n, 0] = math.comb(abstaining, n)
  for votes in others:
    new = table.copy()
    for n in range(1, min(votes, top - 1, places) + 1):
      new[n:] += math.comb(votes, n) * table[:-n]
    if top <= min(votes, places):
      new[top:, 1:] += math.comb(votes, top) * table[:-top, :-1]
    table = new
  return float((table[places] / np.arange(1, ties + 2)).sum())


def _check_votes(
    answers: Sequence[str | None], correct: Sequence[bool], k: int,
) -> None:
  if len(answers) != len(correct):
    raise ValueError(
        f"{len(answers)} answers and {len(correct)} outcomes differ in number.")
  _check_counts(len(answers), 0, k)


def _difference(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
  scores, baseline = np.asarray(scores), np.asarray(baseline)
  if scores.shape != baseline.shape:
    raise ValueError(
        f"Scores of shape {scores.shape} and {baseline.shape} are not of the "
        "same questions.")
  return scores.astype(np.float64) - baseline.astype(np.float64)


def _check_counts(n: int, correct: int, k: int) -> None:
  if not 1 <= k <= n:
    raise ValueError(
        f"k = {k} samples cannot be drawn from {n}. Raise samples_per_problem "
        "or lower pass_at.")
  if not 0 <= correct <= n:
    raise ValueError(f"{correct} of {n} samples cannot be right.")
