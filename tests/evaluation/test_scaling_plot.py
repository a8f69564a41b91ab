"""The figures on the axes are those that were measured.

Positions are read from the drawing by its own ticks.
"""

import math
import pathlib
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from posttrain.evaluation import scaling_plot

SVG = "{http://www.w3.org/2000/svg}"


def cell(maximum, waits, tokens, accuracy, error=0.02, **more):
  return {
      "max_thinking_tokens": maximum, "num_waits": waits, "n": 100,
      "mean_thinking_tokens": tokens, "accuracy": accuracy,
      "standard_error": error, **more}


def result(name="sft", **summary):
  return {"checkpoint": name, "summary": summary, "cells": [
      cell(-1, 0, 46.0, 0.38), cell(64, 0, 40.0, 0.37),
      cell(16, 0, 15.5, 0.2), cell(-1, 2, 90.0, 0.6), cell(-1, 1, 70.0, 0.5)]}


class Drawing:
  """A standalone plot, whose pixels are turned back into values."""

  def __init__(self, *results):
    text = scaling_plot.standalone(scaling_plot.coloured(
        (data["checkpoint"], "", data) for data in results))
    self.root = ElementTree.fromstring(text)
    ticks = lambda axis: {
        float(t.get(axis)) - 3.5 * (axis == "y"): float(
            t.text.rstrip("%").replace(",", ""))
        for t in self.root.iter(f"{SVG}text")
        if t.get("class") == f"tick {axis}"}
    places = list(ticks("x").items())
    assert len(places) > 1
    powers = [math.log2(value) if value >= 1 else value - 1
              for _, value in places]
    self._x = np.polyfit([x for x, _ in places], powers, 1)
    self._y = np.polyfit(*zip(*ticks("y").items(), strict=True), 1)

  def value(self, x, y):
    power = np.polyval(self._x, float(x))
    return (2**power if power >= 0 else power + 1,
            np.polyval(self._y, float(y)) / 100)

  def series(self):
    """Groups of the results, without the legend's."""
    ground = self.root.findall(f"{SVG}g[@transform]")[0]
    return [g for g in ground if "series" in g.get("class", "")]

  def lines(self, kind="line"):
    """Values along each line of a kind, of every result."""
    return [[self.value(*point) for point in re.findall(
        r"[ML]([\d.]+) ([\d.]+)", path.get("d"))]
            for g in self.series() for path in g.findall(f"{SVG}path")
            if path.get("class") == kind]

  def told(self):
    return [t.text for g in self.series() for t in g.iter(f"{SVG}title")]

  def legend(self):
    return ["".join(t.itertext()) for t in self.root.findall(f"{SVG}text")
            if t.get("class") == "label row"]


def test_each_series_in_its_order():
  drawn = Drawing(result())
  [maxima] = drawn.lines()
  np.testing.assert_allclose(maxima, [(15.5, 0.2), (40.0, 0.37)], rtol=1e-3)
  [waits] = drawn.lines("line waits")
  np.testing.assert_allclose(
      waits, [(46.0, 0.38), (70.0, 0.5), (90.0, 0.6)], rtol=1e-3)
  assert [text for text in drawn.told() if ", free: 38.0%" in text]
  assert len(drawn.told()) == 5


