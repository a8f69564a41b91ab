"""Rewards -> advantages, on the host in NumPy.

Row `i` belongs to the group `prompt_id[i]`. Rows of a group need not be
neighbours, and groups need not be of one size. A reward of NaN is that of a
completion which could not be scored: it leaves its group, counts in no mean,
and has an advantage of zero.

  B: completions    K: reward functions

References: DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1 (std
"population"); Dr. GRPO, https://arxiv.org/abs/2503.20783 (std "none").
"""

import numpy as np

STANDARD_DEVIATIONS = ("population", "sample", "none")


def combine_rewards(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Sums the rewards that apply to a row, by weight.

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
  """Marks rows [B] with a reward whose group has more than one value."""
  _, group = np.unique(prompt_id, return_inverse=True)
  least = np.full(group.max(initial=-1) + 1, np.inf)
  most = -least
  np.fmin.at(least, group, rewards)
  np.fmax.at(most, group, rewards)
  return (most > least)[group] & ~np.isnan(rewards)


def centred(values: np.ndarray, prompt_id: np.ndarray) -> np.ndarray:
  """Subtracts each group's mean from [B] values; NaN becomes 0."""
  _, group = np.unique(prompt_id, return_inverse=True)
  known = ~np.isnan(values)
  sums = np.bincount(group[known], values[known], minlength=group.max() + 1)
  sizes = np.bincount(group[known], minlength=len(sums))
  mean = sums / np.maximum(sizes, 1)
  return np.where(known, values - mean[group], 0)


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
  # Rounding leaves a remainder where rewards agree; eps would not hide it.
  result = np.where(
      informative(rewards, prompt_id), centred(rewards, prompt_id), 0)
  if std != "none":
    members = np.bincount(group, ~np.isnan(rewards)) - (std == "sample")
    deviation = np.sqrt(
        np.bincount(group, result**2) / np.maximum(members, 1))
    # Where the deviation is zero so is the numerator, whatever eps is.
    scale = np.where(deviation > 0, deviation + eps, 1)
    result = result / scale[group]
  return result.astype(np.float32)
