"""Oracles: the worked values, enumeration of all subsets, and limits."""

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from posttrain.evaluation import statistics

ORACLES = json.loads(
    (Path(__file__).parents[1] / "data" / "oracles.json").read_text())


def cases(name):
  return [(*map(int, re.findall(r"\d+", key)), value)
          for key, value in ORACLES[name].items()]


def subsets(n, k):
  return list(itertools.combinations(range(n), k))


@pytest.mark.parametrize("n, c, k, value", cases("pass@k"))
def test_pass_at_k_worked_values(n, c, k, value):
  assert statistics.pass_at_k(n, c, k) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("n, c, k, value", cases("pass^k"))
def test_pass_hat_k_worked_values(n, c, k, value):
  assert statistics.pass_hat_k(n, c, k) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_over_all_subsets(n):
  for c, k in itertools.product(range(n + 1), range(1, n + 1)):
    right = [i < c for i in range(n)]
    any_right = [any(right[i] for i in s) for s in subsets(n, k)]
    all_right = [all(right[i] for i in s) for s in subsets(n, k)]
    assert statistics.pass_at_k(n, c, k) == pytest.approx(np.mean(any_right))
    assert statistics.pass_hat_k(n, c, k) == pytest.approx(np.mean(all_right))


@pytest.mark.parametrize("k, value", ORACLES[
    "maj@k random-tiebreak, answers [A,A,B,C] gt A"].items())
def test_maj_at_k_first_worked_case(k, value):
  correct = [True, True, False, False]
  assert statistics.maj_at_k("AABC", correct, int(k)) == pytest.approx(value)


@pytest.mark.parametrize("k, value", ORACLES[
    "maj@k random-tiebreak, answers [A,B,B,A,C] gt A"].items())
def test_maj_at_k_second_worked_case(k, value):
  correct = [answer == "A" for answer in "ABBAC"]
  assert statistics.maj_at_k("ABBAC", correct, int(k)) == pytest.approx(value)


def enumerate_maj_at_k(answers, correct, k):
  """Every subset, its winners, and the share of their samples that is right."""
  shares = []
  for subset in subsets(len(answers), k):
    votes = Counter(answers[i] for i in subset if answers[i] is not None)
    winners = [a for a, n in votes.items() if n == max(votes.values())]
    shares.append(np.mean([
        np.mean([correct[i] for i in subset if answers[i] == a])
        for a in winners]) if winners else 0.0)
  return np.mean(shares)


def majority_of_first_k(answers, correct, k):
  """s1's maj@k: the first k samples vote, and a tie goes to the first answer.

  The first sample of an answer speaks for it.
  """
  votes = Counter(answer for answer in answers[:k] if answer is not None)
  if not votes:
    return 0.0
  winner = votes.most_common(1)[0][0]  # In a tie, the one counted first.
  return float(correct[list(answers).index(winner)])


def mean_first_k(answers, correct, k):
  """s1's rule, over all orders of the samples."""
  return np.mean([
      majority_of_first_k(
          [answers[i] for i in order], [correct[i] for i in order], k)
      for order in itertools.permutations(range(len(answers)))])


SAMPLES = st.lists(
    st.tuples(st.sampled_from([None, *"ABCD"]), st.booleans()),
    min_size=1, max_size=8)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(SAMPLES, st.data())
def test_maj_at_k_is_the_mean_over_all_subsets(samples, data):
  answers, correct = zip(*samples, strict=True)
  k = data.draw(st.integers(1, len(answers)))
  assert statistics.maj_at_k(answers, correct, k) == pytest.approx(
      enumerate_maj_at_k(answers, correct, k))


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(SAMPLES.filter(lambda samples: len(samples) <= 5), st.data())
def test_maj_at_k_is_the_mean_of_the_first_k_rule_over_orders(samples, data):
  answers, correct = zip(*samples, strict=True)
  k = data.draw(st.integers(1, len(answers)))
  assert statistics.maj_at_k(answers, correct, k) == pytest.approx(
      mean_first_k(answers, correct, k))