def test_waits_under_a_maximum_are_a_series_of_their_own():
  data = result()
  data["cells"] += [cell(64, 2, 60.0, 0.45), cell(64, 1, 55.0, 0.4),
                    cell(32, 1, 30.0, 0.3)]
  drawn = Drawing(data)
  [maxima] = drawn.lines()
  np.testing.assert_allclose(maxima, [(15.5, 0.2), (40.0, 0.37)], rtol=1e-3)
  expected = [[(46.0, 0.38), (70.0, 0.5), (90.0, 0.6)],
              [(40.0, 0.37), (55.0, 0.4), (60.0, 0.45)], [(30.0, 0.3)]]
  for found, wanted in zip(
      drawn.lines("line waits"), expected, strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def bars(drawn):
  """Ends of every error bar."""
  found = []
  for g in drawn.series():
    for path in g.iter(f"{SVG}path"):
      if path.get("class") == "error":
        x, low, high = re.match(
            r"M([\d.]+) ([\d.]+)V([\d.]+)", path.get("d")).groups()
        found.append([drawn.value(x, y)[1] for y in (low, high)])
  return found


def test_error_bars_are_one_standard_error():
  found = sorted(bars(Drawing(result())))
  np.testing.assert_allclose(
      found, [(a - 0.02, a + 0.02) for a in (0.2, 0.37, 0.38, 0.5, 0.6)],
      atol=1e-3)


def test_errors_that_are_rough_or_undefined_are_said():
  of = lambda clusters, error: {"checkpoint": "sft", "cells": [
      cell(-1, 0, 46.0, 0.38, error, num_clusters=clusters),
      cell(-1, 0, 23.0, 0.38, error, num_clusters=clusters)]}
  assert not [key for key in Drawing(of(10, 0.1)).legend() if "clust" in key]
  rough = [key for key in Drawing(of(3, 0.1), of(3, 0.2)).legend()
           if "3 clusters" in key]
  assert len(rough) == 1
  drawn = Drawing(of(1, None))
  assert [key for key in drawn.legend() if "undefined" in key]
  assert not bars(drawn)  # No bar is drawn.


def test_the_majority_vote_is_drawn_where_there_is_one():
  votes = [{"samples": k, "mean_tokens": 46.0 * k, "accuracy": 0.3 + 0.1 * k}
           for k in (1, 2)]
  drawn = Drawing(result(), result("rl", majority_baseline=votes))
  [dotted] = drawn.lines("line votes")
  np.testing.assert_allclose(dotted, [[46.0, 0.4], [92.0, 0.5]], rtol=1e-3)
  assert "· majority vote of free samples" in " ".join(drawn.legend())


def test_prompts_that_ask_are_open_unless_they_are_forced():
  asked = dict(asked="tokens", amount=20, max_thinking_steps=-1)
  data = {"checkpoint": "sft", "cells": [
      cell(-1, 0, 46.0, 0.38), cell(-1, 0, 22.0, 0.3, **asked),
      cell(20, 0, 20.0, 0.3, **asked)]}
  drawn = Drawing(data)
  marks = [path.get("class") for g in drawn.series()
           for path in g.iter(f"{SVG}path")
           if "mark" in path.get("class")]
  assert marks == ["mark", "mark open", "mark"]
  assert drawn.lines() == [[]]  # What was asked for is no maximum.
  assert drawn.told()[1].startswith("sft, asked for 20 tokens: ")
  assert drawn.told()[2].startswith("sft, asked for 20 tokens and forced: ")


@pytest.mark.parametrize("tokens", [0.0, 4.0])
def test_no_thinking_at_all_has_a_place(tokens):
  drawn = Drawing({"checkpoint": "sft", "cells": [
      cell(0, 0, tokens, 0.1, None), cell(16, 0, 16.0, 0.2, None)]})
  [maxima] = drawn.lines()
  np.testing.assert_allclose(maxima, [(tokens, 0.1), (16.0, 0.2)], atol=2e-2)


@pytest.mark.parametrize("data, reason", [
    ([], "The results hold no cells"),
    ([{"checkpoint": "sft", "cells": [cell(-1, 0, 0.0, 0.1)]}],
     "No completion has a thinking token")])
def test_a_file_without_a_curve_says_why(data, reason):
  text = scaling_plot.standalone(scaling_plot.coloured(
      ("sft", "", each) for each in data))
  assert reason in "".join(ElementTree.fromstring(text).itertext())


def test_a_file_needs_nothing_else():
  """Its colours are fixed, on a ground of its own: a dark page shows it too."""
  text = scaling_plot.standalone(scaling_plot.coloured(
      [("<sft> & more", "", result())]))
  root = ElementTree.fromstring(text)
  assert "var(" not in text and "url(" not in text and "@import" not in text
  assert root.find(f"{SVG}rect").get("fill") == "#ffffff"
  assert "<sft> & more" in "".join(root.itertext())


def test_starting_weights_are_grey_once():
  found = scaling_plot.coloured(
      (name, "", result(name)) for name in ("init", "sft", "init", "rl"))
  assert [each.colour for each in found] == [-1, 0, 1, 2]


def test_the_picture_of_the_quickstart_is_of_this_code():
  """The README shows a plot of the same form as those that a run leaves."""
  page = pathlib.Path(__file__).parents[2] / "docs/images"
  text = (page / "quickstart_curve.svg").read_text()
  style = scaling_plot.standalone([]).partition("<rect")[0]
  assert text.partition("<rect")[0].split(">", 1)[1] == style.split(">", 1)[1]
  assert "reason, free" in text
