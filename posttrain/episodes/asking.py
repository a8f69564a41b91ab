"""Requests of an episode's turns: what the engine is asked for.

A turn with a parent is asked for as a whole prompt: the sequence that the
parent left, and the observation behind it. The engine finds what it has of it
in its prefix cache; no result depends on that.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from posttrain.episodes.protocol import Generate, Task
from posttrain.episodes.running import Running
from posttrain.sampler import requests
from posttrain.sampler.budget_tables import BudgetTables
from posttrain.sampler.requests import Request, Settings

# Makes the stage's request of a task for a sample id.
MakeRequest = Callable[[Task, int], Request]

PLAIN = Request(prompt=(), max_tokens=1)  # Has the types of the fields.
# Fields that an episode does not choose: ids and draws are its own by rule.
FIXED = frozenset([
    "prompt", "parent", "first_draw", "keep", "seed", "stage", "step",
    "prompt_id", "sample_id"])


class NoRoom(Exception):
  """A turn does not fit.

  Attributes:
    reason: "max_tokens" or "context_overflow".
  """

  def __init__(self, reason: str, text: str):
    super().__init__(text)
    self.reason = reason


def make_requests(
    running: Running, generate: Generate, make_request: MakeRequest,
    settings: Settings, tables: BudgetTables,
) -> list[Request]:
  """Makes the engine's requests of a turn, one for each sample.

  Args:
    running: the episode that asks.
    generate: what it asks for.
    make_request: the stage's request for a task and a sample id.
    settings, tables: of the engine.

  Raises:
    NoRoom: no token fits behind the prompt.
    ValueError, TypeError: the episode asks for what there is not.
  """
  fixed = FIXED & generate.changes.keys()
  if fixed:
    raise ValueError(
        f"changes has {', '.join(sorted(fixed))}, which an episode cannot "
        "choose.")
  for name, value in generate.changes.items():
    _check_change(name, value)
  prompt, in_thinking = _prompt(running, generate)
  used = len(prompt) - _beginning(running, generate, len(prompt))
  made = []
  for sample_id, first_draw in running.ids(generate):
    request = dataclasses.replace(
        make_request(running.task, sample_id),
        **({"in_thinking": in_thinking} | dict(generate.changes)),
        prompt=prompt, first_draw=first_draw, sample_id=sample_id,
        prompt_id=running.task.prompt_id,
        keep=settings.prefix_cache_tokens > 0)
    made.append(_fitted(
        request, running.task.max_tokens - used, settings, tables))
  return made


def _check_change(name: str, value: Any) -> None:
  """Raises TypeError for a field that a request has not, or of another type.
  """
  if name not in vars(PLAIN):
    raise TypeError(
        f"changes has {name}, and a Request has {', '.join(vars(PLAIN))}.")
  plain = getattr(PLAIN, name)
  whole = type(plain) is int and isinstance(value, np.integer)
  if name == "in_thinking" and not isinstance(value, bool | None):
    raise TypeError(
        f"changes has in_thinking={value!r:.80}, and it must be a bool or "
        "None.")
  if plain is not None and type(value) is not type(plain) and not whole:
    raise TypeError(
        f"changes has {name}={value!r:.80}, a {type(value).__name__}, and it "
        f"must be a {type(plain).__name__}.")


def _prompt(
    running: Running, generate: Generate,
) -> tuple[tuple[int, ...], bool | None]:
  """Returns the whole prompt, and whether it continues a thinking section."""
  parent = generate.parent
  tokens = tuple(generate.tokens)
  if parent is None:
    return tokens, None
  if not any(parent is turn for turn in running.turns):
    raise ValueError("The parent is no turn of this episode.")
  done = parent.completion
  if done.kept is None:
    raise ValueError(
        "Nothing can go on from the parent: this vocabulary cannot spell the "
        "text before its stop string. Set include_stop, or use another string.")
  return (*done.kept, *tokens), None if tokens else done.kept_in_thinking


def _beginning(running: Running, generate: Generate, length: int) -> int:
  """Returns the length of the prompt with which the sequence began."""
  turn = generate.parent
  while turn is not None:
    length = len(turn.completion.request.prompt)
    turn = None if turn.parent is None else running.turns[turn.parent]
  return length


def _fitted(
    request: Request, left: int, settings: Settings, tables: BudgetTables,
) -> Request:
  """Lowers `max_tokens` to what fits.

  Args:
    request: the request.
    left: tokens that the episode may still have in this sequence.
    settings, tables: of the engine.
  """
  if request.max_tokens < 1:  # The engine says what is wrong with it.
    return request
  room = settings.max_seq_len - (
      requests.most_slots(request, tables) - request.max_tokens)
  fitted = dataclasses.replace(
      request, max_tokens=min(request.max_tokens, left, room))
  # A budget that needs more is no mistake if the turn is to be shorter.
  short = fitted.max_tokens < 1 or (
      fitted.max_tokens < request.max_tokens
      and requests.budget_problem(fitted, tables)
      and not requests.budget_problem(request, tables))
  if not short:
    return fitted
  if left <= room:
    raise NoRoom("max_tokens", (
        f"The sequence may have {left} more tokens, too few for another turn."))
  raise NoRoom("context_overflow", (
      f"A prompt of {len(request.prompt)} tokens leaves {max(room, 0)} of "
      f"{settings.max_seq_len}, too few for another turn."))
