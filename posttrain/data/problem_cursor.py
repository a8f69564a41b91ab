"""Problem cursor: which problems the next batch of rollouts asks.

Each epoch has an order of its own. A batch is the next part of that order; one
for which too few problems are left begins the next epoch, and what is left over
comes up in another. The cursor is a value: a batch that was never finished has
not moved it, and a checkpoint holds three numbers.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from posttrain.data import random_streams


@dataclasses.dataclass(frozen=True)
class ProblemCursor:
  """Place in the order in which a stage asks its problems.

  Attributes:
    num_problems: of the task.
    seed: of the run.
    stage: its name; two stages on one task ask in different orders.
    epoch, position: the place: the next problem of the epoch's order.
  """

  num_problems: int
  seed: int
  stage: str
  epoch: int = 0
  position: int = 0

  def take(self, count: int) -> tuple[np.ndarray, "ProblemCursor"]:
    """Takes the indices [count] of distinct problems.

    Returns:
      The indices, and the cursor after them.

    Raises:
      ValueError: the task has fewer problems.
    """
    if count > self.num_problems:
      raise ValueError(
          f"The task has {self.num_problems} problems, and a batch needs "
          f"{count} different ones. Lower num_groups.")
    epoch, start = self.epoch, self.position
    if start + count > self.num_problems:
      epoch, start = epoch + 1, 0
    order = random_streams.stream(
        self.seed, self.stage, "problems", epoch).permutation(
            self.num_problems)
    return order[start:start + count], dataclasses.replace(
        self, epoch=epoch, position=start + count)

  def get_state(self) -> dict[str, int]:
    """Returns what a checkpoint keeps."""
    return {name: getattr(self, name)
            for name in ("num_problems", "epoch", "position")}

  def at(self, state: Mapping[str, int]) -> "ProblemCursor":
    """Moves to the place that `get_state` gave.

    Raises:
      ValueError: the task had another number of problems then.
    """
    if state["num_problems"] != self.num_problems:
      raise ValueError(
          f"{self.stage}.problems: the checkpoint was made when the task had "
          f"{state['num_problems']} problems, and it has {self.num_problems} "
          "now. Use the task's files that it was made with, or a new workdir.")
    return dataclasses.replace(
        self, epoch=state["epoch"], position=state["position"])


def earlier_asks(indices: np.ndarray) -> np.ndarray:
  """Counts for each entry how often its problem stands before it, [P]."""
  return np.array([
      np.count_nonzero(indices[:place] == index)
      for place, index in enumerate(indices)], int)
