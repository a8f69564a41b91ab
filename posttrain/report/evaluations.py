"""Results of evaluations: the scaling plot, its figures, the flips.

Reads `<stage>/eval/<checkpoint>.json` as an evaluation writes it (see
`posttrain.evaluation.summary`); a figure that a result lacks is a dash.
"""

from collections.abc import Sequence

import numpy as np

from posttrain.evaluation import (
  markup,
  scaling_plot,
  statistics,
  summary,
  svg,
)
from posttrain.evaluation.scaling_plot import (
  Cell,
  Result,
  describe,
  unscored,
)
from posttrain.report.read import Run


def results(runs: Sequence[Run]) -> dict[str, list[Result]]:
  """Groups results by the name of their stage, over all runs that have it."""
  found: dict[str, list] = {}
  for run in runs:
    prefix = f"{run.label}: " if len(runs) > 1 else ""
    for stage in run.stages:
      for data in stage.evaluations:
        found.setdefault(stage.name, []).append(
            (f"{prefix}{data['checkpoint']}", run.label, data))
  return {name: scaling_plot.coloured(group) for name, group in found.items()}


def evaluations(runs: Sequence[Run]) -> markup.Html:
  """Draws a section per stage that has results."""
  found = results(runs)
  if not found:
    return markup.missing("No evaluation has been written yet.")
  return markup.join(_section(name, group) for name, group in found.items())


def figures(runs: Sequence[Run]) -> str:
  """Formats the accuracies as plain lines, for a terminal."""
  return "".join(
      f"{name}  {result.label}, {describe(cell)}: "
      f"{markup.with_error(cell['accuracy'], cell.get('standard_error'))} "
      f"(n {cell['n']:,}{unscored(cell)})\n"
      for name, group in results(runs).items()
      for result in group for cell in result.cells)


def _section(name: str, group: Sequence[Result]) -> markup.Html:
  return markup.join([
      markup.tag("h3", name),
      *(markup.tag("p", remark, attributes={"class": "caption"})
        for remark in (_decoding(group), *statistics.cautions(
            cell for result in group for cell in result.cells))),
      headline(group), plot(group), s1_table(group),
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
  """Draws a tile per checkpoint: its accuracy when thinking freely."""
  tiles = []
  for result, before in zip(group, (None, *group), strict=False):
    free = result.cell("free")
    if free is None:
      continue
    change = ""
    if before is not None and before.run == result.run:
      change = paired_change(before, result)
    tiles.append(_tile(
        svg.colour_class(result.colour), result.label, free["accuracy"],
        _uncertainty(free), change))
  baseline = group[0].data.get("summary", {}).get("constant_baseline")
  if baseline:
    tiles.append(_tile(
        "base", "best constant answer", baseline["accuracy"],
        f"n {baseline['n']}, answer {baseline.get('answer', 'not recorded')}"))
  return markup.div("tiles", *tiles)


def _tile(
    colour: str, title: str, accuracy: float, *lines: str) -> markup.Html:
  return markup.div(
      f"tile {colour}", markup.tag("b", title),
      markup.tag("span", markup.percent(accuracy),
                 attributes={"class": "figure"}),
      *(markup.tag("span", line) for line in lines if line))


def _uncertainty(cell: Cell) -> str:
  error = cell.get("standard_error")
  return (f"n {cell['n']:,}{summary.in_clusters(cell)}{unscored(cell)}, "
          "standard error "
          + ("n/a" if error is None else markup.percent(error)))


def paired_change(before: Result, after: Result) -> str:
  """Paired difference on the same questions, or "" where they are others."""
  scores = [_free_scores(before), _free_scores(after)]
  if len(scores[0]) < 2 or scores[0].keys() != scores[1].keys():
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
  """Maps a question to the share of its free completions that are right."""
  by_question: dict[int, list[bool]] = {}
  for record in result.data.get("records", ()):
    if record["cell"] == "free":
      by_question.setdefault(record["id"], []).append(record["correct"])
  return {question: float(np.mean(scores))
          for question, scores in by_question.items()}


def plot(group: Sequence[Result]) -> markup.Html:
  """Draws the scaling plot in the page, or says why there is none."""
  empty = scaling_plot.why_empty(group)
  if empty:
    return markup.missing(empty)
  lines, marks = scaling_plot.keys(group)
  return svg.figure(
      scaling_plot.TITLE, scaling_plot.drawing(group), legend_of=lines,
      marks=marks, width=scaling_plot.WIDTH, height=scaling_plot.HEIGHT,
      kind="chart wide", caption="Error bars are one standard error. Point at "
      "a mark for its figures.")


def s1_table(group: Sequence[Result]) -> markup.Html:
  """Tabulates Control, Scaling and Performance, over maxima and over requests.
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
  """Draws a count with a bar; its full length is a quarter of the questions."""
  width = min(100.0, 400 * count / n)
  return markup.Html(
      f'{count:,} <span class="bar {kind}"><i style="width:{width:.1f}%"></i>'
      "</span>")


def cells_table(group: Sequence[Result]) -> markup.Html:
  """Tabulates every cell of every checkpoint, with n and standard error."""
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
  for result, cell in ((r, c) for r in group for c in r.cells):
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
