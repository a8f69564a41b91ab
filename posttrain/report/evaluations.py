"""Results of the evaluate stages: the scaling plot, its figures, the flips.

Reads `<stage>/eval/<checkpoint>.json` as the evaluate stage writes it (see
`posttrain.evaluation.summary`); a figure that a result lacks is a dash.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.evaluation import statistics, summary
from posttrain.report import markup, svg
from posttrain.report.read import Run

WIDTH, HEIGHT = 940, 420
MARKS = (("\u25cf", "maximum of thinking tokens"), ("\u25c6", "free"),
         ("\u25a0 - -", "forced waits, and how many"))
ASKED = (("\u25b2", "asked for an amount"),)
VOTES = (("\u00b7 \u00b7 \u00b7", "majority vote of free samples"),)
Cell = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
  """One evaluated checkpoint of one run.

  Attributes:
    label: its name, with the run's where there are several.
    colour: the page's palette; -1, the grey, for starting weights.
    data: the file's content.
  """

  label: str
  run: str
  stage: str
  colour: int
  data: Mapping[str, Any]

  @property
  def cells(self) -> Sequence[Cell]:
    return self.data["cells"]

  def cell(self, name: str) -> Cell | None:
    return next((c for c in self.cells if c["name"] == name), None)


def results(runs: Sequence[Run]) -> dict[str, list[Result]]:
  """By the name of the evaluate stage, over all runs that have it."""
  found: dict[str, list[Result]] = {}
  for run in runs:
    for stage in run.stages:
      for data in stage.evaluations:
        group = found.setdefault(stage.name, [])
        checkpoint = data["checkpoint"]
        grey = checkpoint == "init" and not any(r.colour < 0 for r in group)
        group.append(Result(
            label=f"{run.label}: {checkpoint}" if len(runs) > 1
            else checkpoint,
            run=run.label, stage=stage.name,
            colour=-1 if grey else sum(r.colour >= 0 for r in group),
            data=data))
  return found


def evaluations(runs: Sequence[Run]) -> markup.Html:
  """One section per evaluate stage name."""
  found = results(runs)
  if not found:
    return markup.missing("No evaluation has been written yet.")
  return markup.join(_section(name, group) for name, group in found.items())


def figures(runs: Sequence[Run]) -> str:
  """The accuracies as plain lines, for a terminal."""
  return "".join(
      f"{name}  {result.label}, {describe(cell)}: "
      f"{markup.with_error(cell['accuracy'], cell.get('standard_error'))} "
      f"(n {cell['n']:,}{_unscored(cell)})\n"
      for name, group in results(runs).items()
      for result in group for cell in result.cells)


def _section(name: str, group: Sequence[Result]) -> markup.Html:
  return markup.join([
      markup.tag("h3", f"{name} ", markup.tag("small", "evaluate")),
      markup.tag("p", _decoding(group), attributes={"class": "caption"}),
      *(markup.tag("p", remark, attributes={"class": "caption"})
        for remark in statistics.cautions(
            cell for result in group for cell in result.cells)),
      headline(group), scaling_plot(group), s1_table(group),
      flips_table(group),
      markup.details("All cells", cells_table(group), is_open=True)])


def _decoding(group: Sequence[Result]) -> str:
  """Shows the decoding parameters, per checkpoint where they differ."""
  said = {
      result.label: ", ".join(
          f"{key} {value}" for key, value in
          result.data.get("decoding", {}).items())
      for result in group}
  if len(set(said.values())) == 1:
    return next(iter(said.values())) or "How it was decoded is not recorded."
  return "; ".join(f"{label}: {text or 'not recorded'}"
                   for label, text in said.items())


def headline(group: Sequence[Result]) -> markup.Html:
  """A tile per checkpoint with its accuracy when thinking freely."""
  tiles = []
  for result, before in zip(group, (None, *group), strict=False):
    free = result.cell("free")
    if free is None:
      continue
    change = ""
    if before is not None and before.run == result.run:
      change = paired_change(before, result)
    tiles.append(markup.div(
        f"tile {svg.colour_class(result.colour)}",
        markup.tag("b", result.label),
        markup.tag("span", markup.percent(free["accuracy"]),
                   attributes={"class": "figure"}),
        markup.tag("span", _uncertainty(free)),
        *([markup.tag("span", change)] if change else [])))
  baseline = group[0].data.get("summary", {}).get("constant_baseline")
  if baseline:
    tiles.append(markup.div(
        "tile base", markup.tag("b", "best constant answer"),
        markup.tag("span", markup.percent(baseline["accuracy"]),
                   attributes={"class": "figure"}),
        markup.tag("span", f"n {baseline['n']}, answer "
                   f"{baseline.get('answer', 'not recorded')}")))
  return markup.div("tiles", *tiles)


def _uncertainty(cell: Cell) -> str:
  error = cell.get("standard_error")
  return (f"n {cell['n']:,}{summary.in_clusters(cell)}{_unscored(cell)}, "
          "standard error "
          + ("n/a" if error is None else markup.percent(error)))


def _unscored(cell: Cell) -> str:
  """Completions that count as wrong, as nothing could judge them."""
  count = cell.get("unscored")
  return f", {count:,} not scored" if count else ""


def paired_change(before: Result, after: Result) -> str:
  """The difference on the same questions, or "" where they are others."""
  scores = [_free_scores(before), _free_scores(after)]
  if not scores[0] or scores[0].keys() != scores[1].keys():
    return ""
  if len(scores[0]) < 2:
    return ""
  questions = sorted(scores[0])
  cluster = {record["id"]: record.get("cluster")
             for record in after.data["records"]}
  alike = np.array([cluster[question] for question in questions])
  old, new = (np.array([side[question] for question in questions])
              for side in scores)
  difference = statistics.paired_difference(
      new, old, None if None in cluster.values() else alike)
  return (f"{100 * difference.mean:+.1f} ± {markup.points(difference.error)} "
          f"points on {before.data['checkpoint']}, paired")


def _free_scores(result: Result) -> dict[int, float]:
  """Question -> share of its free completions that are right."""
  by_question: dict[int, list[bool]] = {}
  for record in result.data.get("records", ()):
    if record["cell"] == "free":
      by_question.setdefault(record["id"], []).append(record["correct"])
  return {question: float(np.mean(scores))
          for question, scores in by_question.items()}


def scaling_plot(group: Sequence[Result]) -> markup.Html:
  """Accuracy against mean thinking tokens, with standard errors."""
  cells = [cell for result in group for cell in result.cells]
  if not cells:
    return markup.missing("The results hold no cells, so there is no plot.")
  votes = [vote for result in group for vote in _votes(result)]
  if not any(cell["mean_thinking_tokens"] for cell in cells):
    return markup.missing(
        "No completion has a thinking token, so there is no curve.")
  tops = [c["accuracy"] + s * (c.get("standard_error") or 0)
          for c in (*cells, *votes) for s in (-1, 1)]
  x = svg.value_axis(
      [c["mean_thinking_tokens"] for c in cells] +
      [v["mean_tokens"] for v in votes], svg.LEFT, WIDTH - svg.RIGHT,
      kind="log2")
  y = svg.value_axis(
      tops, HEIGHT - svg.BOTTOM, svg.TOP, with_zero=min(tops) < 0.4,
      limits=(0, 1))
  return svg.figure(
      "Accuracy against thinking tokens",
      svg.grid(x, y, lambda value: markup.percent(value, 0),
               "mean thinking tokens (logarithmic)")
      + markup.join(_draw_result(result, x, y) for result in group),
      legend_of=[svg.Line(r.label, (), (), r.colour) for r in group],
      marks=MARKS + (ASKED if any(c.get("asked") for c in cells) else ())
      + (VOTES if votes else ()), width=WIDTH, height=HEIGHT,
      kind="chart wide", caption="Error bars are one standard error. Point at "
      "a mark for its figures.")


def _votes(result: Result) -> Sequence[Mapping[str, Any]]:
  return result.data.get("summary", {}).get("majority_baseline") or ()


def _draw_result(result: Result, x: svg.Axis, y: svg.Axis) -> markup.Html:
  place = lambda cell: (x(cell["mean_thinking_tokens"]), y(cell["accuracy"]))
  asking = [c for c in result.cells if c.get("asked")]
  plain = [c for c in result.cells if not c.get("asked")]
  bounded = sorted(
      (c for c in plain
       if c["max_thinking_tokens"] >= 0 and not c["num_waits"]),
      key=lambda c: c["mean_thinking_tokens"])
  others = [c for c in plain if c not in bounded]
  waits = summary.waits_by_maximum(plain).values()
  votes = [(x(v["mean_tokens"]), y(v["accuracy"])) for v in _votes(result)]
  parts = [
      f'<path class="line" d="{svg.path(map(place, bounded))}"/>',
      *(f'<path class="line waits" d="{svg.path(map(place, series))}"/>'
        for series in waits),
      f'<path class="line votes" d="{svg.path(votes)}"/>' if votes else ""]
  parts += [_mark(result, cell, x, y) for cell in (
      *bounded, *others, *asking)]
  return markup.Html(
      f'<g class="series {svg.colour_class(result.colour)}">'
      f'{"".join(parts)}</g>')


def _mark(result: Result, cell: Cell, x: svg.Axis, y: svg.Axis) -> str:
  """A cell's error bar and its mark, with its figures as a tooltip."""
  at, height = x(cell["mean_thinking_tokens"]), y(cell["accuracy"])
  error = cell.get("standard_error")
  told = (f"{result.label}, {describe(cell)}: "
          f"{markup.with_error(cell['accuracy'], error)} (n {cell['n']}"
          f"{_unscored(cell)}), "
          f"{cell['mean_thinking_tokens']:.1f} thinking tokens")
  parts = []
  if error:
    low = y(max(cell["accuracy"] - error, y.low))
    high = y(min(cell["accuracy"] + error, y.high))
    parts.append(
        f'<path class="error" d="M{at} {low}V{high}M{at - 4} {low}h8'
        f'M{at - 4} {high}h8"/>')
  if cell.get("asked"):
    parts.append(
        f'<path class="mark" d="M{at} {height - 6}l6 11h-12Z"/>')
  elif cell["num_waits"]:
    parts.append(
        f'<rect class="mark" x="{at - 4}" y="{height - 4}" width="8" '
        f'height="8"/><text class="tick" x="{at + 8}" y="{height + 14}">'
        f'{cell["num_waits"]}</text>')
  elif cell["max_thinking_tokens"] >= 0:
    parts.append(f'<circle class="mark" cx="{at}" cy="{height}" r="4.5"/>')
  else:
    parts.append(
        f'<path class="mark" d="M{at} {height - 7}l6 7l-6 7l-6 -7Z"/>')
  return (f'<g tabindex="0"><title>{markup.text(told)}</title>'
          f'{"".join(parts)}</g>')


