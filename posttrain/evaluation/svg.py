"""Charts as SVG, in a page or as a file.

A chart is drawn on a fixed canvas that its place scales, and coloured by the
rules of `svg.css`. A page replaces their colours in its dark theme, and has a
chart's numbers as JSON for its script, which shows the values under the
pointer. A file is light and needs nothing else.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

from posttrain.evaluation import markup

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 34
MAX_POINTS = 300  # Above, a chart shows means of equal groups of points.
STYLE = (pathlib.Path(__file__).parent / "svg.css").read_text()
COLOURS = 8  # The style has this many; a ninth series is drawn hollow.


@dataclasses.dataclass(frozen=True)
class Line:
  """One series.

  Attributes:
    label: for the legend.
    xs, ys: same length, in order of x; None leaves a gap.
    colour: 0.., the page's palette; -1 is its grey.
    dash: 0 solid, 1 dashed, 2 dotted.
    spread: half height of a band around the line, or None.
  """

  label: str
  xs: Sequence[float]
  ys: Sequence[float | None]
  colour: int = 0
  dash: int = 0
  spread: Sequence[float | None] | None = None


def colour_class(colour: int) -> str:
  if colour < 0:
    return "base"
  return f"c{colour % COLOURS}" + (" hollow" if colour >= COLOURS else "")


def group_size(line: Line) -> int:
  """Number of points to average, so that the line has at most MAX_POINTS."""
  return max(1, -(-len(line.xs) // MAX_POINTS))


def thinned(line: Line, size: int) -> Line:
  """Averages each `size` consecutive points."""
  if size == 1:
    return line

  def means(values: Sequence[float | None]) -> list[float | None]:
    groups = [values[i:i + size] for i in range(0, len(values), size)]
    known = [[v for v in group if v is not None] for group in groups]
    return [math.fsum(group) / len(group) if group else None
            for group in known]

  return dataclasses.replace(
      line, xs=[x for x in means(line.xs) if x is not None], ys=means(line.ys),
      spread=None if line.spread is None else means(line.spread))


@dataclasses.dataclass(frozen=True)
class Axis:
  """Map of values low..high onto pixels first..last.

  Attributes:
    kind: "linear", "log" (base 10) or "log2", which below 1 is linear, so
      that zero has a place.
  """

  low: float
  high: float
  first: float
  last: float
  kind: str = "linear"

  def _transform(self, value: float) -> float:
    if self.kind == "log":
      return math.log10(value)
    if self.kind == "log2":
      return math.log2(value) if value >= 1 else value - 1
    return value

  def __call__(self, value: float) -> float:
    low, high = self._transform(self.low), self._transform(self.high)
    share = (self._transform(value) - low) / (high - low)
    return round(self.first + share * (self.last - self.first), 2)

  def ticks(self, count: int = 5) -> list[float]:
    if self.kind == "log":
      powers = _powers(10, self.low, self.high, count)
      if len(powers) > 2:
        return powers
      # 1, 2 and 5 times the powers of ten.
      between = [
          step * 10.0**e for e in range(
              math.floor(math.log10(self.low)),
              math.floor(math.log10(self.high)) + 1)
          for step in (1, 2, 5) if self.low <= step * 10.0**e <= self.high]
      return between or nice_ticks(self.low, self.high, count)
    if self.kind == "log2":
      powers = ([0.0] if self.low <= 0 else []) + _powers(
          2, max(self.low, 1), self.high, count + 3)
      if len(powers) > 1:
        return powers
    return nice_ticks(self.low, self.high, count)


def _powers(base: int, low: float, high: float, count: int) -> list[float]:
  exponents = range(
      math.ceil(math.log(low, base) - 1e-9),
      math.floor(math.log(high, base) + 1e-9) + 1)
  every = max(1, -(-len(exponents) // count))
  return [float(base) ** e for e in exponents if e % every == 0]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Lists round numbers (1, 2, 5 times a power of ten) within low..high."""
  raw = (high - low) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [round(i * step, 12) for i in range(first, last + 1)]


def value_axis(
    values: Iterable[float], first: float, last: float, *,
    kind: str = "linear", with_zero: bool = False,
    limits: tuple[float, float] | None = None,
) -> Axis:
  """Makes an axis that holds all values, with some room.

  Args:
    with_zero: the axis starts at zero if no value is below.
    limits: beyond which there is never room (0 and 1 for shares).
  """
  values = list(values)
  low, high = min(values), max(values)
  if kind == "log":
    return Axis(low / 1.3, high * 1.3, first, last, kind)
  if kind == "log2":
    return Axis(low / 1.15 if low > 1 else max(0.0, low - 0.1), high * 1.15,
                first, last, kind)
  if with_zero and low >= 0:
    low = 0.0
  if low == high:  # Nothing varies: show how far from zero it is.
    low, high = min(0.0, 1.2 * low), max(0.0, 1.2 * high) or float(low == 0)
  room = 0.06 * (high - low)
  low, high = low - (room if low != 0 else 0), high + room
  if limits is not None:
    low, high = max(low, limits[0]), min(high, limits[1])
  return Axis(low, high, first, last)


def grid(x: Axis, y: Axis, y_format: Callable[[float], str],
         x_label: str) -> markup.Html:
  """Draws tick lines and labels of both axes."""
  parts = []
  for value in y.ticks():
    place = y(value)
    parts.append(
        f'<line class="grid" x1="{x.first}" x2="{x.last}" y1="{place}" '
        f'y2="{place}"/><text class="tick y" x="{x.first - 6}" '
        f'y="{place + 3.5}">{markup.text(y_format(value))}</text>')
  for value in x.ticks():
    place = x(value)
    parts.append(
        f'<line class="grid" x1="{place}" x2="{place}" y1="{y.first}" '
        f'y2="{y.first + 4}"/><text class="tick x" x="{place}" '
        f'y="{y.first + 15}">{markup.number(value)}</text>')
  parts.append(
      f'<text class="label" x="{(x.first + x.last) / 2}" '
      f'y="{y.first + 29}">{markup.text(x_label)}</text>')
  return markup.Html("".join(parts))


