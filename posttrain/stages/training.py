"""What the training stages share: the update, resuming, saving, leaving."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import config_dict

from posttrain.stages.context import StageContext
from posttrain.train import checkpoints, optimizer, preemption, step
from posttrain.train import state as state_lib


def pick(section: config_dict.ConfigDict, names: str) -> dict[str, Any]:
  """`pick(section, "beta1 beta2")`: these keys of it, as keyword arguments."""
  return {name: section[name] for name in names.split()}


def due(number: int, every: int, last: bool) -> bool:
  """Whether a step is one of `every`; 0 means at the end only."""
  return last or (every > 0 and number % every == 0)


def make_update(
    section: config_dict.ConfigDict, loss: step.Loss,
) -> tuple[optax.GradientTransformation, Callable]:
  """The optimizer, and the compiled update, which consumes its state."""
  schedule = optimizer.make_schedule(**pick(
      section, "schedule learning_rate warmup_steps num_steps "
      "final_learning_rate"))
  adamw = optimizer.make_optimizer(**pick(
      section, "beta1 beta2 eps weight_decay max_grad_norm"))
  return adamw, jax.jit(
      functools.partial(
          step.update, loss=loss, optimizer=adamw, schedule=schedule,
          router_aux_coef=section.router_aux_coef),
      donate_argnums=0)


def open_checkpoints(context: StageContext) -> checkpoints.Checkpoints:
  """The stage's checkpoints, kept as the config says."""
  return checkpoints.Checkpoints(
      context.workdir.checkpoints(context.name),
      **pick(context.section.checkpoint,
             "keep keep_best best_metric best_mode"))


def resume(
    context: StageContext, saver: checkpoints.Checkpoints,
    fresh: state_lib.TrainState,
) -> tuple[state_lib.TrainState, checkpoints.Restored | None]:
  """The newest checkpoint's state, or the fresh one and None."""
  if saver.latest_step() is None:
    return fresh, None
  wanted = checkpoints.abstract(state_lib.to_dict(fresh))
  for array in jax.tree.leaves(fresh):
    array.delete()  # Room for what is read.
  found = saver.restore(wanted)
  checkpoints.check_same(found, **_identity(context))
  context.console.line(f"{context.name}: resumed from step {found.step}")
  return state_lib.from_dict(fresh, found.tree), found


def save(
    context: StageContext, saver: checkpoints.Checkpoints,
    state: state_lib.TrainState, number: int, extras: dict[str, Any],
    **more: Any,
) -> None:
  """Saves the state with `extras` and what tells that it fits a run.

  Args:
    number: the step, as the stage counts it.
    **more: `rollouts` and `metrics` of `Checkpoints.save`.
  """
  saver.save(
      number, state_lib.to_dict(state), _identity(context) | extras, **more)


def leave(
    context: StageContext, saver: checkpoints.Checkpoints, number: int,
) -> None:
  """Ends the process with the preempted status, once the save is whole."""
  saver.wait()
  stop(context, f"saved at step {number}")


def stop(context: StageContext, kept: str) -> None:
  """Ends the process with the preempted status; `kept` says what stays."""
  message = (
      f"{context.name}: SIGTERM; {kept}. The same command goes on from there.")
  context.console.line(message)  # The exit status alone says little.
  raise preemption.Preempted(message)


def _identity(context: StageContext) -> dict[str, Any]:
  return {"seed": context.config.seed, "renderer_hash": context.renderer.hash}
