"""Figures of made-up outcomes, against sums written out by hand."""

import itertools
import json
import math

import numpy as np
import pytest

from posttrain.evaluation import summary

FREE, MAX2, MAX4 = summary.Cell(), summary.Cell(2), summary.Cell(4)
WAIT1, WAIT2 = summary.Cell(num_waits=1), summary.Cell(num_waits=2)


def make_scored(seed, questions=5, samples=3, most=9):
  rng = np.random.default_rng(seed)
  shape = questions, samples
  answers = rng.choice(["a", "b", "c", None], shape).astype(object)
  right = rng.choice(["a", "b"], (questions, 1)).astype(object)
  return summary.Scored(
      correct=answers == right, answers=answers,
      tokens=rng.integers(1, 20, shape),
      thinking_tokens=rng.integers(0, most + 1, shape),
      thinking_steps=rng.integers(0, 4, shape),
      finish=rng.choice(["eos", "budget", "length"], shape).astype(object),
      unscored=rng.random(shape) < 0.2)


def test_cells_are_each_there_once_the_free_one_first():
  assert summary.cells((2, 4), (0, 1, 2), (-1,)) == [
      FREE, MAX2, MAX4, WAIT1, WAIT2]
  assert summary.cells((), (2, 0)) == [FREE, WAIT2]
  assert summary.cells((), ()) == [FREE]
  assert [cell.name for cell in (FREE, summary.Cell(0), WAIT2)] == [
      "free", "max_0", "waits_2"]


def test_waits_have_the_largest_maximum_unless_others_are_named():
  """And each number of waits is there with each maximum."""
  of = lambda maximum, waits: summary.Cell(maximum, num_waits=waits)
  assert summary.cells((2, 4), (0, 1, 2)) == [
      FREE, MAX2, MAX4, of(4, 1), of(4, 2)]
  assert summary.cells((2, 4), (0, 1), (-1, 4, 3)) == [
      FREE, MAX2, MAX4, of(3, 0), WAIT1, of(4, 1), of(3, 1)]
  assert of(4, 2).name == "waits_2_max_4"


def vote(answers, correct):
  """P(right), winners of a tie drawn at random."""
  votes = [a for a in answers if a is not None]
  if not votes:
    return 0.0
  most = max(map(votes.count, votes))
  winners = {a for a in votes if votes.count(a) == most}
  good = {a for a, c in zip(answers, correct, strict=True) if c}
  return len(winners & good) / len(winners)


def over_subsets(function, k, *columns):
  subsets = list(itertools.combinations(range(len(columns[0])), k))
  return sum(function(*([c[i] for i in s] for c in columns))
             for s in subsets) / len(subsets)


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_a_cell(seed):
  scored = make_scored(seed)
  found = summary.cell_figures(MAX4, scored, (1, 2, 3), votes=True)
  means = [sum(row) / 3 for row in scored.correct]
  accuracy = sum(means) / 5
  variance = sum((m - accuracy)**2 for m in means) / (5 * 4)
  assert found["n"] == 5 and found["samples"] == 3
  assert found["accuracy"] == pytest.approx(accuracy)
  assert found["standard_error"] == pytest.approx(math.sqrt(variance))
  assert found["mean_thinking_tokens"] == scored.thinking_tokens.mean()
  assert found["mean_tokens"] == scored.tokens.mean()
  assert found["finish"]["budget"] == (scored.finish == "budget").sum() / 15
  assert sum(found["finish"].values()) == pytest.approx(1)
  assert found["control"] == (scored.thinking_tokens <= 4).sum() / 15
  assert found["no_answer"] == sum(
      a is None for row in scored.answers for a in row) / 15
  for k in (1, 2, 3):
    assert found["pass@k"][str(k)] == pytest.approx(np.mean([
        over_subsets(any, k, row) for row in scored.correct]))
    assert found["maj@k"][str(k)] == pytest.approx(np.mean([
        over_subsets(vote, k, a, c) for a, c in zip(
            scored.answers, scored.correct, strict=True)]))


