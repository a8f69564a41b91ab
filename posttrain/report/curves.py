"""Charts of the metrics of stages that have steps.

A stage's record names the series that one chart has together (`charts`). A
metric that is in no chart is drawn by itself, so that nothing logged is left
out. Runs that have a stage of the same name share its charts: then the colour
is the run, the dash the series.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.evaluation import markup, svg
from posttrain.report.read import Run, Stage
from posttrain.telemetry.charts import Chart

SAMPLED_WAITS = Chart(
    "Waits of the policy's own", {}, caption="Mean number per completion of "
    "the wait text among sampled tokens, in the saved rollouts.")

FORMATS = {
    "number": markup.number,
    "share": lambda value: f"{100 * value:.3g}%",
    "seconds": lambda value: f"{value:.3g} s",
}


def curves(runs: Sequence[Run]) -> markup.Html:
  """Draws a section per stage that has steps, over all runs that have it."""
  stages: dict[tuple[str, str], list[tuple[Run, Stage]]] = {}
  for run in runs:
    for stage in run.stages:
      if stage.has_steps:
        stages.setdefault((stage.name, stage.kind), []).append((run, stage))
  return markup.join(
      _section(name, kind, found, compare=len(runs) > 1)
      for (name, kind), found in stages.items())


def _section(
    name: str, kind: str, found: list[tuple[Run, Stage]], *, compare: bool,
) -> markup.Html:
  heading = markup.tag("h3", f"{name} ", markup.tag("small", kind))
  having = [(run, stage) for run, stage in found if stage.rows]
  if not having:
    return heading + markup.missing("No metrics.")
  charts, empty = [], []
  drawn = max((stage.charts for _, stage in having), key=len)
  for chart in drawn:
    lines = series(chart, having, compare=compare)
    if lines:
      charts.append(draw(chart, lines, stacked=chart.stacked and not compare))
    elif not chart.optional:
      empty.append(chart.title.lower())
  waits = sampled_waits(having)
  if waits:
    charts.append(draw(SAMPLED_WAITS, waits))
  others = []
  for metric in _other_metrics(drawn, having):
    chart = Chart(metric, {metric: metric})
    others.append(draw(chart, series(chart, having, compare=compare)))
  parts = [heading, markup.div("charts", *charts)]
  if empty:
    parts.append(markup.missing(f"Not recorded: {', '.join(empty)}."))
  if others:
    parts.append(markup.details(
        f"{len(others)} more metrics",
        markup.div("charts", *others)))
  return markup.join(parts)


def _other_metrics(
    charts: Sequence[Chart], found: Sequence[tuple[Run, Stage]],
) -> list[str]:
  drawn = {"stage", "step"}
  for chart in charts:
    drawn |= {*chart.metrics, *chart.spread.values()}
  names = {name for _, stage in found for row in stage.rows for name in row}
  return sorted(
      name for name in names - drawn
      if any(row.get(name) is not None for _, stage in found
             for row in stage.rows))


def series(
    chart: Chart, found: Sequence[tuple[Run, Stage]], *, compare: bool,
) -> list[svg.Line]:
  """Makes a line per run and metric that has at least one value."""
  lines = []
  for i, (run, stage) in enumerate(found):
    for j, (metric, label) in enumerate(chart.metrics.items()):
      rows = [row for row in stage.rows if metric in row]
      ys = [_drawable(row[metric], chart.log) for row in rows]
      if all(y is None for y in ys):
        continue
      spread = chart.spread.get(metric)
      lines.append(svg.Line(
          label=(f"{run.label}: {label}" if compare and len(chart.metrics) > 1
                 else run.label if compare else label),
          xs=[row["step"] for row in rows], ys=ys,
          colour=i if compare else j, dash=j % 3 if compare else 0,
          # Bands of several runs would hide one another.
          spread=[row.get(spread) for row in rows]
          if spread and not compare else None))
  return lines


def sampled_waits(found: Sequence[tuple[Run, Stage]]) -> list[svg.Line]:
  """Counts waits that the policy sampled, where rollouts were saved."""
  lines = []
  for i, (run, stage) in enumerate(found):
    text = run.config.get("thinking", {}).get("wait_text")
    means = {
        step: sum(_said(text, row) for row in rows) / len(rows)
        for step, rows in stage.rollouts.items() if text and rows}
    if means:
      lines.append(svg.Line(
          label=run.label, xs=list(means), ys=list(means.values()), colour=i))
  return lines


def _said(text: str, row: Mapping[str, Any]) -> int:
  return sum(segment.count(text) for segment, provenance in row["segments"]
             if provenance == "sampled")


def _drawable(value: Any, log: bool) -> float | None:
  """Value to draw; None leaves a gap, where there is none or no logarithm."""
  return None if value is None or (log and value <= 0) else value


def draw(
    chart: Chart, lines: Sequence[svg.Line], *, stacked: bool = False,
) -> markup.Html:
  """Draws a chart of at least one line."""
  if stacked:
    lines = filled(lines)
  groups = [
      bar_width(lines) if stacked else svg.group_size(line) for line in lines]
  lines = [svg.thinned(*pair) for pair in zip(lines, groups, strict=True)]
  tops = stack(lines) if stacked else lines
  form = FORMATS[chart.unit]
  x = svg.value_axis(
      (at for line in lines for at in line.xs), svg.LEFT,
      svg.WIDTH - svg.RIGHT)
  y = svg.value_axis(
      _extent(tops), svg.HEIGHT - svg.BOTTOM, svg.TOP,
      kind="log" if chart.log else "linear",
      with_zero=stacked or chart.unit != "number" or _near_zero(tops),
      limits=(0, 1) if chart.unit == "share" else None)
  drawn = ([_area(tops, i, x, y) for i in range(len(tops))] if stacked
           else [svg.draw_line(line, x, y) for line in lines])
  caption = chart.caption
  if any(line.spread for line in lines):
    caption += " The band is one standard deviation."
  if max(groups) > 1:
    caption += f" Each point is the mean of {max(groups)} steps."
  return svg.figure(
      chart.title,
      svg.grid(x, y, form, "step") + markup.join(drawn),
      caption=caption.strip(), hover=svg.hover_data(lines, x, form),
      legend_of=lines if len(lines) > 1 else ())


def _extent(lines: Sequence[svg.Line]) -> list[float]:
  values = [y for line in lines for y in line.ys if y is not None]
  for line in lines:
    for y, spread in zip(line.ys, line.spread or (), strict=False):
      if y is not None and spread is not None:
        values += [y - spread, y + spread]
  return values


def _near_zero(lines: Sequence[svg.Line]) -> bool:
  """Tests if an axis from zero leaves a third of its length for the values."""
  values = _extent(lines)
  return 0 <= min(values) < 0.67 * max(values)


def filled(lines: Sequence[svg.Line]) -> list[svg.Line]:
  """Extends every line to the steps of all, with zero where it took no time."""
  steps = sorted({x for line in lines for x in line.xs})
  filled = []
  for line in lines:
    known = dict(zip(line.xs, line.ys, strict=True))
    filled.append(dataclasses.replace(
        line, xs=steps, ys=[known.get(step) or 0.0 for step in steps]))
  return filled


def bar_width(lines: Sequence[svg.Line]) -> int:
  """Steps per point of a stack: whole batches of rollouts, 40 points or so.

  Only the first update of a batch has a rollout to wait for.
  """
  steps = len(lines[0].xs)
  period = max(
      -(-steps // max(1, sum(y != 0 for y in line.ys))) for line in lines)
  return period * max(1, -(-steps // (40 * period)))


def stack(lines: Sequence[svg.Line]) -> list[svg.Line]:
  """Sums the series one on top of another."""
  tops: list[svg.Line] = []
  for line in lines:
    below = tops[-1].ys if tops else [0.0] * len(line.ys)
    tops.append(dataclasses.replace(line, ys=[
        (a or 0) + (b or 0) for a, b in zip(line.ys, below, strict=True)]))
  return tops


def _area(
    tops: Sequence[svg.Line], i: int, x: svg.Axis, y: svg.Axis,
) -> markup.Html:
  """Draws the i-th layer of a stack, from the top of the one below."""
  line = tops[i]
  below = tops[i - 1].ys if i else [0.0] * len(line.xs)
  upper = [(x(a), y(b or 0)) for a, b in zip(line.xs, line.ys, strict=True)]
  lower = [(x(a), y(b or 0)) for a, b in zip(line.xs, below, strict=True)]
  outline = svg.path([*upper, *reversed(lower)])
  return markup.Html(
      f'<g class="series {svg.colour_class(line.colour)}">'
      f'<path class="area" d="{outline}Z"/></g>')
