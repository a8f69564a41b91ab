"""Health rules: stop a run that has stopped learning, and say what to change.

Each rule is a function or a small counter over numbers that the stage logs
anyway. A stop is a `HealthError`, which says what was seen, for how long, and
which config keys to change.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np


class HealthError(RuntimeError):
  """The run cannot go on usefully; the message says why and what to do."""


class Streaks:
  """Counts for how many steps in a row each of some conditions has held."""

  def __init__(self, *names: str):
    self._lengths = dict.fromkeys(names, 0)

  def count(self, name: str, holds: bool) -> int:
    """Returns the length of the condition's streak, this step included."""
    self._lengths[name] = self._lengths[name] + 1 if holds else 0
    return self._lengths[name]

  def get_state(self) -> dict[str, int]:
    """Returns the counts for the checkpoint: a resumed run stops at the same
    step.
    """
    return dict(self._lengths)

  def set_state(self, state: Mapping[str, int]) -> None:
    """Restores these counts; `state` may have others too."""
    self._lengths = {name: state[name] for name in self._lengths}


class StepHealth(Streaks):
  """Stops at an update that was not made, or after several of them in a row.

  The compiled update itself decides (`step.update`): if the loss or the
  gradient norm is not finite, or the loss is a spike, the weights stay what
  they were.
  """

  def __init__(
      self, directory: pathlib.Path, *, max_skips: int = 0, write: bool = True):
    """Takes the limits.

    Args:
      directory: the batch that stops the run is written there, as
        `bad_batch_step_%06d.npz`.
      max_skips: number of skipped updates in a row that are tolerated.
      write: false on all hosts but the first.
    """
    super().__init__("skipped")
    self._directory, self._write = directory, write
    self._max_skips = max_skips

  def update(
      self, step: int, values: Mapping[str, Any],
      batch: Mapping[str, np.ndarray],
  ) -> str:
    """Checks one step.

    Args:
      step: the step just made.
      values: the step's metrics; "loss", "grad_norm", "denominator" and, with
        a rule for spikes, "spike" are read.
      batch: the step's batch, [..] arrays; saved if the run stops.

    Returns:
      The reason why the update was skipped, if the run goes on; "" if the
      update was made.

    Raises:
      HealthError: the update was not made, and `max_skips` updates before it
        were not made either.
    """
    found = _what_is_wrong(values)
    skipped = self.count("skipped", bool(found))
    # 0 <= max_skips always holds for an update that was made.
    if skipped <= self._max_skips:
      return found
    # Kept for inspection, as the run ends here.
    path = self._directory / f"bad_batch_step_{step:06d}.npz"
    if self._write:
      self._directory.mkdir(parents=True, exist_ok=True)
      np.savez(path, **batch)  # type: ignore[arg-type]
    row = (f", as were the {self._max_skips} before "
           f"(health.max_skips={self._max_skips})") if self._max_skips else ""
    raise HealthError(
        f"Step {step} {found}{row}. Its batch is in {path}; its update was "
        "not made, and the last checkpoint is from before it."
        + OF_NUMBERS * ("denominator" not in found))


# No help where the loss function has a mistake.
OF_NUMBERS = (" Lower learning_rate, lengthen warmup_steps, lower "
              "max_grad_norm, or use compute.dtype=float32.")


def _what_is_wrong(values: Mapping[str, Any]) -> str:
  # First, as a denominator of 0 makes the loss NaN, which would name the
  # wrong cause.
  for name, value in values.items():
    if name.startswith("denominator/") and not value > 0:
      return (f"has a loss whose term {name.partition('/')[2]!r} has a "
              f"denominator of {value}, and a positive one is needed: see "
              "loss.function")
  bad = [f"{name}={float(values[name])}" for name in ("loss", "grad_norm")
         if name in values and not np.isfinite(values[name])]
  if bad:
    return f"is not finite: {', '.join(bad)}"
  if values.get("spike"):
    return f"is a spike: loss={float(values['loss']):.6g}"
  return ""


class RolloutHealth(Streaks):
  """Stops when rollouts have carried no signal for several batches in a row.

  Either every completion was cut off at its maximum length, so that no answer
  was ever scored, or no group had two different rewards, so that every
  advantage is zero, or rewards could not score too many completions. A few
  graders that are late cost a few completions. A judge that is gone leaves
  nothing to learn from; and which scores are missing may depend on what they
  would have been, which biases the rest.
  """

  def __init__(
      self, *, patience: int, max_unscored: float, unscored_patience: int):
    """Takes the limits, which are keys of `health`.

    Args:
      patience: batches in a row without a signal.
      max_unscored: tolerated share of a batch without a score.
      unscored_patience: batches in a row above that share.

    Raises:
      ValueError: patience is less than one.
    """
    super().__init__("clipped", "silent", "unscored")
    if patience < 1:
      raise ValueError(
          f"health.patience is {patience}, and needs at least 1 step.")
    self._patience, self._most = patience, max_unscored
    self._unscored_patience = unscored_patience

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Checks one batch of rollouts.

    Args:
      step: the step just made.
      metrics: of `rollout_worker.metrics`; the shares of completions without a
        score and of those that hit their maximum length, and of groups whose
        rewards are all equal, are read.

    Raises:
      HealthError: a streak has reached its limit.
    """
    share = metrics["frac_unscored"]
    unscored = self.count("unscored", share > self._most)
    clipped = self.count("clipped", metrics["completions/clipped_ratio"] >= 1)
    silent = self.count("silent", metrics["frac_reward_zero_std"] >= 1)
    # First: what has no score has no signal either.
    if unscored >= self._unscored_patience:
      raise HealthError(
          f"Step {step}: {100 * share:.3g}% of the completions could not be "
          f"scored, and more than {100 * self._most:.3g}% in each of the last "
          f"{unscored} batches (health.max_unscored={self._most:g}, "
          f"health.unscored_patience={self._unscored_patience}). "
          "`rewards/*/timeouts` and `rewards/*/errors` say which reward could "
          "not judge, the warnings above why (where both are 0, no reward "
          "applies to these completions); mend it, or raise "
          "health.max_unscored.")
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