def test_like_questions_count_as_fewer():
  scores, cluster = [1, 1, 0, 0, 1, 0], np.array(["a", "a", "b", "b", "c", "d"])
  found = summary.accuracy(scores, cluster)
  # The residuals are 1 in a, -1 in b, 0.5 in c and -0.5 in d.
  variance = (1 + 1 + 0.25 + 0.25) / 6**2 * 4 / 3
  assert found["standard_error"] == pytest.approx(math.sqrt(variance))
  assert found["n"] == 6 and found["num_clusters"] == 4
  assert "num_clusters" not in summary.accuracy(scores, None)


def test_one_cluster_has_no_error():
  found = summary.accuracy([1] * 6 + [0] * 4, np.zeros(10))
  assert found == {
      "n": 10, "accuracy": 0.6, "standard_error": None, "num_clusters": 1}
  assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_free_cell_has_no_control_and_no_votes_no_majority():
  found = summary.cell_figures(FREE, make_scored(0), (1,), votes=False)
  assert not {"control", "maj@k", "no_answer"} & set(found)
  one = summary.cell_figures(
      FREE, make_scored(0, questions=1), (1,), votes=False)
  assert one["standard_error"] is None  # JSON has no NaN.


def test_s1_figures_over_the_curve_and_the_waits():
  scored = {cell: make_scored(i, most=5) for i, cell in enumerate(
      (FREE, MAX2, MAX4, WAIT2, WAIT1))}
  figures = [summary.cell_figures(c, s, (1,), votes=False)
             for c, s in scored.items()]
  found = summary.s1_figures(figures, scored)
  x, y = ([figures[i][name] for i in (1, 2)]
          for name in ("mean_thinking_tokens", "accuracy"))
  slope = (y[1] - y[0]) / (math.log2(x[1]) - math.log2(x[0]))
  assert found["scaling_per_doubling"] == pytest.approx(slope)
  assert found["scaling_per_1k"] == pytest.approx(
      1000 * (y[1] - y[0]) / (x[1] - x[0]))
  assert found["performance"] == max(y)
  assert found["control_per_sample"] == pytest.approx(
      (figures[1]["control"] + figures[2]["control"]) / 2)
  assert found["control_per_run"] == ((x[0] <= 2) + (x[1] <= 4)) / 2
  steps = [(f["from_waits"], f["to_waits"]) for f in found["flips"]]
  assert steps == [(0, 1), (1, 2)]
  for flips, (a, b) in zip(
      found["flips"], ((FREE, WAIT1), (WAIT1, WAIT2)), strict=True):
    pairs = list(zip(
        scored[a].correct.ravel(), scored[b].correct.ravel(), strict=True))
    assert flips["correct_to_wrong"] == sum(x and not y for x, y in pairs)
    assert flips["wrong_to_correct"] == sum(y and not x for x, y in pairs)
    assert flips["n"] == 15


def test_without_a_curve_there_are_flips_only():
  scored = {FREE: make_scored(0)}
  figures = [summary.cell_figures(FREE, scored[FREE], (1,), votes=False)]
  assert summary.s1_figures(figures, scored) == {"flips": []}


def test_majority_baseline_spends_every_samples_tokens():
  scored = make_scored(1, samples=4)
  rows = summary.majority_baseline(scored)
  assert [row["samples"] for row in rows] == [1, 2, 3, 4]
  for k, row in enumerate(rows, 1):
    # A subset of k samples costs its own tokens; here over all subsets.
    assert row["mean_tokens"] == pytest.approx(np.mean([
        tokens[list(subset)].sum() for tokens in scored.thinking_tokens
        for subset in itertools.combinations(range(4), k)]))
    assert row["accuracy"] == pytest.approx(np.mean([
        over_subsets(vote, k, a, c) for a, c in zip(
            scored.answers, scored.correct, strict=True)]))