def test_maj_at_k_limits():
  answers = ["A"] * 40 + ["B"] * 30 + [None] * 30
  right = [answer == "A" for answer in answers]
  # One sample is pass@1; all samples are one vote.
  assert statistics.maj_at_k(answers, right, 1) == pytest.approx(0.4)
  assert statistics.maj_at_k(answers, right, 100) == pytest.approx(1.0)
  assert statistics.maj_at_k([None] * 3, [False] * 3, 2) == 0.0
  # An extractor has failed: its sample is right, and does not vote.
  assert statistics.maj_at_k([None] * 3, [True] * 3, 2) == 0.0
  total = [statistics.maj_at_k(answers, [a == x for a in answers], 32)
           for x in ("A", "B")]
  assert sum(total) == pytest.approx(1.0)


def test_the_first_k_rule_breaks_ties_by_order():
  right = [answer == "A" for answer in "ABBAC"]
  assert majority_of_first_k("ABBAC", right, 5) == 1.0
  assert majority_of_first_k("BABAC", [
      answer == "A" for answer in "BABAC"], 5) == 0.0
  assert majority_of_first_k("ABBAC", right, 3) == 0.0
  assert majority_of_first_k([None, "A"], [False, True], 1) == 0.0
  assert majority_of_first_k([None, "A"], [False, True], 2) == 1.0


@pytest.mark.parametrize("n, value", ORACLES[
    "best-of-N unbiased scores [.1,.4,.9,.7] correct [1,0,0,1]"].items())
def test_best_of_n_worked_case(n, value):
  found = statistics.best_of_n([.1, .4, .9, .7], [1, 0, 0, 1], int(n))
  assert found == pytest.approx(value)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.tuples(
    st.integers(0, 3), st.booleans()), min_size=1, max_size=7), st.data())
def test_best_of_n_is_the_mean_over_all_subsets(samples, data):
  scores, correct = zip(*samples, strict=True)
  n = data.draw(st.integers(1, len(scores)))
  shares = []
  for subset in subsets(len(scores), n):
    best = max(scores[i] for i in subset)
    shares.append(np.mean([correct[i] for i in subset if scores[i] == best]))
  assert statistics.best_of_n(scores, correct, n) == pytest.approx(
      np.mean(shares))


def test_intervals_worked_values():
  worked = ORACLES["CI"]
  for key, value in worked.items():
    if key.endswith("wilson"):
      correct, n = map(int, re.findall(r"\d+", key)[:2])
      np.testing.assert_allclose(
          statistics.wilson(correct, n), value, atol=1e-6)
  scores = np.arange(30) < 17
  assert statistics.estimate(scores) == (
      pytest.approx(17 / 30), pytest.approx(
          worked["17/30 SE_clt(n-1)"], abs=1e-6), 30)


def test_wilson_solves_its_quadratic():
  """The bounds are where |p_hat - p| is z standard errors of p."""
  for p in statistics.wilson(13, 57):
    assert abs(13 / 57 - p) == pytest.approx(
        statistics.Z * math.sqrt(p * (1 - p) / 57))


def loop_clustered_error(scores, cluster):
  """The residuals' sums one cluster at a time, and C / (C - 1)."""
  mean = sum(map(float, scores)) / len(scores)
  sums = {}
  for score, name in zip(scores, cluster, strict=True):
    sums[name] = sums.get(name, 0.0) + float(score) - mean
  variance = sum(value**2 for value in sums.values()) / len(scores)**2
  return math.sqrt(variance * len(sums) / (len(sums) - 1))


@pytest.mark.parametrize("key, clusters", [
    ("3 clusters x 4, s=[1,1,1,0|0,0,0,1|1,1,0,0]", 3),
    ("fully correlated [1,1,1,1|0,0,0,0|1,1,1,1]", 3),
    ("one cluster [1,1,1,0]", 1)])
