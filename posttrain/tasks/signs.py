"""Signs: put + or - between numbers, order kept, to reach a target.

  prompt      6 5 2 2 : 1 <think>
  completion  6 + 5 = 11 + 2 = 13 - 2 = 11 vs 1 NO Wait
              6 - 5 = 1 + 2 = 3 - 2 = 1 vs 1 OK </think> 6 - 5 + 2 - 2
  answer      6 - 5 + 2 - 2

Everything is words between single spaces, and a whole number (-7 too) is one
word, so that a word-level tokenizer has under a hundred tokens. An attempt
repeats its target before its verdict: a small model learns to compare two
neighbours much sooner than a value with one far back. Any signs that reach the
target are right.

The problems are all pairs of an ordered tuple of `terms` numbers from `low` to
`high` and a target that its signs can reach, each once. They are split by the
*multiset* of the numbers, through a hash: a reordering of training numbers is
never a test problem, and a multiset keeps its split when the range changes.

The demonstrations are those of an imperfect searcher (see `demonstrations`), so
that fine-tuning leaves something to improve for reinforcement learning.
"""

import functools
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from posttrain.tasks import splits

START, END, WAIT, RIGHT, WRONG = "<think>", "</think>", "Wait", "OK", "NO"
AGAINST = "vs"
EOS = "</s>"  # SentencePiece's; a decoder may leave it in the text.

LOW, HIGH, TERMS = 1, 7, 4
# P(the searcher gives up after K attempts) for K = 1, 2, ...
PATIENCE = (.1, .25, .2, .15, .1, .08, .06, .06)

EXPRESSION = re.compile(r"[0-9]+(?: [+-] [0-9]+)*")


def problems(
    split: str, *, count: int = 0, seed: int = 0, low: int = LOW,
    high: int = HIGH, terms: int = TERMS,
) -> Sequence[dict[str, Any]]:
  """Makes the distinct problems of a split, in an order given by the seed.

  Args:
    split: "train", "validation" or "test".
    count: number of problems from the start of that order; 0 for all.
    seed: gives the order. An `id` does not depend on it, nor on `count`.
    low, high: the numbers' range, both ends included; `low` at least 1.
    terms: number of numbers of a problem.

  Returns:
    Rows of `id`, `prompt`, `gold` (a right answer), `numbers`, `target` and
    `cluster`, which is equal for problems with one multiset of numbers.

  Raises:
    ValueError: the split is unknown, the range empty, or the split has fewer
      problems than `count`.
  """
  rows = _all_problems(split, low, high, terms)
  if not 0 <= count <= len(rows):
    raise ValueError(
        f"signs has {len(rows)} {split} problems of {terms} numbers from "
        f"{low} to {high}, and args.count={count} asks for another number. "
        "Lower args.count or raise args.high.")
  order = random.Random(f"signs problems {split} {seed}").sample(
      # All rows: a sample of fewer would not be a prefix of this order.
      range(len(rows)), len(rows))
  return [_row(*rows[i], low, high) for i in order[:count or None]]


MOST = 10_000_000  # The most demonstrations, which take some gigabytes.


