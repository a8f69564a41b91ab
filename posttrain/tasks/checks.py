"""Checks of all problems before the first step; no task code is called."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.tasks import scoring


def check_ids(problems: Sequence[Mapping[str, Any]]) -> None:
  """Raises ValueError if two problems have the same `id`, or one has none.

  Groups and random bits go by it: two problems with one id would be one group.
  """
  seen = set()
  for number, problem in enumerate(problems):
    value = problem.get("id")
    if isinstance(value, bool) or not (
        isinstance(value, (int, np.integer)) and -2**31 <= value < 2**31):
      raise ValueError(
          f"Problem {number} of the task has id={scoring.shown(value)}, and a "
          "whole number of at most 31 bits is needed.")
    if value in seen:
      raise ValueError(
          f"Two problems of the task have id={value}. Give each its own.")
    seen.add(value)


def check_arguments(
    name: str, reward: scoring.Reward, problems: Sequence[Mapping[str, Any]],
) -> None:
  """Raises ValueError if a reward does not take a problem's columns.

  It is not called.
  """
  try:
    signature = inspect.signature(reward)
  except (TypeError, ValueError):  # A function in C has no signature.
    return
  # Once per set of columns: a task of a million problems has very few.
  fine = set()
  for problem in problems:
    columns = frozenset(problem)
    if columns in fine:
      continue
    # The problem's messages are the beginning of the conversation.
    twice = columns.intersection(scoring.named(reward)) - {"messages"}
    if twice:
      raise ValueError(
          f"The reward {name} asks for {', '.join(sorted(twice))} of the "
          f"completion, and problem {problem.get('id')} has a column of that "
          "name. Rename the column.")
    try:
      signature.bind(**_arguments(reward, problem))
    except TypeError as error:
      raise ValueError(
          f"The reward {name} does not take the columns of problem "
          f"{problem.get('id')} ({', '.join(sorted(columns))}): {error}. Give "
          "the problem what is missing, or let the reward take **columns."
      ) from error
    fine.add(columns)


def _arguments(
    reward: scoring.Reward, problem: Mapping[str, Any]) -> dict[str, Any]:
  empty = scoring.Completion("")
  if scoring.scope_of(reward) == "sample":
    return scoring.arguments(reward, problem, empty)
  return scoring.joined_arguments(reward, [problem], [empty])