# s1's tables 12 to 14: what was asked for, mean thinking tokens, accuracy.
ASKED = {
    "tokens": [(1024, 7939, 26.7), (2048, 7158, 30.0), (4096, 8263, 33.3),
               (8192, 7108, 33.3), (16384, 7500, 40.0)],
    "tokens_forced": [(1024, 1024, 3.3), (2048, 2048, 30.0),
                      (4096, 4031, 33.3), (8192, 5664, 33.3),
                      (16384, 6330, 40.0)],
    "steps": [(16, 7252, 33.3), (32, 6277, 23.3), (64, 5396, 33.3),
              (128, 5552, 36.7), (256, 7551, 33.3)],
    "steps_forced": [(16, 1517, 23.3), (32, 2963, 23.3), (64, 4636, 33.3),
                     (128, 5409, 36.7), (256, 7551, 33.3)],
    "classes": [(0, 8033, 30.0), (1, 9651, 36.7)]}
# Table 3: Control (%), Scaling (points per doubling), Performance (%).
TABLE = {
    "tokens": (40, -24, 40.0), "tokens_forced": (100, 13, 40.0),
    "steps": (60, 3, 36.7), "steps_forced": (100, 6, 36.7),
    "classes": (50, 25, 36.7)}


def test_what_was_asked_for_is_told_as_s1_tells_it():
  cells = summary.asking_cells(
      [a for a, *_ in ASKED["tokens"]], [a for a, *_ in ASKED["steps"]],
      ["short", "long"], forced=True)
  rows = [row for name in ASKED for row in ASKED[name]]
  assert len({cell.name for cell in cells}) == len(cells) == len(rows)
  ordered = {name: [] for name in ASKED}
  figures = [dict(name="free", asked="", mean_thinking_tokens=6109)]
  for cell in cells:
    name = (cell.asked if cell.amount else "classes") + (
        "_forced" * cell.forced)
    amount, tokens, percent = ASKED[name][len(ordered[name])]
    assert cell.amount in (amount, 0)
    ordered[name].append(cell)
    figures.append(dict(
        vars(cell), name=cell.name, mean_thinking_tokens=tokens,
        accuracy=round(percent * 0.3) / 30, control=0.5))  # Of 30 questions.
  found = summary.asking_figures(figures)
  assert {name: (
      round(100 * f["control_per_run"]),
      round(100 * f["scaling_per_doubling"]),
      round(100 * f["performance"], 1))
          for name, f in found.items()} == TABLE
  assert found["tokens"]["control_per_sample"] == 0.5
  assert "control_per_sample" not in found["classes"]


def test_control_counts_what_was_asked_for():
  scored = make_scored(3)
  counted = lambda cell: summary.cell_figures(
      cell, scored, (1,), votes=False)["control"]
  assert counted(summary.Cell(asked="tokens", amount=4)) == (
      scored.thinking_tokens <= 4).mean()
  assert counted(summary.Cell(asked="steps", amount=1)) == (
      scored.thinking_steps <= 1).mean()
  assert "control" not in summary.cell_figures(
      summary.Cell(asked="long"), scored, (1,), votes=False)


def test_flips_are_between_waits_under_one_maximum():
  """A maximum of the waits alone has no cell without waits to begin with."""
  settings = [(-1, 0), (4, 0), (-1, 1), (4, 1), (4, 3), (2, 1), (2, 2)]
  scored = {summary.Cell(maximum, num_waits=waits): make_scored(i, most=5)
            for i, (maximum, waits) in enumerate(settings)}
  figures = [summary.cell_figures(c, s, (1,), votes=False)
             for c, s in scored.items()]
  found = summary.s1_figures(figures, scored)
  assert [(f["max_thinking_tokens"], f["from_waits"], f["to_waits"])
          for f in found["flips"]] == [
              (-1, 0, 1), (4, 0, 1), (4, 1, 3), (2, 1, 2)]
  flip, before, after = found["flips"][2], *(
      scored[summary.Cell(4, num_waits=n)].correct for n in (1, 3))
  assert flip["correct_to_wrong"] == (before & ~after).sum()
  assert flip["wrong_to_correct"] == (after & ~before).sum()
  # The curve is of the maxima without waits: one point here.
  assert found["performance"] == figures[1]["accuracy"]
  assert found["scaling_per_doubling"] is None
