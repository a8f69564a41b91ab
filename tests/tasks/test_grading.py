r"""Oracles: Decimal for values, a stack for braces, listed cases by hand."""

from decimal import Decimal

import hypothesis
import hypothesis.strategies as st
import pytest

from posttrain.tasks import grading


@pytest.mark.parametrize("text, number", [
    ("18", "18"), ("18.", "18"), ("18.00", "18"), ("$1,080.50.", "1080.5"),
    ("-5", "-5"), ("= -5", "-5"), ("-$5", "-5"), ("7-3", "3"), ("7 - 3", "3"),
    ("(2)-3", "3"), (".5", "0.5"), ("50%", "50"), ("0070", "70"), ("-0", "0"),
    ("\N{MINUS SIGN}4", "-4"), ("1, 2", "2"), ("(3,4)", "4"), ("1/2", "2"),
    ("it is 3 (not 4)", "4"), ("109,200,000", "109200000"), ("x2", "2"),
    ("3.5.", "3.5"), ("in 2024.", "2024"), ("none", None), ("", None),
    ("-", None), ("$.", None)])
def test_last_number(text, number):
  assert grading.last_number(text) == number


def test_first_number():
  assert grading.first_number(" 1,200 dollars, or 3") == "1200"
  assert grading.first_number("unknown") is None


@hypothesis.settings(deadline=None)
@hypothesis.given(st.decimals(
    allow_nan=False, allow_infinity=False, places=4))
def test_a_canonical_number_has_one_spelling_per_value(value):
  for text in (f"{value:f}", f"{value:,f}", f"${value:,f}", f"{value:f}00"):
    number = grading.canonical_number(text)
    assert Decimal(number) == value
    assert grading.canonical_number(number) == number
    assert number == grading.canonical_number(f"{value:f}")


def test_long_numbers_are_not_rounded():
  digits = "1" * 60
  assert grading.canonical_number(digits) == digits
  assert grading.canonical_number("9" * 10_000) == "9" * 10_000


@pytest.mark.parametrize("text", ["", "-", ".", "1.2.3", "1e5", "x", "1/2"])
def test_what_is_no_number(text):
  assert grading.canonical_number(text) is None


def test_grades_of_numbers():
  assert grading.grade_number("5", "5") == (1.0, "ok", "5")
  assert grading.grade_number("6", "5") == (0.0, "wrong", "6")
  assert grading.grade_number(None, "5") == (0.0, "unparseable", None)
  with pytest.raises(ValueError, match="1,000"):
    grading.grade_number("5", "1,000")


@pytest.mark.parametrize("text, content", [
    (r"so \boxed{5}.", "5"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{a_{b_{c}}} }", "a_{b_{c}}"),
    (r"\fbox{7}", "7"),
    (r"\boxed{7} or \fbox{8}", "8"),
    (r"\boxed {7}", "7"),
    (r"$\boxed 7$ apples", "7"),
    ("\\boxed 7\nmore", "7"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{3} but \boxed{4", "3"),  # Cut off.
    (r"\boxed{3} but \boxed{}", "3"),
    (r"\boxed{4", None), (r"\boxed", None), (r"\boxedx{3}", None),
    ("5", None), ("", None)])
def test_last_boxed(text, content):
  assert grading.last_boxed(text) == content


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(alphabet="{}a\\b ", max_size=20))
def test_a_box_ends_where_its_braces_balance(inner):
  """A stack, one character at a time, finds the same content."""
  text, depth, i = "{" + inner, 0, 0
  while i < len(text):
    if text[i] == "\\":
      i += 2
      continue
    depth += (text[i] == "{") - (text[i] == "}")
    if depth == 0:
      break
    i += 1
  content = text[1:i].strip() if depth == 0 and i < len(text) else None
  assert grading.last_boxed("\\boxed" + text) == (content or None)
