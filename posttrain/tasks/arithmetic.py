"""Arithmetic in a model's text: finds an expression and computes it.

It is exact: decimals are fractions until the end. Nothing is executed, and the
length of an expression bounds the work.
"""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

MOST_CHARACTERS = 200
LARGEST = 10**15  # Of every value on the way.
UNARY: dict[type, Callable[[Fraction], Fraction]] = {
    ast.UAdd: operator.pos, ast.USub: operator.neg}
BINARY: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv}


def evaluate_last(
    text: str, begin: str, end: str) -> tuple[str | None, str]:
  """Computes the last expression between two delimiters.

  Args:
    text: in which the last `end` closes the expression.
    begin, end: delimiters; the expression is behind the last `begin` before.

  Returns:
    The value, and ""; or None, and what is wrong with the expression.
  """
  before, closed, _ = text.rpartition(end)
  if not closed:
    return None, f"there is no {end}"
  _, opened, expression = before.rpartition(begin)
  if not opened:
    return None, f"there is no {begin}"
  try:
    return spell(evaluate(expression)), ""
  except ValueError as error:
    return None, str(error)


def evaluate(expression: str) -> Fraction:
  """Computes an expression of numbers, + - * / and parentheses.

  Raises:
    ValueError: it has something else, is too long, divides by zero, or a value
      on the way is larger than 10**15.
  """
  expression = expression.strip()
  if len(expression) > MOST_CHARACTERS:
    raise ValueError(f"it has more than {MOST_CHARACTERS} characters")
  if not set(expression) <= set("0123456789.+-*/() "):
    raise ValueError("it may have numbers, + - * / and parentheses")
  try:
    return _value(ast.parse(expression, mode="eval").body)
  except (SyntaxError, RecursionError, MemoryError) as error:
    raise ValueError("it is not well formed") from error
  except ZeroDivisionError as error:
    raise ValueError("it divides by zero") from error


def spell(value: Fraction) -> str:
  """Writes a value as a whole number, or as a decimal of up to 6 digits."""
  if value.denominator == 1:
    return str(value.numerator)
  return f"{float(value):.6g}"


def _value(node: ast.expr) -> Fraction:
  """Computes a node; `ast` has read the numbers."""
  match node:
    case ast.Constant(value=int() | float() as number):
      # Its shortest spelling, which is what was written: 0.1 is a tenth.
      value = Fraction(repr(number))
    case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
      value = UNARY[type(op)](_value(operand))
    case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
      value = BINARY[type(op)](_value(left), _value(right))
    case _:
      raise ValueError("it may have numbers, + - * / and parentheses")
  if abs(value) > LARGEST:
    raise ValueError("a value is larger than 10**15")
  return value
