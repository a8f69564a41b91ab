"""Worked values, and Python's own arithmetic on random expressions."""

import random
from fractions import Fraction

import pytest

from posttrain.tasks import arithmetic


@pytest.mark.parametrize("expression, value", [
    ("12*7", "84"), (" 12 * 7 ", "84"), ("2 + 3 * 4", "14"),
    ("(2 + 3) * 4", "20"), ("-3 - -4", "1"), ("+5", "5"), ("7 / 2", "3.5"),
    ("1 / 3", "0.333333"), ("0.1 + 0.2", "0.3"), ("6 / 3", "2"), ("-0.0", "0"),
    ("2.50", "2.5"), ("10 / 4 * 4", "10"), ("999999999999999", "9" * 15),
    ("1000000000000000 / 3", "3.33333e+14"), (".5 + 1.", "1.5")])
def test_values(expression, value):
  assert arithmetic.evaluate_last(f"<c>{expression}</c>", "<c>", "</c>") == (
      value, "")


@pytest.mark.parametrize("expression, reason", [
    ("", "not well formed"), ("1 +", "not well formed"),
    ("1 2", "not well formed"), ("(1", "not well formed"),
    ("012", "not well formed"), ("1 / 0", "divides by zero"),
    ("1 / (2 - 2)", "divides by zero"), ("2 ** 9", "numbers, + - * /"),
    ("7 // 2", "numbers, + - * /"), ("(1)(2)", "numbers, + - * /"),
    ("a", "numbers, + - * /"), ("1e9", "numbers, + - * /"),
    ("1j", "numbers, + - * /"), ("__import__('os')", "numbers, + - * /"),
    ("1\n+ 1", "numbers, + - * /"), ("\uff12", "numbers, + - * /"),
    ("9" * 16, "larger than"), ("9" * 15 + "*9", "larger than"),
    ("9" * 201, "more than 200"), ("(" * 100 + "1" + ")" * 100, "more than"),
    ("(" * 99, "not well formed"), ("-" * 199 + "1", ""),
    ("1" + "+1" * 99, ""), ("(" * 99 + "1" + ")" * 99, "")])
def test_hostile_expressions(expression, reason):
  value, found = arithmetic.evaluate_last(
      f"<c>{expression}</c>", "<c>", "</c>")
  assert reason in found and (value is None) == bool(found)
  # Deep but short ones may be too deep for Python's parser, or not.
  assert reason or value in ("-1", "100", "1")


@pytest.mark.parametrize("text, value, reason", [
    ("<c>1</c> then <c>2</c>", "2", ""), ("<c>1 <c>2+2</c> 7", "4", ""),
    ("2</c>", None, "there is no <c>"), ("<c>2", None, "there is no </c>"),
    ("</c>2<c>", None, "there is no <c>"), ("", None, "there is no")])
def test_the_last_expression_counts(text, value, reason):
  found, why = arithmetic.evaluate_last(text, "<c>", "</c>")
  assert found == value and reason in why


def test_random_expressions_are_pythons():
  rng = random.Random(0)

  def draw(depth):
    if not depth or rng.random() < 0.2:
      number = str(rng.randrange(100))
      return number, f"Fraction({number})"
    (a, b), (c, d) = draw(depth - 1), draw(depth - 1)
    sign = rng.choice("+-*/")
    text = f"{a}{sign}{c}", f"{b}{sign}{d}"
    return tuple(f"({each})" for each in text) if rng.random() < 0.7 else text

  checked = 0
  for _ in range(300):
    text, wanted = draw(3)
    try:
      value = eval(wanted)
    except ZeroDivisionError:
      with pytest.raises(ValueError, match="divides by zero"):
        arithmetic.evaluate(text)
      continue
    assert arithmetic.evaluate(text) == value and isinstance(value, Fraction)
    checked += 1
  assert checked > 200
