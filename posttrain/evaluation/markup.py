"""HTML elements. Every text that comes from a run is escaped here."""

import html
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NONE = "\u2013"  # In place of a number that is not there.


class Html(str):
  """Markup: put into a page as it is, where a plain `str` is escaped."""

  def __add__(self, other: str) -> "Html":
    return Html(str.__add__(self, text(other)))


def text(value: Any) -> Html:
  """Escapes `value` as text; leaves `Html` alone."""
  return value if isinstance(value, Html) else Html(html.escape(str(value)))


def tag(
    name: str, *children: Any, attributes: Mapping[str, Any] | None = None,
) -> Html:
  """Makes `<name attributes>children</name>`."""
  given = "".join(
      f' {key}="{html.escape(str(value))}"'
      for key, value in (attributes or {}).items())
  return Html(f"<{name}{given}>{join(children)}</{name}>")


def div(kind: str, *children: Any) -> Html:
  """Makes a div of one class."""
  return tag("div", *children, attributes={"class": kind})


def join(children: Iterable[Any]) -> Html:
  return Html("".join(text(child) for child in children))


def missing(message: str) -> Html:
  """Says on the page that something is not there."""
  return tag("p", message, attributes={"class": "missing"})


def table(
    header: Sequence[Any], rows: Iterable[Sequence[Any]], *,
    words: int = 1,
) -> Html:
  """Makes a table whose columns from `words` on are numbers.

  A rule sets rows apart whose first column differs from that of the row above,
  where several columns are words.
  """
  def line(cell: str, values: Sequence[Any], kind: str = "") -> Html:
    kinds = ["word" if i < words else "number" for i in range(len(values))]
    return tag("tr", *(
        tag(cell, value, attributes={"class": kind})
        for value, kind in zip(values, kinds, strict=True)),
        attributes={"class": kind} if kind else None)

  rows = list(rows)
  firsts = [
      "first" if words > 1 and i and row[0] != rows[i - 1][0] else ""
      for i, row in enumerate(rows)]
  head = tag("thead", line("th", header))
  body = tag("tbody", *(
      line("td", row, first) for row, first in zip(rows, firsts, strict=True)))
  return div("scroll", tag("table", head, body))


def details(summary: str, *children: Any, is_open: bool = False) -> Html:
  return tag(
      "details", tag("summary", summary), *children,
      attributes={"open": ""} if is_open else None)


def json_script(identifier: str, data: Any) -> Html:
  """Embeds data for the page's script. No text in it can close the element."""
  encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
  for character in "<>&\u2028\u2029":
    encoded = encoded.replace(character, f"\\u{ord(character):04x}")
  return Html(
      f'<script type="application/json" id="{html.escape(identifier)}">'
      f"{encoded}</script>")


def document(
    title: str, body: Html, *, style: str, policy: str, script: str = "",
) -> str:
  """Writes a page that needs nothing else.

  Args:
    policy: its content policy, which can forbid every request, so that
      nothing in a run can add one.
  """
  return (
      '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
      '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
      f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
      f"<title>{text(title)}</title>\n<style>\n{style}</style>\n"
      f"</head>\n<body>\n{body}\n{script}</body>\n</html>\n")


def made_by(verb: str) -> Html:
  """The footer of a page."""
  return tag("footer", f"Made by posttrain {verb}, " + time.strftime(
      "%Y-%m-%d %H:%M UTC", time.gmtime()))


def percent(value: float | None, digits: int = 1) -> str:
  """Formats a share: `0.8375` -> "83.8%"; a dash for None."""
  return NONE if value is None else f"{100 * value:.{digits}f}%"


def number(value: float | None) -> str:
  """Formats a number to four significant digits; a dash for None.

  Below a thousandth in powers of ten, without zeros that say nothing:
  `0.00015` -> "1.5e-4".
  """
  if value is None:
    return NONE
  if float(value).is_integer() and abs(value) < 1e15:
    return f"{int(value):,}"
  if abs(value) < 1e-3:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def with_error(value: float, error: float | None) -> str:
  """Formats percent with its standard error, which may be undefined."""
  return f"{percent(value)} ± {points(error)}"


def points(error: float | None) -> str:
  """Formats a standard error in percentage points; "n/a" where undefined."""
  if error is None or math.isnan(error):
    return "n/a"
  return f"{100 * error:.1f}"