def demonstrations(
    split: str, count: int, *, seed: int = 0, low: int = LOW,
    high: int = HIGH, terms: int = TERMS, right: float = 0.2,
    repeat: float = 0.2, recheck: float = 0.3,
    patience: Sequence[float] = PATIENCE,
) -> Sequence[dict[str, Any]]:
  """Makes thinking traces of an imperfect searcher, right half the time.

  It tries signs until they reach the target or it gives up, and then answers
  with its last attempt. Its sums and verdicts are always true.

  Args:
    split, seed, low, high, terms: as in `problems`. Problems repeat, with
      other traces, only when `count` is above the number of problems.
    count: number of demonstrations; the first n do not depend on it.
    right: P(an attempt reaches the target).
    repeat: P(a wrong attempt is one it has already made). Without these a
      model learns that every repeated attempt is right, because of `recheck`.
      A searcher that has tried all wrong signs repeats too.
    recheck: P(a success is followed by a Wait and the same attempt again).
    patience: P(it gives up after K attempts), for K = 1, 2, ...

  Returns:
    Rows of `id`, `prompt` and `completion`; the text ends at the answer.

  Raises:
    ValueError: as in `problems`, or `count` is above `MOST`.
  """
  if not 0 <= count <= MOST:
    raise ValueError(
        f"signs makes up to {MOST} demonstrations, and found args.count="
        f"{count}.")
  rows = _all_problems(split, low, high, terms)
  rng = random.Random(f"signs demonstrations {split} {seed}")
  examples: list[dict[str, Any]] = []
  while len(examples) < count:
    for i in rng.sample(range(len(rows)), len(rows)):
      if len(examples) == count:
        break
      numbers, target = rows[i]
      trace, answer = _search(
          rng, numbers, target, right, repeat, recheck, patience)
      examples.append(dict(
          id=len(examples), prompt=_prompt(numbers, target),
          completion=_completion(numbers, trace, target, answer)))
  return examples


def corpus(
    *, low: int = LOW, high: int = HIGH, terms: int = TERMS,
) -> Iterator[str]:
  """Yields texts with every word of the task, to train its tokenizer on."""
  least, most = low - (terms - 1) * high, terms * high
  for number in range(least, most + 1):
    yield (f"{number} {number} + - = : {AGAINST} {RIGHT} {WRONG} {WAIT} "
           f"{START} {END}")


def reward(
    prompt: str, completion: str, *, numbers: Sequence[int], target: int,
    **columns: Any,
) -> float:
  """Scores 1 if the answer keeps the numbers in order and reaches the target.

  Everything else, a missing answer included, scores 0.

  Args:
    completion: the text after the thinking.
    numbers, target: columns of the problem.
  """
  del prompt, columns
  answer = extract(completion)
  if answer is None:
    return 0.0
  words = answer.split()
  if words[::2] != [str(number) for number in numbers]:
    return 0.0
  signs = [1 if word == "+" else -1 for word in words[1::2]]
  return float(_value(numbers, signs) == target)


def extract(completion: str) -> str | None:
  """Extracts the expression of an answer, or None.

  None also if more text follows the expression, so that an answer that goes on
  does not pass. Two expressions with one value are two answers: a vote counts
  them apart.
  """
  answer = " ".join(completion.strip().removesuffix(EOS).split())
  return answer if EXPRESSION.fullmatch(answer) else None


def constant_baseline(
    split: str, *, count: int = 0, seed: int = 0, low: int = LOW,
    high: int = HIGH, terms: int = TERMS,
) -> dict[str, Any]:
  """Scores the answers with the same signs for all problems.

  The signs are those that are right most often on the training split.

  Args:
    split, count, seed, low, high, terms: the problems to score, as in
      `problems`.

  Returns:
    `answer` (signs, such as "+ - +") and `correct`, [Q] bool.
  """
  signs = _best_constant(low, high, terms)
  rows = problems(
      split, count=count, seed=seed, low=low, high=high, terms=terms)
  return dict(
      answer=" ".join("+" if sign > 0 else "-" for sign in signs),
      correct=[_value(row["numbers"], signs) == row["target"]
               for row in rows])


# Numbers are tuples of ints; signs are tuples of +1 and -1, one fewer.


def _patterns(terms: int) -> list[tuple[int, ...]]:
  return list(itertools.product((1, -1), repeat=terms - 1))


def _value(numbers: Sequence[int], signs: Sequence[int]) -> int:
  return numbers[0] + sum(s * n for s, n in zip(signs, numbers[1:],
                                                strict=True))


