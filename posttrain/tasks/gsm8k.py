"""GSM8K: grade-school word problems (https://arxiv.org/abs/2110.14168).

The files are OpenAI's `train.jsonl` and `test.jsonl`. Their calculator
annotations (`<<48/2=24>>`) are removed; the final line `#### 72` stays.
"""

import re
from collections.abc import Sequence
from typing import Any

from posttrain.tasks import grading, jsonl

SPLITS = ("train", "test")
REMEDY = (
    "Get the files with `git clone https://github.com/openai/"
    "grade-school-math` and set args.path to its folder "
    "grade_school_math/data, which holds train.jsonl and test.jsonl.")
MARK = "####"


def problems(
    split: str, *, path: str, count: int = 0, instruction: str = "",
) -> Sequence[dict[str, Any]]:
  """Reads the problems, in the file's order.

  Args:
    split: "train" or "test".
    path: the folder that holds the two files.
    count: number of problems from the start; 0 for all.
    instruction: a paragraph to append to every question.

  Returns:
    Rows of `id` (the line, from 0), `prompt`, `gold` and `answer`.

  Raises:
    ValueError: the split is unknown, the file missing or a row malformed.
  """
  if split not in SPLITS:
    raise ValueError(
        f"GSM8K has no split {split!r}. Use one of {', '.join(SPLITS)}.")
  rows = jsonl.read_rows(
      path, f"{split}.jsonl", ("question", "answer"), count=count,
      remedy=REMEDY)
  return [_row(i, row, f"{path}/{split}.jsonl, line {i + 1}", instruction)
          for i, row in enumerate(rows)]


def demonstrations(
    split: str, *, path: str, count: int = 0, instruction: str = "",
) -> Sequence[dict[str, Any]]:
  """Reads questions with their written solutions: `prompt` and `completion`.

  Arguments and errors are those of `problems`.
  """
  return [
      dict(id=row["id"], prompt=row["prompt"], completion=row["gold"])
      for row in problems(
          split, path=path, count=count, instruction=instruction)]


def reward(
    prompt: str, completion: str, *, answer: str, **columns: Any,
) -> float:
  """Scores 1 if the completion's number is the answer, else 0."""
  del prompt, columns
  return grade(completion, answer).score


def grade(completion: str, answer: str) -> grading.Grade:
  return grading.grade_number(extract(completion), answer)


def extract(completion: str) -> str | None:
  """Finds the first number after the last `####`, else the last number.

  Commas, dollar and percent signs and a final dot do not matter, and 18.00
  is 18.
  """
  _, mark, final = completion.rpartition(MARK)
  return (grading.first_number(final) if mark
          else grading.last_number(completion))


def _row(
    number: int, row: dict[str, Any], where: str, instruction: str,
) -> dict[str, Any]:
  # The annotations were made for a model with a calculator; here they would be
  # learnt as text.
  solution = re.sub(r"<<[^<>\n]*>>", "", row["answer"])
  _, mark, final = solution.rpartition(MARK)
  answer = grading.canonical_number(final.strip())
  if not mark or answer is None:
    raise ValueError(
        f"{where}: the answer should end in a line '#### NUMBER', and ends in "
        f"{row['answer'][-40:]!r}.")
  prompt = row["question"].strip()
  if instruction:
    prompt = f"{prompt}\n\n{instruction}"
  return dict(id=number, prompt=prompt, gold=solution, answer=answer)
