r"""Symbolic equivalence of two answers, by math-verify.

Parsing and simplifying a model's text can take for ever, or all memory. So call
it in a worker process (`posttrain.episodes.workers`), which is killed when it
is late: math-verify's own time-out is a signal, which works in a main thread
only and not inside C code.
"""

import functools
import logging
import re
from typing import Any, NamedTuple

LAYOUT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\b|\\[,!;: ]|[\s{}$~]")
CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})([ap])\.?m\.?", re.IGNORECASE)


class Verdict(NamedTuple):
  """A status of `posttrain.tasks.grading`, and the reason of an "error"."""
  status: str
  reason: str


def prepare() -> None:
  """Imports math-verify and sympy, and makes their parser."""
  _parse("7")


def compare(gold: str, answer: str) -> Verdict:
  """Compares an answer with the gold one.

  Two times of day are compared here, everything else by math-verify.

  Args:
    gold, answer: LaTeX, as found inside a box.

  Returns:
    "ok", "wrong", "error", or "unparseable" (the answer).

  Raises:
    ValueError: the gold answer cannot be parsed.
  """
  wanted, found = time_of_day(gold), time_of_day(answer)
  if wanted and found:
    return Verdict("ok" if wanted == found else "wrong", "")
  try:
    return _judge(gold, answer)
  except _NoGold:
    raise ValueError(
        f"math-verify cannot parse the gold answer {gold!r}, so nothing can be "
        "compared to it. Correct the answer column.") from None
  except Exception as error:  # A model's text may make any library fail.
    return Verdict("error", f"{type(error).__name__}: {error}"[:500])


def time_of_day(text: str) -> tuple[int, int, str] | None:
  r"""Reads hours, minutes and "a" or "p" of `4:30 \text{ p.m.}`.

  math-verify reads that as 4/30, whatever the half of the day, and does not
  read `4:30 p.m.`.
  """
  match = CLOCK.fullmatch(LAYOUT.sub("", text))
  return (int(match[1]), int(match[2]), match[3].lower()) if match else None


def _spelled(gold: str) -> str:
  """Spells a gold answer so that math-verify can parse it."""
  time_read = time_of_day(gold)
  if not time_read:
    return gold
  hours, minutes, half = time_read
  return rf"{hours}:{minutes:02d} \text{{ {half}.m.}}"


class _NoGold(Exception):
  """math-verify cannot parse the gold answer."""


def _judge(gold: str, answer: str) -> Verdict:
  wanted = _parse(_spelled(gold))
  if all(isinstance(form, str) for form in wanted):
    raise _NoGold
  found = _parse(answer)
  if not found:
    return Verdict("unparseable", "")
  same = _math_verify().verify(
      wanted, found, timeout_seconds=None, raise_on_error=True)
  if not same and all(isinstance(form, str) for form in found):
    return Verdict("unparseable", "")
  return Verdict("ok" if same else "wrong", "")


def _parse(text: str) -> list:
  return _math_verify().parse(rf"\boxed{{{text}}}", parsing_timeout=None)


@functools.cache
def _math_verify() -> Any:
  """Imports math-verify at the first comparison, since it takes long."""
  import math_verify

  # At each call it warns that its time-out is off; records hold the output.
  logging.getLogger("math_verify").setLevel(logging.ERROR)
  return math_verify