def describe(cell: Cell) -> str:
  """A cell in words."""
  if cell.get("asked"):
    amount = f"{cell['amount']:,} " * (cell["amount"] > 0)
    forced = max(cell["max_thinking_tokens"], cell["max_thinking_steps"]) >= 0
    return (f"asked for {amount}{cell['asked']}"
            + " thinking" * (not cell["amount"]) + " and forced" * forced)
  waits, maximum = cell["num_waits"], cell["max_thinking_tokens"]
  parts = [f"{waits} forced wait{'s' * (waits > 1)}"] * (waits > 0) + [
      f"at most {maximum:,} thinking tokens"] * (maximum >= 0)
  return ", ".join(parts) or "free"


def s1_table(group: Sequence[Result]) -> markup.Html:
  """Control, Scaling and Performance: over the maxima, and of what was asked.
  """
  points = lambda value: (
      markup.NONE if value is None else f"{100 * value:+.1f} points")
  rows = []
  for result in group:
    found = result.data.get("summary", {})
    families = {"maximum": found} if "performance" in found else {}
    families |= {f"asked for {name.replace('_', ', ')}": family
                 for name, family in found.get("asking", {}).items()}
    rows += [[
        result.label, name, markup.percent(family.get("control_per_run"), 0),
        markup.percent(family.get("control_per_sample"), 1),
        points(family.get("scaling_per_doubling")),
        points(family.get("scaling_per_1k")),
        markup.percent(family["performance"])]
             for name, family in families.items()]
  if not rows:
    return markup.missing(
        "No maxima of thinking tokens were measured, so there are no Control, "
        "Scaling and Performance.")
  return markup.tag("h4", "Control of the thinking (s1)") + markup.table(
      ["model", "by", "control, per run", "per sample",
       "scaling per doubling", "per 1,000 tokens", "performance"], rows,
      words=2)


