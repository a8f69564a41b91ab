"""The axes show the measured values."""

import numpy as np
import pytest

from posttrain.evaluation import plots


def cell(maximum, waits, tokens, accuracy, error=0.02):
  return {
      "max_thinking_tokens": maximum, "num_waits": waits,
      "mean_thinking_tokens": tokens, "accuracy": accuracy,
      "standard_error": error}


def result(name="sft", **summary):
  return {"checkpoint": name, "summary": summary, "cells": [
      cell(-1, 0, 46.0, 0.38), cell(64, 0, 40.0, 0.37),
      cell(16, 0, 15.5, 0.2), cell(-1, 2, 90.0, 0.6), cell(-1, 1, 70.0, 0.5)]}


def lines(figure):
  return {
      container.get_label(): container.lines[0].get_xydata().tolist()
      for container in figure.axes[0].containers}


def test_each_series_in_its_order():
  figure = plots.scaling_figure([result()])
  assert lines(figure) == {
      "sft: maximum": [[15.5, 0.2], [40.0, 0.37]],
      "sft: forced waits": [[46.0, 0.38], [70.0, 0.5], [90.0, 0.6]],
      "sft: free": [[46.0, 0.38]]}


def test_waits_under_a_maximum_are_a_series_of_their_own():
  data = result()
  data["cells"] += [cell(64, 2, 60.0, 0.45), cell(64, 1, 55.0, 0.4),
                    cell(32, 1, 30.0, 0.3)]
  found = lines(plots.scaling_figure([data]))
  assert found["sft: maximum"] == [[15.5, 0.2], [40.0, 0.37]]
  assert found["sft: forced waits"] == [[46.0, 0.38], [70.0, 0.5], [90.0, 0.6]]
  assert found["sft: forced waits, at most 64"] == [
      [40.0, 0.37], [55.0, 0.4], [60.0, 0.45]]
  assert found["sft: forced waits, at most 32"] == [[30.0, 0.3]]


def test_error_bars_are_one_standard_error():
  figure = plots.scaling_figure([result()])
  container = figure.axes[0].containers[0]
  low, high = container.lines[2][0].get_segments()[0]
  np.testing.assert_allclose([low[1], high[1]], [0.18, 0.22])


def titles(figure):
  return [axes.get_title() for axes in figure.axes]


def test_errors_that_are_rough_or_undefined_are_said():
  of = lambda clusters, error: {"checkpoint": "sft", "cells": [
      cell(-1, 0, 46.0, 0.38, error) | {"num_clusters": clusters}]}
  assert titles(plots.scaling_figure([of(10, 0.1)])) == [""]
  (title,) = titles(plots.scaling_figure([of(3, 0.1), of(3, 0.2)]))
  assert title.count("3 clusters") == 1
  figure = plots.scaling_figure([of(1, None)])
  assert "undefined" in titles(figure)[0]
  (bars,) = figure.axes[0].containers[0].lines[2]
  assert not bars.get_segments()[0].size  # No bar is drawn.


def test_the_majority_vote_is_drawn_where_there_is_one():
  votes = [{"samples": k, "mean_tokens": 46.0 * k, "accuracy": 0.3 + 0.1 * k}
           for k in (1, 2)]
  figure = plots.scaling_figure([result(), result(
      "rl", majority_baseline=votes)])
  dotted = [line for line in figure.axes[0].lines
            if line.get_label() == "rl: majority vote"]
  np.testing.assert_allclose(
      dotted[0].get_xydata(), [[46.0, 0.4], [92.0, 0.5]])


@pytest.mark.parametrize("tokens, scale", [(0.0, "symlog"), (4.0, "log")])
def test_no_thinking_at_all_has_a_place(tokens, scale):
  figure = plots.scaling_figure([{
      "checkpoint": "sft", "cells": [cell(0, 0, tokens, 0.1, None)]}])
  assert figure.axes[0].get_xscale() == scale


def test_the_file_is_a_png_and_is_replaced(tmp_path):
  path = tmp_path / "eval" / "curve.png"
  for results in ([result()], []):
    plots.scaling_curve(results, path)
    assert path.read_bytes().startswith(b"\x89PNG")
  assert [p.name for p in path.parent.iterdir()] == ["curve.png"]
