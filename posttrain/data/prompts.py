"""Selects the problems of a batch of rollouts by its number."""

import numpy as np

from posttrain.data import random_streams


def problems_of_batch(
    num_problems: int, num_groups: int, *, batch: int, seed: int, stage: str,
) -> np.ndarray:
  """Indices [num_groups] of distinct problems.

  Each epoch has an order of its own and is cut into whole batches; what is
  left over of one epoch (fewer than `num_groups`) comes up in another.

  Args:
    batch: 0, 1, ...: nothing else has to be remembered for a resume.
    stage: two stages on one task ask in different orders.

  Raises:
    ValueError: there are fewer problems than a batch needs.
  """
  per_epoch = num_problems // num_groups
  if per_epoch == 0:
    raise ValueError(
        f"The task has {num_problems} problems, and a batch needs "
        f"{num_groups} different ones. Lower num_groups.")
  epoch, index = divmod(batch, per_epoch)
  order = random_streams.stream(
      seed, stage, "problems", epoch).permutation(num_problems)
  return order[index * num_groups:(index + 1) * num_groups]
