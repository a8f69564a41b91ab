"""Rules that stop a run which has stopped learning, and say what to change.

Each rule is a function or a small counter over numbers that the stage logs
anyway. A stop is a `HealthError`: what was seen, for how long, and which
config keys to look at.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np


class HealthError(RuntimeError):
  """The run cannot go on usefully; the message says why and what to do."""


def check_finite(
    step: int, values: Mapping[str, Any], batch: Mapping[str, np.ndarray],
    directory: pathlib.Path, *, write: bool = True,
) -> None:
  """Stops on a loss or gradient norm that is not finite.

  Args:
    step: the step just made.
    values: the step's metrics; "loss" and "grad_norm" are looked at.
    batch: what the step was given; saved beside the run for a post-mortem.
    directory: where the batch goes, as `bad_batch_step_%06d.npz`.
    write: false on all hosts but the first.

  Raises:
    HealthError: "loss" or "grad_norm" is NaN or infinite.
  """
  bad = {
      name: float(values[name]) for name in ("loss", "grad_norm")
      if name in values and not np.isfinite(values[name])}
  if not bad:
    return
  path = directory / f"bad_batch_step_{step:06d}.npz"
  if write:
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(path, **batch)  # type: ignore[arg-type]
  found = ", ".join(f"{name}={value}" for name, value in bad.items())
  raise HealthError(
      f"Step {step} is not finite: {found}. Its batch is in {path}. The last "
      "checkpoint is from before this step. Lower learning_rate, lengthen "
      "warmup_steps, lower max_grad_norm, or use compute.dtype=float32.")


@dataclasses.dataclass
class Streak:
  """For how many steps running a condition has held."""

  length: int = 0

  def update(self, holds: bool) -> int:
    self.length = self.length + 1 if holds else 0
    return self.length


class RolloutHealth:
  """Stops when rollouts have carried no signal for `patience` steps.

  Two ways to get there: every completion was cut off at its maximum (so
  that no answer was ever scored), or no group had two different rewards (so
  that every advantage is zero).
  """

  def __init__(self, patience: int):
    """
    Args:
      patience: steps; the config key `health.patience`.

    Raises:
      ValueError: patience is less than one.
    """
    if patience < 1:
      raise ValueError(
          f"health.patience is {patience}, and needs at least 1 step.")
    self._patience = patience
    self._clipped = Streak()
    self._silent = Streak()

  def update(
      self, step: int, *, clipped_ratio: float, frac_reward_zero_std: float,
  ) -> None:
    """Takes one rollout's figures.

    Args:
      step: the step just made.
      clipped_ratio: share of completions that hit their maximum length.
      frac_reward_zero_std: share of groups whose rewards are all equal.

    Raises:
      HealthError: a streak has reached `patience`.
    """
    clipped = self._clipped.update(clipped_ratio >= 1)
    silent = self._silent.update(frac_reward_zero_std >= 1)
    if clipped >= self._patience:
      raise HealthError(
          f"Step {step}: all completions were cut off at their maximum length "
          f"for {clipped} steps (health.patience={self._patience}). Raise "
          "rollout.max_tokens, or set rollout.max_thinking_tokens below it so "
          "that thinking is closed and an answer follows; check that the SFT "
          "data ends its completions.")
    if silent >= self._patience:
      raise HealthError(
          f"Step {step}: no group had two different rewards for {silent} steps "
          f"(health.patience={self._patience}), so there was nothing to learn "
          "from. Choose problems that are solved sometimes (look at `reward`: "
          "0 is too hard, 1 too easy), raise group_size or "
          "rollout.temperature, or check the reward function on a sample.")

  def get_state(self) -> dict[str, int]:
    """For the checkpoint, so that a resumed run stops at the same step."""
    return {"clipped": self._clipped.length, "silent": self._silent.length}

  def set_state(self, state: Mapping[str, int]) -> None:
    self._clipped = Streak(state["clipped"])
    self._silent = Streak(state["silent"])
