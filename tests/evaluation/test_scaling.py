"""Oracles: s1's published tables and metrics, and loops."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from posttrain.evaluation import scaling

ORACLES = json.loads(
    (Path(__file__).parents[1] / "data" / "oracles.json").read_text())

# s1, tables 12 to 14: thinking tokens, and how many of AIME24's 30 problems are
# right (the tables print 26.7 % for 8).
RIGHT = {
    "TCC": ([7939, 7158, 8263, 7108, 7500], [8, 9, 10, 10, 12]),
    "TCC+BF": ([1024, 2048, 4031, 5664, 6330], [1, 9, 10, 10, 12]),
    "SCC": ([7252, 6277, 5396, 5552, 7551], [10, 7, 10, 11, 10]),
    "SCC+BF": ([1517, 2963, 4636, 5409, 7551], [7, 7, 10, 11, 10]),
    "CCC": ([8033, 9651], [9, 11]),
}
TABLES = {name: (tokens, np.array(right) / 30 * 100)
          for name, (tokens, right) in RIGHT.items()}
TOKEN_BUDGETS = [1024, 2048, 4096, 8192, 16384]
STEP_BUDGETS = [1600, 3200, 6400, 12800, 25600]  # 100 tokens a step.


@pytest.mark.parametrize("name", TABLES)
def test_scaling_of_the_published_tables(name):
  worked, (tokens, accuracy) = ORACLES["s1 Scaling"][name], TABLES[name]
  assert scaling.scaling_per_doubling(tokens, accuracy) == pytest.approx(
      worked["per_doubling_pp"], abs=1e-3)
  assert scaling.scaling_per_1k(tokens, accuracy) == pytest.approx(
      1000 * worked["literal_eq2_pp_per_token"], abs=1e-3)
  assert scaling.performance(accuracy) == pytest.approx(
      worked["performance"], abs=0.05)


@pytest.mark.parametrize("name, published", [
    ("TCC", -24), ("TCC+BF", 13), ("SCC", 3), ("SCC+BF", 6), ("CCC", 25)])
def test_the_published_scaling_is_per_doubling(name, published):
  assert round(scaling.scaling_per_doubling(*TABLES[name])) == published


@pytest.mark.parametrize("name, budgets", [
    ("TCC", TOKEN_BUDGETS), ("TCC+BF", TOKEN_BUDGETS),
    ("SCC", STEP_BUDGETS), ("SCC+BF", STEP_BUDGETS)])
def test_control_of_the_published_tables(name, budgets):
  assert scaling.control(TABLES[name][0], budgets) == ORACLES["s1 Control"][
      name.replace("+", "")]


def test_control_has_two_bounds():
  tokens = np.array([1, 2, 3, 4])
  assert scaling.control(tokens, 3) == 0.75
  assert scaling.control(tokens, 3, 2) == 0.5


def test_a_toy_curve():
  toy = ORACLES["toy scaling f(1000)=20,f(2000)=30,f(4000)=50 (%)"]
  points = [1000, 2000, 4000], [20, 30, 50]
  assert scaling.scaling_per_doubling(*points) == pytest.approx(
      toy["per_doubling"])
  assert scaling.scaling_per_1k(*points) == pytest.approx(toy["per_1k"])


def test_slopes_are_means_over_pairs_that_have_one():
  tokens, accuracy = [0, 10, 10, 40, 70], [.1, .2, .3, .5, .6]
  points = list(zip(tokens, accuracy, strict=True))
  pairs = [(a, b) for a, b in itertools.combinations(points, 2)
           if a[0] != b[0]]
  assert scaling.scaling_per_1k(tokens, accuracy) == pytest.approx(np.mean(
      [1000 * (b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs]))
  assert scaling.scaling_per_doubling(tokens, accuracy) == pytest.approx(
      np.mean([(b[1] - a[1]) / math.log2(b[0] / a[0])
               for a, b in pairs if a[0] > 0]))
  assert scaling.scaling_per_doubling([0, 10], [.1, .2]) is None
  assert scaling.scaling_per_1k([10, 10], [.1, .2]) is None


def test_flips_are_the_change_in_accuracy():
  rng = np.random.default_rng(0)
  correct = rng.random((4, 100)) < 0.5
  for before, after in itertools.pairwise(correct):
    step = scaling.flips(before, after)
    lost = [i for i in range(100) if before[i] and not after[i]]
    won = [i for i in range(100) if after[i] and not before[i]]
    assert step == (len(lost), len(won), 100)
    assert step.wrong_to_correct - step.correct_to_wrong == (
        after.sum() - before.sum())


def test_majority_at_tokens():
  tokens, accuracy = np.array([10., 20., 30.]), np.array([.4, .4, .7])
  at = lambda budget: scaling.majority_at_tokens(budget, tokens, accuracy)
  assert [at(b) for b in (10, 20, 30)] == [.4, .4, .7]
  assert at(25) == pytest.approx(.55)
  assert at(9.9) is None and at(30.1) is None


@pytest.mark.parametrize("call, message", [
    (lambda: scaling.flips(np.ones(2), np.ones(3)), "same questions"),
    (lambda: scaling.scaling_per_1k([1, 2], [1]), "one curve")])
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
