r"""Graders run in the trainer, on whatever a looping policy writes.

Oracles: a slow reading of boxes, one character and one box at a time, and an
alarm: what takes minutes where time grows with the square is stopped.
"""

import contextlib
import re
import signal

import hypothesis
import hypothesis.strategies as st
import pytest

from posttrain.tasks import grading, gsm8k, math500, signs, sums, symbolic

LENGTH = 60_000  # Characters.
FUNCTIONS = (
    grading.last_boxed, grading.first_number, grading.last_number,
    grading.canonical_number, gsm8k.extract, math500.extract, signs.extract,
    sums.extract, symbolic.time_of_day)
UNITS = (
    r"\boxed{", r"\boxed{ ", r"\boxed{{", r"\boxed{}", r"\boxed ", r"\boxed $",
    "\\boxed\n", r"\boxed", r"\boxed}{", r"\fbox{x}", r"\boxed{\{", "{", "}",
    "\\", r"\\", r"\left", r"\frac", "1", "1,", ",111", "1,111", "1.", ".1",
    "-", "-1", "$", "$-", "%", " ", "\n", "####", "#### ", "1 + ", "1 +",
    "<think>", "</think>", r"\text", "4:30 p.m. ", "\N{MINUS SIGN}", "7-")
AROUND = (("", "x"), (r"\boxed{", "}"), (r"\boxed{", "x}"), ("#### -", ""),
          ("", "y" * 3000))


@contextlib.contextmanager
def within(seconds, what):
  """Fails where it takes more of the CPU, and does not wait for the end."""
  def late(*_):
    pytest.fail(f"{what} took more than {seconds} s")
  before = signal.signal(signal.SIGVTALRM, late)
  signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: (
    f"{f.__module__.rpartition('.')[2]}.{f.__name__}"))
def test_time_grows_with_the_length(function):
  """Each takes milliseconds; a square of the length, minutes."""
  for unit in UNITS:
    for before, after in AROUND:
      text = before + unit * (LENGTH // len(unit)) + after
      with within(5, f"{function.__name__} of {before}{unit}...{after}"):
        function(text)


def slow_last_boxed(text):
  """The documented rule, box by box."""
  for start in reversed([m.start() for m in re.finditer(
      r"\\(?:boxed|fbox)", text)]):
    rest = re.sub(r"^\\(boxed|fbox)", "", text[start:])
    inner = rest.lstrip()
    if inner.startswith("{"):
      content = slow_braced(inner)
    elif inner != rest:
      content = inner.split("\n")[0].split("$")[0]
    else:
      continue
    if content is not None and content.strip() and (
        len(content) <= grading.LONGEST):
      return content.strip()
  return None


def slow_braced(text):
  depth = i = 0
  while i < len(text):
    if text[i] == "\\":
      i += 2
      continue
    depth += (text[i] == "{") - (text[i] == "}")
    if depth == 0:
      return text[1:i]
    i += 1
  return None


PIECES = st.lists(st.sampled_from([
    "\\boxed", "\\fbox", "\\boxed{", "\\boxed {", "{", "}", " ", "\n", "\t",
    "\u2003", "\x1c", "$", "\\", "\\{", "\\}", "x", "12", "boxed{", "\0"]),
    max_size=24).map("".join)


@hypothesis.settings(deadline=None, max_examples=1000)
@hypothesis.given(PIECES)
def test_the_last_box_is_that_of_the_slow_reading(text):
  assert grading.last_boxed(text) == slow_last_boxed(text)


@pytest.mark.parametrize("spelled", [r"\boxed{%s}", r"\boxed %s"])
def test_a_box_of_a_whole_page_is_no_answer(spelled):
  long = "x" * (grading.LONGEST - 1) + "y"
  assert grading.last_boxed(spelled % long) == long
  assert grading.last_boxed(spelled % (long + "x")) is None
  text = r"\boxed{3} or $" + spelled % (long + "x") + "$"
  assert grading.last_boxed(text) == "3" == slow_last_boxed(text)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(alphabet="+-.$,% 0123456789x", max_size=12))
def test_canonical_numbers_are_those_of_the_plain_pattern(text):
  """With one way only to read the digits."""
  plain = re.sub(r"[$,%\s]", "", text)
  match = (re.fullmatch(r"([+-]?)([0-9]+)\.?", plain)
           or re.fullmatch(r"([+-]?)([0-9]*)\.([0-9]+)", plain))
  found = grading.canonical_number(text)
  assert (found is None) == (match is None)
  if match is not None:
    assert float(found) == pytest.approx(float(plain))
