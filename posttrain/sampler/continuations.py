"""Continuations and forks: requests that go on from one that has ended.

A continuation is the same row of draws: it has its parent's ids and counts the
draws on. A fork has a sample id of its own, so that branches of one parent
differ. The tokens of a parent are remembered here, on the host. Their keys and
values are in the prefix cache, or are computed again: no result depends on it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from posttrain.sampler import token_sampling
from posttrain.sampler.requests import Completion, Request

STALE = ("The request that it goes on from ran under other weights, so that "
         "what was kept is stale. Send its tokens as a prompt.")


def continuation(
    done: Completion, tokens: Sequence[int] = (), **changes: Any,
) -> Request:
  """Makes the request that goes on from a completion which was kept.

  Args:
    done: the parent's.
    tokens: new ones behind the parent's, such as the next turn of a user.
    changes: other fields of the request, which else are the parent's.
  """
  fields: dict[str, Any] = {
      "prompt": tuple(tokens), "parent": done.id, "first_draw": done.draws,
      "in_thinking": None, "script": None}
  return dataclasses.replace(done.request, **(fields | changes))


def fork(
    done: Completion, branch: int, tokens: Sequence[int] = (), **changes: Any,
) -> Request:
  """Makes a continuation with draws of its own, one of several branches.

  `branch` is a number of 32 bits, see `token_sampling.fork_id`. The other
  arguments are those of `continuation`.
  """
  sample_id = token_sampling.fork_id(
      done.request.sample_id, done.draws, branch)
  return continuation(done, tokens, **({"sample_id": sample_id} | changes))


class Kept:
  """Sequences that requests may go on from, by the number of their request."""

  def __init__(self):
    self._sequences: dict[int, tuple[tuple[int, ...], bool]] = {}
    self._first = 0  # The first request under the present weights.

  def add(
      self, number: int, tokens: tuple[int, ...], in_thinking: bool,
  ) -> None:
    """Remembers the tokens of a request that has ended.

    Args:
      number: its own.
      tokens: with its prompt, and without a stop string that ended it.
      in_thinking: they end within a thinking section.
    """
    self._sequences[number] = tokens, in_thinking

  def release(self, number: int) -> None:
    """Forgets a request; one that is unknown stays so."""
    self._sequences.pop(number, None)

  def clear(self, first: int) -> None:
    """Forgets all requests before `first`: the weights have changed."""
    self._sequences.clear()
    self._first = first

  def resolve(
      self, request: Request, number: int, runs: Callable[[int], bool],
  ) -> tuple[Request, str]:
    """Puts the tokens of a continuation's parent before its own.

    Args:
      request: any.
      number: its own; those below it were given to other requests.
      runs: tells of another request's number that it has not ended.

    Returns:
      The request, and why it cannot run, or "".
    """
    parent = request.parent
    if parent is None:
      return request, ""
    if parent in self._sequences:
      tokens, in_thinking = self._sequences[parent]
      inherits = request.in_thinking is None and not request.prompt
      return dataclasses.replace(
          request, prompt=(*tokens, *request.prompt),
          in_thinking=in_thinking if inherits else request.in_thinking), ""
    if not 0 <= parent < number:
      return request, f"parent is {parent}, and there is no such request."
    if runs(parent):
      return request, (f"parent is {parent}, which has not ended. Take its "
                       "completion first.")
    if parent < self._first:
      return request, f"parent is {parent}. {STALE}"
    return request, (f"parent is {parent}, which was not kept or was released. "
                     "Set its keep, and release it last.")