def path(points: Iterable[tuple[float, float] | None]) -> str:
  """Writes SVG path data; None lifts the pen."""
  commands, pen = [], "M"
  for point in points:
    if point is None:
      pen = "M"
      continue
    commands.append(f"{pen}{point[0]:g} {point[1]:g}")
    pen = "L"
  return "".join(commands)


def draw_line(line: Line, x: Axis, y: Axis) -> markup.Html:
  """Draws a band, a line, and a dot for each point that no line reaches."""
  points = [
      None if value is None else (x(at), y(value))
      for at, value in zip(line.xs, line.ys, strict=True)]
  parts = [_band(line, x, y)] if line.spread is not None else []
  parts.append(f'<path class="line" d="{path(points)}"/>')
  for i, point in enumerate(points):
    alone = (i == 0 or points[i - 1] is None) and (
        i + 1 == len(points) or points[i + 1] is None)
    if point is not None and alone:
      parts.append(f'<circle class="dot" cx="{point[0]:g}" '
                   f'cy="{point[1]:g}" r="3"/>')
  return markup.Html(
      f'<g class="series {colour_class(line.colour)} dash{line.dash}">'
      f'{"".join(parts)}</g>')


def _band(line: Line, x: Axis, y: Axis) -> str:
  clip = lambda value: min(max(value, y.low), y.high)
  edges = [
      (x(at), y(clip(value + spread)), y(clip(value - spread)))
      for at, value, spread in zip(
          line.xs, line.ys, line.spread or (), strict=True)
      if value is not None and spread is not None]
  outline = [(a, top) for a, top, _ in edges] + [
      (a, bottom) for a, _, bottom in reversed(edges)]
  return f'<path class="band" d="{path(outline)}Z"/>' if edges else ""


def legend(
    lines: Sequence[Line], marks: Sequence[tuple[str, str]],
) -> markup.Html:
  """Draws the lines' colours and dashes, then (mark, meaning) pairs."""
  return markup.div("legend", *(
      markup.tag("span", markup.Html(
          f'<svg viewBox="0 0 24 8" class="series {colour_class(line.colour)} '
          f'dash{line.dash}"><path class="line" d="M0 4L24 4"/></svg>'),
          line.label, attributes={"class": "key"})
      for line in lines), *(
          markup.tag("span", markup.tag("b", mark), meaning,
                     attributes={"class": "key"})
          for mark, meaning in marks))


def hover_data(
    lines: Sequence[Line], x: Axis, y_format: Callable[[float], str],
) -> str:
  """Encodes the values that the page's script shows under the pointer."""
  return json.dumps({
      "kind": x.kind, "x": [x.low, x.high, x.first, x.last],
      "series": [{
          "label": line.label, "x": list(line.xs),
          "y": [None if v is None else y_format(v) for v in line.ys]}
          for line in lines]}, separators=(",", ":"))


def figure(
    title: str, body: markup.Html, *, caption: str = "",
    legend_of: Sequence[Line] = (), marks: Sequence[tuple[str, str]] = (),
    hover: str = "", width: int = WIDTH, height: int = HEIGHT,
    kind: str = "chart",
) -> markup.Html:
  """Draws a titled chart with its legend and a caption."""
  drawing = markup.tag(
      "svg", body, attributes={
          "viewBox": f"0 0 {width} {height}", "role": "img",
          "aria-label": title, **({"data-hover": hover} if hover else {})})
  return markup.tag(
      "figure", markup.tag("figcaption", title),
      *([legend(legend_of, marks)] if legend_of else []), drawing,
      *([markup.tag("p", caption, attributes={"class": "caption"})]
        if caption else []), attributes={"class": kind})


def file(
    title: str, body: str, lines: Sequence[Line],
    marks: Sequence[tuple[str, str]], remarks: Sequence[str] = (), *,
    width: int, height: int,
) -> str:
  """Writes an SVG file: title, legend and remarks above the drawing."""
  keys = [f'<tspan fill="currentColor" class="{colour_class(line.colour)}" '
          f'dx="12">\u2501\u2501</tspan> {markup.text(line.label)}'
          for line in lines]
  rows = ["".join(keys[i:i + 6]) for i in range(0, len(keys), 6)]
  rows.append("".join(f'<tspan dx="12">{mark} {meaning}</tspan>'
                      for mark, meaning in marks))
  rows += map(markup.text, remarks)
  texts = [f'<text class="label head" x="{LEFT}" y="24">{markup.text(title)}'
           "</text>"]
  texts += [f'<text class="label row" x="{LEFT}" y="{24 + 19 * n}">{row}</text>'
            for n, row in enumerate(filter(None, rows), start=1)]
  # A viewer of pictures may know no variables, and has one theme.
  colours = dict(re.findall(r"(--\w+): (#\w+);", STYLE))
  style = re.sub(r"var\((--\w+)\)", lambda found: colours[found[1]], STYLE)
  top = 24 + 19 * (len(texts) - 1)
  return (
      f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" '
      f'viewBox="0 0 {width} {height + top}" role="img">\n'
      f"<title>{markup.text(title)}</title>\n<style>\n{style}</style>\n"
      f'<rect width="100%" height="100%" fill="{colours["--card"]}"/>\n'
      f"{''.join(texts)}\n<g transform=\"translate(0 {top})\">{body}</g>\n"
      "</svg>\n")