def flips_table(group: Sequence[Result]) -> markup.Html:
  """Tabulates answer flips with each further wait."""
  rows = []
  for result in group:
    for flip in result.data.get("summary", {}).get("flips", ()):
      gained, lost, n = (
          flip["wrong_to_correct"], flip["correct_to_wrong"], flip["n"])
      maximum = flip.get("max_thinking_tokens", -1)  # Not in older results.
      rows.append([
          result.label, f"{flip['from_waits']} → {flip['to_waits']}"
          + f", at most {maximum:,}" * (maximum >= 0),
          _bar(lost, n, "lost"), _bar(gained, n, "gained"),
          f"{100 * (gained - lost) / n:+.1f} points", f"{n:,}"])
  if not rows:
    return markup.missing("No forced waits were measured, so no flips.")
  return markup.tag("h4", "Flips per wait") + markup.table(
      ["model", "waits", "right to wrong", "wrong to right", "net", "n"], rows,
      words=2)


def _bar(count: int, n: int, kind: str) -> markup.Html:
  """A count with a bar whose full length is a quarter of the questions."""
  width = min(100.0, 400 * count / n)
  return markup.Html(
      f'{count:,} <span class="bar {kind}"><i style="width:{width:.1f}%"></i>'
      "</span>")


def cells_table(group: Sequence[Result]) -> markup.Html:
  """Every cell of every checkpoint, with its n and standard error."""
  keys = {
      name: sorted({k for r in group for c in r.cells for k in c.get(name, {})},
                   key=int)
      for name in ("pass@k", "maj@k")}
  votes = [(name, k) for name in keys for k in keys[name]]
  header = ["model", "budget", "n", "accuracy", "thinking tokens", "median",
            "p95", "all tokens", "control",
            *(name.replace("k", k) for name, k in votes), "cut", "no answer",
            "not scored"]
  rows = []
  for result, cell in itertools.chain.from_iterable(
      ((result, cell) for cell in result.cells) for result in group):
    samples = cell.get("samples", 1)
    rows.append([
        result.label, describe(cell),
        f"{cell['n']:,}" + (f" x {samples}" if samples > 1 else ""),
        markup.with_error(cell["accuracy"], cell.get("standard_error")),
        *(markup.NONE if cell.get(key) is None else f"{cell[key]:.1f}"
          for key in ("mean_thinking_tokens", "median_thinking_tokens",
                      "p95_thinking_tokens", "mean_tokens")),
        markup.percent(cell.get("control")),
        *(markup.percent(cell.get(name, {}).get(k)) for name, k in votes),
        markup.percent(cell.get("finish", {}).get("length")),
        markup.percent(cell.get("no_answer")),
        markup.percent(cell["unscored"] / (cell["n"] * samples))
        if "unscored" in cell else markup.NONE])
  return markup.table(header, rows, words=2)
