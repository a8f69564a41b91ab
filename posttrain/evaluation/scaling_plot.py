"""The scaling plot: accuracy against thinking tokens, as SVG.

One colour per checkpoint. Circles on a line are maxima of thinking tokens, the
diamond is thinking as long as the model likes, squares on a dashed line are
forced waits (one line for each maximum that they have), triangles are prompts
that ask for an amount (filled ones are forced to it as well), the dotted line
is a majority vote that spends as many tokens. Error bars are one standard
error; there is none where it is undefined.

The report has the drawing inside of its page, a run has it as a file.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain.evaluation import markup, statistics, summary, svg

WIDTH, HEIGHT = 940, 420
TITLE = "Accuracy against thinking tokens"
MARKS = (("\u25cf", "maximum of thinking tokens"), ("\u25c6", "free"),
         ("\u25a0 - -", "forced waits, and how many"))
ASKED = (("\u25b3", "asked for an amount"), ("\u25b2", "and forced to it"))
VOTES = (("\u00b7 \u00b7 \u00b7", "majority vote of free samples"),)
Cell = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
  """One evaluated checkpoint of one run.

  Attributes:
    label: its name, with the run's where there are several.
    run: the run's name.
    colour: of the palette; -1, the grey, for starting weights.
    data: the content of `<stage>/eval/<checkpoint>.json`.
  """

  label: str
  run: str
  colour: int
  data: Mapping[str, Any]

  @property
  def cells(self) -> Sequence[Cell]:
    return self.data["cells"]

  def cell(self, name: str) -> Cell | None:
    return next((c for c in self.cells if c["name"] == name), None)

  @property
  def votes(self) -> Sequence[Mapping[str, Any]]:
    return self.data.get("summary", {}).get("majority_baseline") or ()


def coloured(
    found: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[Result]:
  """Gives (label, run, data) each a colour; the first "init" is grey."""
  results: list[Result] = []
  for label, run, data in found:
    grey = data["checkpoint"] == "init" and not any(
        result.colour < 0 for result in results)
    results.append(Result(
        label, run, -1 if grey else sum(r.colour >= 0 for r in results), data))
  return results


def why_empty(results: Sequence[Result]) -> str:
  """Says why there is nothing to draw; "" where there is."""
  cells = [cell for result in results for cell in result.cells]
  if not cells:
    return "The results hold no cells, so there is no plot."
  if not any(cell["mean_thinking_tokens"] for cell in cells):
    return "No completion has a thinking token, so there is no curve."
  return ""


def drawing(results: Sequence[Result]) -> markup.Html:
  """Draws axes, lines and marks of results that `why_empty` lets through."""
  cells = [cell for result in results for cell in result.cells]
  votes = [vote for result in results for vote in result.votes]
  tops = [c["accuracy"] + s * (c.get("standard_error") or 0)
          for c in (*cells, *votes) for s in (-1, 1)]
  x = svg.value_axis(
      [c["mean_thinking_tokens"] for c in cells] +
      [v["mean_tokens"] for v in votes], svg.LEFT, WIDTH - svg.RIGHT,
      kind="log2")
  y = svg.value_axis(
      tops, HEIGHT - svg.BOTTOM, svg.TOP, with_zero=min(tops) < 0.4,
      limits=(0, 1))
  return svg.grid(
      x, y, lambda value: markup.percent(value, 0),
      "mean thinking tokens (logarithmic)") + markup.join(
          _draw_result(result, x, y) for result in results)


def keys(
    results: Sequence[Result],
) -> tuple[list[svg.Line], list[tuple[str, str]]]:
  """Lists lines and (mark, meaning) pairs for the legend."""
  asked = any(c.get("asked") for r in results for c in r.cells)
  return [svg.Line(r.label, (), (), r.colour) for r in results], [
      *MARKS, *(ASKED if asked else ()),
      *(VOTES if any(r.votes for r in results) else ())]


def standalone(results: Sequence[Result]) -> str:
  """Writes the plot as an SVG file, with its legend, on a white ground."""
  empty = why_empty(results)
  lines, marks = ([], []) if empty else keys(results)
  remarks = [empty] if empty else statistics.cautions(
      cell for result in results for cell in result.cells)
  return svg.file(
      TITLE, "" if empty else drawing(results), lines, marks, remarks,
      width=WIDTH, height=HEIGHT)


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
  votes = [(x(v["mean_tokens"]), y(v["accuracy"])) for v in result.votes]
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
  """Draws a cell's error bar and mark, with its figures as a tooltip."""
  at, height = x(cell["mean_thinking_tokens"]), y(cell["accuracy"])
  error = cell.get("standard_error")
  told = (f"{result.label}, {describe(cell)}: "
          f"{markup.with_error(cell['accuracy'], error)} (n {cell['n']}"
          f"{unscored(cell)}), "
          f"{cell['mean_thinking_tokens']:.1f} thinking tokens")
  parts = []
  if error:
    low = y(max(cell["accuracy"] - error, y.low))
    high = y(min(cell["accuracy"] + error, y.high))
    parts.append(
        f'<path class="error" d="M{at} {low}V{high}M{at - 4} {low}h8'
        f'M{at - 4} {high}h8"/>')
  if cell.get("asked"):
    kind = "mark" if _forced(cell) else "mark open"
    parts.append(
        f'<path class="{kind}" d="M{at} {height - 6}l6 11h-12Z"/>')
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
  """Describes a cell in words."""
  if cell.get("asked"):
    amount = f"{cell['amount']:,} " * (cell["amount"] > 0)
    return (f"asked for {amount}{cell['asked']}" + " thinking" * (
        not cell["amount"]) + " and forced" * _forced(cell))
  waits, maximum = cell["num_waits"], cell["max_thinking_tokens"]
  parts = [f"{waits} forced wait{'s' * (waits > 1)}"] * (waits > 0) + [
      f"at most {maximum:,} thinking tokens"] * (maximum >= 0)
  return ", ".join(parts) or "free"


def _forced(cell: Cell) -> bool:
  """Tests if a budget enforces the amount that the prompt asks for."""
  return max(cell["max_thinking_tokens"], cell["max_thinking_steps"]) >= 0


def unscored(cell: Cell) -> str:
  """Formats the number of completions that nothing could judge."""
  count = cell.get("unscored")
  return f", {count:,} not scored" if count else ""
