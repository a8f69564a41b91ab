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

  def chain(self) -> list[Turn]:
    """Lists the turns from the first to the last, each the next one's parent.

    Raises:
      ValueError: a turn is not on the way to the last: the episode has
        branched, and is not one sequence.
    """
    chain: list[Any] = []
    at = len(self.turns) - 1 if self.turns else None
    while at is not None:
      chain.append(self.turns[at])
      at = self.turns[at].parent
    if len(chain) < len(self.turns):
      raise ValueError(
          f"The episode has {len(self.turns)} turns, and {len(chain)} of them "
          "lead to the last. It is not one sequence, and cannot be trained on.")
    return chain[::-1]
