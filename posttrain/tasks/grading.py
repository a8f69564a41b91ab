r"""Grades answers that are numbers, and extracts answers from text.

An answer is the text after the thinking, see `posttrain.tasks.scoring`. This
module has functions of text only: no model, no process.
`posttrain.tasks.symbolic` judges answers that are formulas.

A grade has one of five statuses, so that a low score can be told from a
broken grader:

  ok           the answer is right; the only one that scores 1
  wrong        there is an answer, and it is another one
  unparseable  there is no answer, or none that can be read
  timeout      comparing took too long
  error        comparing failed
"""

import re
from typing import NamedTuple

# A minus is a sign only where no operand precedes it: 7-3 ends in 3.
NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?\$?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"|(?<![0-9])\.[0-9]+)")
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # An escaped brace is no brace.
# Most characters of a box's content. MATH's longest answer has 53. The output
# of a policy that repeats itself is no answer, and takes long to compare.
LONGEST = 2_000
LINE = re.compile(rf"[^$\n]{{0,{LONGEST + 1}}}")


class Grade(NamedTuple):
  """A score of 0 or 1, its status (see the module), and the answer as read."""
  score: float
  status: str
  parsed: str | None


def grade_number(answer: str | None, gold: str) -> Grade:
  """Compares canonical numbers, see `canonical_number`.

  Raises:
    ValueError: the gold answer is not a number.
  """
  if canonical_number(gold) != gold:
    raise ValueError(
        f"The gold answer {gold!r} is not a plain number such as -1234.5. "
        "Correct the problem's answer column.")
  if answer is None:
    return Grade(0.0, "unparseable", None)
  right = answer == gold
  return Grade(float(right), "ok" if right else "wrong", answer)


def first_number(text: str) -> str | None:
  """Finds the first number of a text, in canonical form; None without one."""
  number = NUMBER.search(_with_minus(text))
  return canonical_number(number[0]) if number else None


def last_number(text: str) -> str | None:
  """Finds the last number of a text, in canonical form; None without one."""
  numbers = NUMBER.findall(_with_minus(text))
  return canonical_number(numbers[-1]) if numbers else None


def canonical_number(text: str) -> str | None:
  """Spells each value one way: "$1,080.50" -> "1080.5", "-0." -> "0".

  Digits are never rounded: the text is cleaned, not converted. None if the text
  is not a number; a sign, a dollar sign, a percent sign, thousands commas and a
  final dot are allowed.
  """
  text = re.sub(r"[$,%\s]", "", _with_minus(text))
  # The dot is needed for the second run of digits: with two runs next to each
  # other the engine would try every split, which takes quadratic time.
  match = re.fullmatch(r"([+-]?)([0-9]*)(?:\.([0-9]*))?", text)
  if match is None or not (match[2] or match[3]):
    return None
  whole, part = match[2].lstrip("0") or "0", (match[3] or "").rstrip("0")
  value = f"{whole}.{part}" if part else whole
  return f"-{value}" if match[1] == "-" and value != "0" else value


def last_boxed(text: str) -> str | None:
  r"""Finds the content of the last `\boxed{}` or `\fbox{}` with balanced
  braces.

  `\boxed x` without braces is read up to the next dollar sign or line end.
  Empty boxes, and those of more than `LONGEST` characters, are passed over. The
  time is linear in the length of the text.
  """
  boxes = list(BOX.finditer(text))
  if not boxes:
    return None
  ends = _partners(text, boxes[0].end())
  for box in reversed(boxes):
    start = box.end()
    if text[start:start + 1] == "{":
      begin, end = start + 1, ends.get(start, -1)
    elif box[0][-1].isspace():
      line = LINE.match(text, start)
      assert line is not None  # It may be empty.
      begin, end = line.span()
    else:
      continue  # Another command, such as \boxedstyle.
    if 0 < end - begin <= LONGEST and (content := text[begin:end].strip()):
      return content
  return None


def _with_minus(text: str) -> str:
  return text.replace("\N{MINUS SIGN}", "-")


def _partners(text: str, start: int) -> dict[int, int]:
  """Finds where each brace that opens at or after `start` closes, if it does.

  An escaped brace is none. Read from another start, pairs of backslashes might
  be grouped otherwise, but not after a brace that opens a box, which no
  backslash precedes.
  """
  partners: dict[int, int] = {}
  opened: list[int] = []
  for found in BRACE.finditer(text, start):
    if found[0] == "{":
      opened.append(found.start())
    elif found[0] == "}" and opened:
      partners[opened.pop()] = found.start()
  return partners
