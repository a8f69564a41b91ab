r"""MATH-500: 500 competition problems (https://arxiv.org/abs/2305.20050).

Problems of MATH (https://arxiv.org/abs/2103.03874), graded by the equivalence
of the last `\boxed{}` with the answer.
"""

import re
from collections.abc import Sequence
from typing import Any

from posttrain.tasks import grading, jsonl, scoring, symbolic

REMEDY = (
    "Get it with `curl -L -O https://huggingface.co/datasets/HuggingFaceH4/"
    "MATH-500/resolve/main/test.jsonl` and set args.path to the folder that "
    "holds test.jsonl.")
INSTRUCTION = r"Put the final answer within \boxed{}."


def problems(
    split: str, *, path: str, count: int = 0, instruction: str = INSTRUCTION,
) -> Sequence[dict[str, Any]]:
  r"""Reads the problems, in the file's order.

  Args:
    split: "test".
    path: the folder that holds `test.jsonl`.
    count: number of problems from the start; 0 for all.
    instruction: a paragraph to append to every problem; "" for none.

  Returns:
    Rows of `id` (the line, from 0), `prompt`, `gold` (the written solution),
    `answer` (LaTeX), `subject` and `level`.

  Raises:
    ValueError: the split is unknown, the file missing or a row malformed.
  """
  if split != "test":
    raise ValueError(f"MATH-500 has no split {split!r}, only 'test'.")
  rows = jsonl.read_rows(
      path, "test.jsonl", ("problem", "solution", "answer"), count=count,
      remedy=REMEDY)
  suffix = f"\n\n{instruction}" if instruction else ""
  return [
      dict(id=i, prompt=row["problem"].strip() + suffix, gold=row["solution"],
           answer=row["answer"], subject=row.get("subject"),
           level=row.get("level"))
      for i, row in enumerate(rows)]


@scoring.prepared_by(symbolic.prepare)
def reward(
    prompt: str, completion: str, *, answer: str, **columns: Any,
) -> float | scoring.Score:
  """Scores 1 if the boxed answer is equivalent to the gold one, else 0.

  There is no score if comparing them fails.
  """
  del prompt, columns
  return scoring.judged(grade(completion, answer))


def grade(completion: str, answer: str) -> grading.Grade:
  """Grades a completion, with a status.

  Nothing bounds its time: see `posttrain.tasks.symbolic`.
  """
  found = grading.last_boxed(completion)
  if found is None:
    return grading.Grade(0.0, "unparseable", None)
  verdict = symbolic.compare(answer, found)
  return grading.Grade(float(verdict.status == "ok"), verdict.status, found)


def extract(completion: str) -> str | None:
  r"""Finds the last boxed answer, in a canonical spelling; None without one.

  Spacing, `\left`, `\right` and the kinds of fraction are ignored, and plain
  numbers are canonical. Different spellings of one value remain two votes.
  """
  found = grading.last_boxed(completion)
  if found is None:
    return None
  number = grading.canonical_number(found)
  if number is not None:
    return number
  # Layout only: spellings that may differ in value remain different votes.
  found = re.sub(r"\\[dt]frac", r"\\frac", found)
  found = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[,!;: ]", "", found)
  return re.sub(r"\s+", " ", found).strip(" $.")
