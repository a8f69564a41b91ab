"""Trajectory: what one episode did, token by token."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.episodes.protocol import Outcome, Result, Turn


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """Record of an episode that has ended.

  Attributes:
    row: the problem's columns.
    prompt: of its task.
    prompt_id, sample_id: ids of the episode.
    turns: in the order in which they were asked for.
    calls: results of the episode's calls, in their order.
    outcome: how it ended. An episode that raised has the reason "error".
    scores: results of the rewards, by name; empty where none were asked.
  """

  row: Mapping[str, Any]
  prompt: tuple[int, ...]
  prompt_id: int
  sample_id: int
  turns: Sequence[Turn]
  calls: Sequence[Result]
  outcome: Outcome
  scores: Mapping[str, Result] = dataclasses.field(default_factory=dict)

  @property
  def answer(self) -> str:
    """Text that rewards judge."""
    if self.outcome.answer is not None:
      return self.outcome.answer
    return self.turns[-1].answer if self.turns else ""

  @property
  def num_tokens(self) -> int:
    """Tokens of all turns, those of observations left out."""
    return sum(len(turn.completion.tokens) for turn in self.turns)

  def path(self) -> list[Turn]:
    """Lists the turns that lead to the last one, each the next one's parent."""
    found: list[Turn] = []
    at = len(self.turns) - 1 if self.turns else None
    while at is not None:
      found.append(self.turns[at])
      at = self.turns[at].parent
    return found[::-1]

  def chain(self) -> list[Turn]:
    """Lists the turns if each goes on from the one before.

    Raises:
      ValueError: a turn is not on the way to the last: the episode has
        branched, and is not one sequence.
    """
    found = self.path()
    if len(found) < len(self.turns):
      raise ValueError(
          f"The episode has {len(self.turns)} turns, and {len(found)} of them "
          "lead to the last. It is not one sequence, and cannot be trained on.")
    return found