@functools.lru_cache(maxsize=16)
def _all_problems(
    split: str, low: int, high: int, terms: int,
) -> tuple[tuple[tuple[int, ...], int], ...]:
  """Lists all (numbers, target) of a split, in lexicographic order."""
  splits.require_split(split, "signs")
  if not 1 <= low < high or terms < 2:
    raise ValueError(
        f"signs needs 1 <= low < high and two terms or more, and was given "
        f"args.low={low}, args.high={high}, args.terms={terms}.")
  return tuple(
      (numbers, target)
      for numbers in itertools.product(range(low, high + 1), repeat=terms)
      if splits.split_of(numbers) == split
      for target in sorted({_value(numbers, s) for s in _patterns(terms)}))


@functools.lru_cache(maxsize=16)
def _best_constant(low: int, high: int, terms: int) -> tuple[int, ...]:
  train = _all_problems("train", low, high, terms)
  return max(_patterns(terms), key=lambda signs: sum(
      _value(numbers, signs) == target for numbers, target in train))


def _row(
    numbers: tuple[int, ...], target: int, low: int, high: int,
) -> dict[str, Any]:
  signs = next(s for s in _patterns(len(numbers))
               if _value(numbers, s) == target)
  # The id in mixed radix: each of the numbers, then the sum of the subtracted
  # ones, which determines the target. So it depends on nothing but the problem.
  subtracted = (sum(numbers) - target) // 2
  index = functools.reduce(
      lambda index, n: index * (high - low + 1) + n - low, numbers, 0)
  index = index * ((len(numbers) - 1) * high + 1) + subtracted
  return dict(
      id=index, prompt=_prompt(numbers, target),
      gold=_expression(numbers, signs), numbers=list(numbers), target=target,
      cluster=" ".join(map(str, sorted(numbers))))


def _prompt(numbers: Sequence[int], target: int) -> str:
  return f"{' '.join(map(str, numbers))} : {target} {START}"


def _completion(
    numbers: Sequence[int], trace: Sequence[Sequence[int]], target: int,
    answer: Sequence[int],
) -> str:
  attempts = f" {WAIT} ".join(_attempt(numbers, s, target) for s in trace)
  return f"{attempts} {END} {_expression(numbers, answer)}"


def _attempt(
    numbers: Sequence[int], signs: Sequence[int], target: int,
) -> str:
  """Writes `6 - 5 = 1 + 2 = 3 - 2 = 1 vs 1 OK`, with every running value."""
  words, value = [str(numbers[0])], numbers[0]
  for sign, number in zip(signs, numbers[1:], strict=True):
    value += sign * number
    words += ["+" if sign > 0 else "-", str(number), "=", str(value)]
  verdict = RIGHT if value == target else WRONG
  return " ".join([*words, AGAINST, str(target), verdict])


def _expression(numbers: Sequence[int], signs: Sequence[int]) -> str:
  words = [str(numbers[0])]
  for sign, number in zip(signs, numbers[1:], strict=True):
    words += ["+" if sign > 0 else "-", str(number)]
  return " ".join(words)


def _search(
    rng: random.Random, numbers: Sequence[int], target: int, right: float,
    repeat: float, recheck: float, patience: Sequence[float],
) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
  """Draws the attempts, in order, and the answer."""
  # All sign patterns are tried: with four terms there are eight.
  hits: list[tuple[int, ...]] = []
  misses: list[tuple[int, ...]] = []
  for signs in _patterns(len(numbers)):
    (hits if _value(numbers, signs) == target else misses).append(signs)
  rng.shuffle(misses)
  trace: list[tuple[int, ...]] = []
  attempts = rng.choices(range(1, len(patience) + 1), patience)[0]
  while len(trace) < attempts:
    if rng.random() < right:
      trace.append(rng.choice(hits))
      if rng.random() < recheck:
        trace.append(trace[-1])
      break
    if trace and (not misses or rng.random() < repeat):
      trace.append(rng.choice(trace))
    else:
      trace.append(misses.pop())
  return trace, trace[-1]
