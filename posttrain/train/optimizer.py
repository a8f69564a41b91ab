"""AdamW and its schedules; weight decay skips norms and biases."""

from typing import Any

import jax
import optax

SCHEDULES = ("cosine", "linear", "constant")


def make_schedule(
    *, schedule: str, learning_rate: float, warmup_steps: int, num_steps: int,
    final_learning_rate: float,
) -> optax.Schedule:
  """Learning rate at optimizer step `s` (0-based, before the update).

  Linear from 0 over `warmup_steps` (so that step 0 with a warm-up moves
  nothing, as in Hugging Face's schedulers), then `schedule` down to
  `final_learning_rate` at `num_steps`.

  Raises:
    ValueError: an unknown schedule.
  """
  if schedule == "constant":
    after: optax.Schedule = optax.constant_schedule(learning_rate)
  elif schedule == "linear":
    after = optax.linear_schedule(
        learning_rate, final_learning_rate, num_steps - warmup_steps)
  elif schedule == "cosine":
    after = optax.cosine_decay_schedule(
        learning_rate, max(num_steps - warmup_steps, 1),
        alpha=final_learning_rate / learning_rate if learning_rate else 0.0)
  else:
    raise ValueError(f"schedule={schedule!r}; choose from {SCHEDULES}.")
  warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
  return optax.join_schedules([warmup, after], [warmup_steps])


def decay_mask(params: Any) -> Any:
  """True on the leaves that weight decay shrinks: no norm, no bias."""
  def decays(path, _):
    name = jax.tree_util.keystr(path)
    return not ("norm" in name or "bias" in name)

  return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    *, beta1: float, beta2: float, eps: float, weight_decay: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
  """Global-norm clipping, then AdamW's direction, before the learning rate.

  The learning rate is applied by `step.update`, from the step it is at: one
  counter, so that a step that is skipped cannot shift the schedule.
  """
  return optax.chain(
      optax.clip_by_global_norm(max_grad_norm),
      optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps),
      optax.add_decayed_weights(weight_decay, mask=decay_mask))
