"""Objectives over named columns: what a loss is given, and what it returns.

An objective is a function `(columns, **args) -> (terms, sums)`. Columns are
arrays `[R, T]` by name: rows of several packed sequences, where only positions
in `loss_mask` count. A row is whole along its length on every device, so that
a function may sum along it; rows may be spread over devices.

The loss is the sum over terms of coefficient * numerator / denominator. Each
numerator and each denominator is a sum over the whole batch: the trainer adds
them over microbatches and devices before any division.

  R: rows    T: length
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

# Every objective has those of them that its batch has.
GIVEN = ("tokens", "positions", "segment_ids", "loss_mask", "completion_ids",
         "group_ids", "logprobs")
# The others, which an objective declares: docs/changing.md tells of each.
DECLARED = (
    "entropy", "advantages", "sampler_logprobs", "old_logprobs",
    "ref_logprobs", "importance_weights", "token_weights",
    "denominator_shares")

# Metrics of every update: no sum of an objective has their names.
TAKEN = ("loss", "grad_norm", "learning_rate", "spike")

Sums = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("numerator", "denominator"), meta_fields=("coefficient",))
@dataclasses.dataclass(frozen=True)
class Term:
  """One term of a loss.

  Attributes:
    numerator, denominator: scalars, sums over the tokens of the columns. The
      denominator has no gradient.
    coefficient: weight of the term, a Python float.
  """

  numerator: jax.Array
  denominator: jax.Array
  coefficient: float = 1.0


Terms = dict[str, Term]
Objective = Callable[..., tuple[Terms, Sums]]


class Columns(dict[str, jax.Array]):
  """Arrays [R, T] by name; those that were not declared are not there."""

  def __missing__(self, name: str) -> jax.Array:
    raise ValueError(
        f"The objective reads the column {name!r}, and has {', '.join(self)}. "
        f"Others are computed where they are declared, as in @needs({name!r}): "
        f"{', '.join(DECLARED)}.")


def needs(*names: str) -> Callable[[Objective], Objective]:
  """Declares the columns of an objective; the others are not computed.

  Raises:
    ValueError: there is no such column.
  """
  unknown = [name for name in names if name not in DECLARED]
  if unknown:
    raise ValueError(
        f"needs names {', '.join(unknown)}; the columns to declare are "
        f"{', '.join(DECLARED)}.")

  def declare(function: Objective) -> Objective:
    function.needs = names  # type: ignore[attr-defined]
    return function

  return declare


def needed(function: Objective) -> tuple[str, ...]:
  """Returns the columns that an objective declares, also one with arguments.
  """
  while isinstance(function, functools.partial):
    function = function.func
  return getattr(function, "needs", ())


def call(
    function: Objective, columns: Mapping[str, jax.Array],
    args: Mapping[str, Any],
) -> tuple[Terms, Sums]:
  """Calls an objective with the columns that it declares.

  Raises:
    ValueError: it reads another column, or returns something else than terms
      and sums, or a sum with the name of another metric.
  """
  names = (*GIVEN, *needed(function))
  found = function(Columns({
      name: columns[name] for name in names if name in columns}), **args)
  right = isinstance(found, tuple) and len(found) == 2 and all(
      isinstance(part, dict) for part in found) and found[0] and all(
          isinstance(term, Term) and isinstance(term.coefficient, int | float)
          for term in found[0].values()) and all(
              np.ndim(x) == 0 for x in jax.tree.leaves(found))
  if not right:
    raise ValueError(
        f"{getattr(function, '__name__', function)} returned {found!r}, and an "
        "objective returns two dicts, (terms, sums): each term is a "
        "Term(numerator, denominator) of two scalars, and a number as its "
        "coefficient; each sum is a scalar. See docs/changing.md.")
  taken = [name for name in found[1] if name in TAKEN or name.startswith(
      ("loss/", "denominator/"))]
  if taken:
    raise ValueError(
        f"{getattr(function, '__name__', function)} returns a sum "
        f"{taken[0]!r}, the name of a metric of every update. Rename it.")
  return found
