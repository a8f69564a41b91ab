"""Small sums for a real model: "What is 47 + 38?".

The difficulty is the range and the number of the terms. Problems are split by
the multiset of their terms, as in `posttrain.tasks.signs`.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from posttrain.tasks import grading, splits

PROMPT = "What is {sum}?"
ENUMERABLE = 100_000  # Up to so many problems are listed; more are drawn.


def problems(
    split: str, count: int, *, seed: int = 0, low: int = 1, high: int = 9,
    terms: int = 2, prompt: str = PROMPT,
) -> Sequence[dict[str, Any]]:
  """Draws distinct sums of a split, in a random order given by the seed.

  Args:
    split: "train", "validation" or "test".
    count: number of problems. The first n do not depend on it.
    seed: gives the order. An `id` does not depend on it, nor on `count`.
    low, high: the terms' range, both ends included; `low` at least 0.
    terms: number of terms of a sum.
    prompt: the question, in which {sum} is replaced by "47 + 38".

  Returns:
    Rows of `id`, `prompt`, `gold` and `answer`.

  Raises:
    ValueError: the split is unknown, the range impossible, the prompt without
      {sum}, or the split has fewer problems than `count`.
  """
  splits.require_split(split, "sums")
  if not 0 <= low < high or terms < 2 or (high - low + 1)**terms >= 2**31:
    raise ValueError(
        "sums needs 0 <= low < high, two terms or more and fewer than 2^31 "
        f"problems, and was given args.low={low}, args.high={high}, "
        f"args.terms={terms}.")
  if "{sum}" not in prompt:
    raise ValueError(
        f"args.prompt={prompt!r} has no {{sum}} where the sum would go.")
  base = high - low + 1
  rows: list[dict[str, Any]] = []
  for index in _indices(base**terms, random.Random(f"sums {split} {seed}")):
    if len(rows) == count:
      break
    # The digits of the index, which is the problem's id, in base `base`.
    numbers = [low + index // base**i % base for i in range(terms)]
    if splits.split_of(numbers) == split:
      rows.append(_row(index, numbers, prompt))
  if len(rows) != count or not count:
    raise ValueError(
        f"sums has {len(rows)} {split} problems of {terms} terms from {low} to "
        f"{high}, and args.count={count} asks for another number. Lower "
        "args.count or raise args.high.")
  return rows


def reward(
    prompt: str, completion: str, *, answer: str, **columns: Any,
) -> float:
  """Scores 1 if the last number of the answer is the sum, else 0."""
  del prompt, columns
  return grading.grade_number(extract(completion), answer).score


def extract(completion: str) -> str | None:
  """Finds the last number, in canonical form, or None."""
  return grading.last_number(completion)


def _indices(size: int, rng: random.Random) -> Iterator[int]:
  """Yields each of range(size) once, in a random order."""
  if size <= ENUMERABLE:
    yield from rng.sample(range(size), size)
    return
  seen: set[int] = set()
  while len(seen) < size:
    index = rng.randrange(size)
    if index not in seen:
      seen.add(index)
      yield index


def _row(index: int, numbers: list[int], prompt: str) -> dict[str, Any]:
  answer = str(sum(numbers))
  text = " + ".join(map(str, numbers))
  return dict(
      id=index, prompt=prompt.replace("{sum}", text),
      gold=f"{text} = {answer}", answer=answer)
