"""Rewards -> advantages, on the host in NumPy.

Row `i` belongs to the group `prompt_id[i]`. Rows of a group need not be
neighbours, and groups need not be of one size.

  B: completions    K: reward functions

References: DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1 (std
"population"); Dr. GRPO, https://arxiv.org/abs/2503.20783 (std "none").
"""

import numpy as np

STANDARD_DEVIATIONS = ("population", "sample", "none")


def combine_rewards(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Weighted sum over the reward functions that apply to a row.

  Args:
    rewards: [B, K] float, NaN where a function does not apply.
    weights: [K] float.

  Returns:
    [B] float64.

  Raises:
    ValueError: no function applies to some row, or one gave an infinity.
  """
  missing = np.isnan(rewards)
  if missing.all(axis=1).any():
    raise ValueError(
        f"No reward function applies to {missing.all(axis=1).sum()} of "
        f"{len(rewards)} completions (the first is row "
        f"{missing.all(axis=1).argmax()}): each of them returned None. Add one "
        "that applies to rewards.")
  if np.isinf(rewards).any():
    row, column = np.argwhere(np.isinf(rewards))[0]
    raise ValueError(
        f"Reward function {column} of rewards returned {rewards[row, column]} "
        f"for row {row}, and a reward must be finite or None.")
  return np.where(missing, 0, rewards).astype(np.float64) @ np.asarray(
      weights, np.float64)


def informative(rewards: np.ndarray, prompt_id: np.ndarray) -> np.ndarray:
  """[B] bool, the row's group has more than one reward: it teaches."""
  _, group = np.unique(prompt_id, return_inverse=True)
  least = np.full(group.max(initial=-1) + 1, np.inf)
  most = -least
  np.minimum.at(least, group, rewards)
  np.maximum.at(most, group, rewards)
  return (most > least)[group]


def group_advantages(
    rewards: np.ndarray, prompt_id: np.ndarray, *, std: str = "population",
    eps: float = 1e-6,
) -> np.ndarray:
  """Centres, and scales, rewards within each group.

  A group whose rewards are all equal teaches nothing: its advantages are
  exactly zero.

  Args:
    rewards: [B] float.
    prompt_id: [B] int, equal for the completions of one prompt.
    std: divide by the "population" (ddof 0) or "sample" (ddof 1) standard
      deviation of the group, or by nothing ("none").
    eps: added to the standard deviation.

  Returns:
    [B] float32.

  Raises:
    ValueError: a group has one member only, or `std` is another word.
  """
  if std not in STANDARD_DEVIATIONS:
    raise ValueError(
        f"loss.advantage_std is {std!r} and must be one of "
        f"{', '.join(STANDARD_DEVIATIONS)}.")
  _, group, size = np.unique(
      prompt_id, return_inverse=True, return_counts=True)
  if (size < 2).any():
    raise ValueError(
        f"{(size < 2).sum()} of {size.size} prompts have a single completion, "
        "and an advantage needs two or more. Raise group_size.")
  rewards = np.asarray(rewards, np.float64)
  centred = rewards - (np.bincount(group, rewards) / size)[group]
  # Rounding leaves a remainder where rewards agree; eps would not hide it.
  centred = np.where(informative(rewards, prompt_id), centred, 0)
  if std != "none":
    members = size - 1 if std == "sample" else size
    deviation = np.sqrt(np.bincount(group, centred**2) / members)
    # Where the deviation is zero so is the numerator, whatever eps is.
    scale = np.where(deviation > 0, deviation + eps, 1)
    centred = centred / scale[group]
  return centred.astype(np.float32)
