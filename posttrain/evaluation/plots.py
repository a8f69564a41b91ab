"""Accuracy against thinking tokens, as a PNG.

One colour per checkpoint. Circles on a line are the maxima of thinking tokens,
the star is thinking as long as the model likes, squares on a dashed line are
forced waits (one line for each maximum that they have), triangles are prompts
that ask for an amount (filled ones are forced to it as well), the dotted line
is a majority vote that spends as many tokens. Error bars are one standard
error; there is none where it is undefined.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import axes, container, figure

from posttrain.evaluation import statistics, summary

COLOURS = ("#6b7280", "#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")


def scaling_curve(
    results: Sequence[Mapping[str, Any]], path: str | os.PathLike,
) -> None:
  """Draws the results of one evaluate stage and replaces the file at `path`.

  Args:
    results: one per checkpoint, as in `<stage>/eval/<checkpoint>.json`.
    path: of the PNG.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  scaling_figure(results).savefig(temporary, format="png", dpi=160)
  os.replace(temporary, path)


def scaling_figure(results: Sequence[Mapping[str, Any]]) -> figure.Figure:
  """The same as a figure, which belongs to no window and no global state."""
  with matplotlib.rc_context({"font.size": 10, "axes.axisbelow": True}):
    drawn = figure.Figure(figsize=(7.5, 4.8), layout="constrained")
    ax = drawn.subplots()
    for i, result in enumerate(results):
      draw_checkpoint(ax, result, COLOURS[i % len(COLOURS)])
    smallest = min(
        (cell["mean_thinking_tokens"] for result in results
         for cell in result["cells"]), default=1)
    if smallest < 1:  # No logarithm of nothing: linear from 0 to 1 token.
      ax.set_xscale("symlog", base=2, linthresh=1)
    else:
      ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g}%")
    ax.set_xlabel("mean thinking tokens")
    ax.set_ylabel("accuracy")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    remarks = statistics.cautions(
        cell for result in results for cell in result["cells"])
    if remarks:
      ax.set_title("\n".join(remarks), fontsize=8, wrap=True)
    if ax.get_legend_handles_labels()[0]:
      ax.legend(frameon=False, fontsize=9)
    return drawn


def draw_checkpoint(
    ax: axes.Axes, result: Mapping[str, Any], colour: str,
) -> None:
  """Adds one checkpoint's maxima, free cell, waits and majority vote."""
  name = result["checkpoint"]
  cells = [c for c in result["cells"] if not c.get("asked")]
  by_tokens = lambda cell: cell["mean_thinking_tokens"]
  maxima = sorted(
      (c for c in cells if c["max_thinking_tokens"] >= 0
       and not c["num_waits"]), key=by_tokens)
  free = [c for c in cells
          if c["max_thinking_tokens"] < 0 and not c["num_waits"]]
  if maxima:
    _points(ax, maxima, colour, "o-", f"{name}: maximum")
  for maximum, series in summary.waits_by_maximum(cells).items():
    _points(ax, series, colour, "s--", f"{name}: forced waits"
            + f", at most {maximum}" * (maximum >= 0))
    for cell in filter(lambda cell: cell["num_waits"], series):
      ax.annotate(
          f"{cell['num_waits']}", (by_tokens(cell), cell["accuracy"]),
          xytext=(6, -9), textcoords="offset points", color=colour, fontsize=8)
  if free:
    _points(ax, free, colour, "*", f"{name}: free", size=11)
  for filled in (False, True):
    asking = [c for c in result["cells"] if c.get("asked") and filled == (
        max(c["max_thinking_tokens"], c["max_thinking_steps"]) >= 0)]
    if asking:
      bars = _points(ax, asking, colour, "^", f"{name}: asked for"
                     + " and forced" * filled, size=6)
      bars[0].set_fillstyle("full" if filled else "none")
  votes = result.get("summary", {}).get("majority_baseline") or []
  if votes:
    ax.plot(
        [v["mean_tokens"] for v in votes], [v["accuracy"] for v in votes],
        ":", color=colour, label=f"{name}: majority vote")


def _points(
    ax: axes.Axes, cells: Sequence[Mapping[str, Any]], colour: str, style: str,
    label: str, *, size: float = 4.5,
) -> container.ErrorbarContainer:
  # A cell of one question or of one cluster has no standard error.
  errors = [np.nan if cell["standard_error"] is None
            else cell["standard_error"] for cell in cells]
  return ax.errorbar(
      [cell["mean_thinking_tokens"] for cell in cells],
      [cell["accuracy"] for cell in cells], yerr=errors, fmt=style,
      color=colour, label=label, markersize=size, capsize=2, linewidth=1.5,
      elinewidth=1)