def test_clustered_error_worked_values(key, clusters):
  scores = np.array([int(s) for s in re.findall(r"\d", key[key.index("["):])])
  found = statistics.estimate(
      scores, np.repeat(np.arange(clusters), scores.size // clusters))
  wanted = ORACLES["clustered SE"][key]
  assert found == pytest.approx(
      (wanted["mean"], float(wanted["error"]), scores.size), abs=1e-6,
      nan_ok=True)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.tuples(
    st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=20))
def test_clustered_error(rows):
  cluster, scores = np.array(rows).T
  found = statistics.estimate(scores / 3, cluster)
  if len(set(cluster.tolist())) == 1:
    assert math.isnan(found.error)
  else:
    assert found.error == pytest.approx(
        loop_clustered_error(scores / 3, cluster), abs=1e-9)


def test_clusters_of_one_question_are_no_clusters():
  scores = np.random.default_rng(0).random(40)
  alone = statistics.estimate(scores, np.arange(40))
  assert alone == pytest.approx(statistics.estimate(scores))


def test_a_clustered_error_covers_the_truth():
  """Over many draws of five clusters the mean of its square is the variance.

  Within a tenth: without C / (C - 1) it would be a fifth too small.
  """
  rng = np.random.default_rng(1)
  cluster = np.repeat(np.arange(5), 8)
  found = [statistics.estimate(
      rng.normal(size=5)[cluster] + rng.normal(size=40), cluster)
           for _ in range(4000)]
  variance = np.var([each.mean for each in found])
  assert np.mean([each.error**2 for each in found]) == pytest.approx(
      variance, rel=0.1)


def test_a_paired_difference_is_clustered_too():
  rng = np.random.default_rng(3)
  scores, baseline = rng.random((2, 30)) < [[0.7], [0.4]]
  cluster = rng.integers(4, size=30)
  found = statistics.paired_difference(scores, baseline, cluster)
  assert found.error == pytest.approx(loop_clustered_error(
      scores.astype(float) - baseline, cluster))
  assert math.isnan(statistics.paired_difference(
      scores, baseline, np.zeros(30)).error)


def test_few_clusters_are_said():
  assert statistics.caution(None) == statistics.caution(10) == ""
  assert "9 clusters" in statistics.caution(9)
  assert "8 degrees of freedom" in statistics.caution(9)
  assert "undefined" in statistics.caution(1)


def test_paired_difference_uses_the_pairing():
  rng = np.random.default_rng(1)
  baseline = rng.random(200) < 0.5
  scores = baseline | (rng.random(200) < 0.1)
  found = statistics.paired_difference(scores, baseline)
  assert found.mean == pytest.approx(scores.mean() - baseline.mean())
  assert found.error < statistics.estimate(scores).error / 2
  same = statistics.paired_difference(baseline, baseline)
  assert same == (0.0, 0.0, 200)


def test_bootstrap_agrees_with_the_standard_error():
  rng = np.random.default_rng(2)
  scores, baseline = rng.random(400) < 0.7, rng.random(400) < 0.4
  mean, error, _ = statistics.paired_difference(scores, baseline)
  low, high = statistics.bootstrap(scores, baseline, seed=0, resamples=4000)
  np.testing.assert_allclose(
      [low, high], [mean - 1.96 * error, mean + 1.96 * error], atol=0.005)
  assert statistics.bootstrap(
      scores, baseline, seed=0, resamples=4000) == (low, high)
  assert statistics.bootstrap(np.ones(5), seed=0, resamples=10) == (1.0, 1.0)


def test_a_single_score_has_no_error():
  mean, error, n = statistics.estimate(np.ones(1))
  assert (mean, n) == (1.0, 1) and math.isnan(error)


@pytest.mark.parametrize("call, message", [
    (lambda: statistics.estimate(np.zeros(0)), "no scores"),
    (lambda: statistics.bootstrap(np.zeros(0), seed=0), "no scores"),
    (lambda: statistics.wilson(3, 2), "3 of 2"),
    (lambda: statistics.pass_at_k(4, 2, 5), "k = 5 .* from 4"),
    (lambda: statistics.pass_at_k(4, 5, 1), "5 of 4"),
    (lambda: statistics.maj_at_k("AA", [True], 1), "differ in number"),
    (lambda: statistics.maj_at_k("AA", [True, True], 3), "k = 3"),
    (lambda: statistics.best_of_n([1.0], [], 1), "differ in number"),
    (lambda: statistics.paired_difference(np.ones(2), np.ones(3)), "shape")])
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
