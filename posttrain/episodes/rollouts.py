"""Trajectories -> `Rollouts`: one row for each episode, its turns in it.

A row holds all that is behind the episode's first prompt: the tokens of each
turn, and between two turns the observation that the second one begins with.
What a turn goes on from is the engine's own record (the prompt of its request),
so a row is the sequence that its tokens were drawn behind, token by token.

Where a stop string was cut off, a turn goes on from less than was sampled. The
tokens from there on are no part of the row; those that spell the rest of a
token anew count as observation, as nobody sampled them.

  n: tokens of a turn    L: layers    k: experts per token
"""

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.episodes.protocol import STOP_REASONS, Turn
from posttrain.episodes.trajectory import Trajectory
from posttrain.sampler import budget_state, rollouts
from posttrain.sampler.requests import Completion, Request
from posttrain.sampler.rollouts import Rollouts

# Columns of a completion, an entry per token, that a row keeps; 0 of an
# observation.
OPTIONAL = ("experts", "entropy", "confidence")
COUNTS = ("think_length", "think_steps", "answer_length", "wait_count")


def of_trajectories(
    trajectories: Sequence[Trajectory], *, branched: bool = False) -> Rollouts:
  """Collects episodes as rows, in the order given.

  A row of one turn is that of `rollouts.of_completions`. An episode that ended
  before its first turn has no tokens.

  Args:
    branched: of an episode with branches take the turns that led to the last.

  Raises:
    ValueError: an episode has branched, and is not one sequence.
  """
  found = rollouts.of_completions([
      joined(each.path() if branched else each.chain()) if each.turns
      else _nothing(each) for each in trajectories])
  ids = lambda name: np.array(
      [getattr(each, name) for each in trajectories], np.int32)
  return dataclasses.replace(
      found,
      # Those of the episode: a branch has a sample id of its own.
      prompt_id=ids("prompt_id"), sample_id=ids("sample_id"),
      num_turns=np.array([len(each.turns) for each in trajectories], np.int32),
      stop_reason=np.array(
          [STOP_REASONS.index(each.outcome.reason) for each in trajectories],
          np.int8))


def _nothing(trajectory: Trajectory) -> Completion:
  """Makes the completion of an episode without a turn."""
  outcome = trajectory.outcome
  return Completion.nothing(
      0, Request(trajectory.prompt, 1, in_thinking=False,
                 prompt_id=trajectory.prompt_id,
                 sample_id=trajectory.sample_id),
      "error" if outcome.reason == "error" else "abort", outcome.reason_text)


def joined(turns: Sequence[Turn]) -> Completion:
  """Joins turns, each of which goes on from the one before, to one completion.
  """
  if len(turns) == 1:
    return turns[0].completion
  parts = [*map(_part, turns[:-1], turns[1:]), turns[-1].completion]
  done = [turn.completion for turn in turns]
  fields: dict[str, Any] = {
      name: sum(getattr(each, name) for each in done) for name in COUNTS
  } | {name: _optional(name, parts) for name in OPTIONAL}
  column = lambda name: np.concatenate([getattr(part, name) for part in parts])
  return dataclasses.replace(
      done[-1], request=done[0].request,
      tokens=[token for part in parts for token in part.tokens],
      logprobs=column("logprobs"), provenance=column("provenance"),
      raw=np.concatenate([each.raw for each in done]),
      surplus=sum(each.surplus for each in done),
      model_logprobs=None, top_tokens=None, top_logprobs=None, **fields)


def _optional(name: str, parts: Sequence[Completion]) -> np.ndarray | None:
  """Joins a column that a completion may lack, as one that never ran."""
  like = next((x for x in (getattr(part, name) for part in parts)
               if x is not None), None)
  if like is None:
    return None
  none = lambda part: np.zeros((len(part.tokens), *like.shape[1:]), like.dtype)
  return np.concatenate([
      none(part) if getattr(part, name) is None else getattr(part, name)
      for part in parts])


def _part(turn: Turn, then: Turn) -> Completion:
  """Returns what a row has of a turn, and of the observation behind it."""
  done = turn.completion
  begin = len(done.request.prompt)
  behind = list(then.completion.request.prompt[begin:])
  # What the next turn goes on from is a beginning of what was sampled, and
  # maybe the rest of a token that a stop string has cut.
  kept = behind[:len(behind) - len(then.observation)]
  same = itertools.takewhile(bool, map(operator.eq, kept, done.tokens))
  size = sum(same)
  more = len(behind) - size
  padded = lambda values: np.concatenate(
      [values[:size], np.zeros((more, *values.shape[1:]), values.dtype)])
  fields: dict[str, Any] = {
      name: padded(getattr(done, name)) for name in OPTIONAL
      if getattr(done, name) is not None}
  return dataclasses.replace(
      done, tokens=behind, logprobs=padded(done.logprobs),
      provenance=np.concatenate([
          done.provenance[:size],
          np.full(more, budget_state.OBSERVATION, np.int8)]), **fields)
