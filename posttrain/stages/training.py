"""Shared code of training stages: the update, resuming, saving, leaving."""

from typing import Any, NoReturn

import jax
import optax
from ml_collections import config_dict

from posttrain import distributed, sharding, weights
from posttrain.model.config import LoraConfig
from posttrain.model.transformer import Transformer
from posttrain.stages.run_context import RunContext
from posttrain.telemetry import memory, metrics
from posttrain.train import (
  checkpoint_integrity,
  checkpoints,
  health,
  optimizer,
  preemption,
  spikes,
  step,
  trainable,
)
from posttrain.train import state as state_lib


def pick(section: config_dict.ConfigDict, names: str) -> dict[str, Any]:
  """`pick(section, "beta1 beta2")`: these keys of it, as keyword arguments."""
  return {name: section[name] for name in names.split()}


def due(number: int, every: int, last: bool) -> bool:
  """Tests if a step is one of `every`; 0 means at the end only."""
  return last or (every > 0 and number % every == 0)


def make_update(
    section: config_dict.ConfigDict, loss: step.Loss,
) -> tuple[optax.GradientTransformation, step.CompiledUpdate]:
  """The optimizer, and the compiled update, which consumes its state.

  Raises:
    ValueError: the mesh does not divide the length of a row.
  """
  length, parts = section.sequence_length, sharding.axis_size("length")
  if length % parts:
    raise ValueError(
        f"sequence_length={length} cannot be split over mesh.context={parts}. "
        f"Use sequence_length={-(-length // parts) * parts}, the next "
        "multiple.")
  schedule = optimizer.make_schedule(**pick(
      section, "schedule learning_rate warmup_steps num_steps "
      "final_learning_rate"))
  optimize = make_optimizer(section)
  return optimize, step.compile_update(
      loss, optimize, schedule, router_aux_coef=section.router_aux_coef,
      spikes=spike_rule(section), skip=section.health.on_bad_step == "skip")


def make_optimizer(
    section: config_dict.ConfigDict) -> optax.GradientTransformation:
  """The optimizer that the section names, without its learning rate."""
  return optimizer.make_optimizer(**pick(
      section, "optimizer moments_dtype beta1 beta2 eps weight_decay "
      "max_grad_norm"))


def spike_rule(section: config_dict.ConfigDict) -> spikes.Rule | None:
  """When a loss is a spike; None: never."""
  rule = section.health
  return spikes.Rule(
      mads=rule.spike_mads, window=rule.spike_window
  ) if rule.spike_mads else None


def step_health(context: RunContext) -> health.StepHealth:
  """Makes the health rule for updates that were not made."""
  rule = context.section.health
  return health.StepHealth(
      context.directory, write=context.workdir.is_writer,
      max_skips=rule.max_skips if rule.on_bad_step == "skip" else 0)


def plan(
    section: config_dict.ConfigDict, compute: config_dict.ConfigDict,
) -> trainable.Plan:
  """Plans the trainable parameters, and the storage of the others."""
  lora = LoraConfig(**section.lora) if section.lora.rank else None
  return trainable.Plan(
      lora=lora, pattern=section.trained,
      frozen_dtype=compute.frozen_dtype)


def prepare(
    context: RunContext, model: Transformer,
) -> tuple[Transformer, frozenset[str]]:
  """The model as the stage trains it, and the paths that it trains.

  Args:
    model: what the stage starts from. Its buffers are consumed.

  Raises:
    ValueError: nothing would be trained, or the mesh does not divide what is
      quantised.
  """
  model, trained = trainable.prepare(
      model, plan(context.section, context.config.compute),
      seed=context.config.seed, stage=context.name)
  moving, frozen = map(jax.tree.leaves, trainable.split(model, trained))
  if frozen:
    context.console.line(
        f"{context.name}: trains {sum(w.size for w in moving):,} parameters "
        f"in {len(moving)} arrays; {len(frozen)} are frozen, "
        f"{memory.format_bytes(sum(w.nbytes for w in frozen))} in all")
  return model, trained


def trained_share(state: state_lib.TrainState) -> float:
  """Of all weights; adapters count as what they are, a small part."""
  moving = sum(w.size for w in jax.tree.leaves(state.trained))
  return min(1.0, moving / memory.parameters(state.trained.config))


def open_checkpoints(context: RunContext) -> checkpoints.Checkpoints:
  """The stage's checkpoints, kept as the config says."""
  return checkpoints.Checkpoints(
      context.workdir.checkpoints(context.name),
      **pick(context.section.checkpoint,
             "keep keep_best best_metric best_mode"))


def resume(
    context: RunContext, saver: checkpoints.Checkpoints,
    fresh: state_lib.TrainState,
) -> tuple[state_lib.TrainState, checkpoints.Restored | None]:
  """The newest checkpoint's state, or the fresh one and None.

  Raises:
    DamagedError: the checkpoint cannot be read, and none before it may be.
  """
  if saver.latest_step() is None:
    return fresh, None
  moving = state_lib.to_checkpoint(fresh)
  wanted = checkpoints.abstract(moving)
  for array in jax.tree.leaves(moving):
    array.delete()  # Room for what is read.
  found = _newest(context, saver, wanted)
  checkpoints.check_same(
      found, **_identity(context, weights.frozen_name(fresh.frozen)))
  context.console.line(f"{context.name}: resumed from step {found.step}")
  warn_of_missing_rows(context, found.step)
  return state_lib.from_checkpoint(fresh, found.tree), found


def warn_of_missing_rows(context: RunContext, last: int) -> None:
  """Says which steps of 1..`last` have no row in metrics.jsonl, if any.

  They cannot be told from elsewhere: TensorBoard's events have 32 bits, and
  lack what was not flushed.
  """
  if not context.workdir.is_writer:
    return
  path = context.workdir.metrics
  lost = metrics.missing(
      metrics.read(path) if path.exists() else [], context.name, last)
  if lost:
    context.console.warning(
        f"{context.name}: {path} HAS NO ROWS of step {lost}, which the stage "
        "has made. The file was cut or is not that of this run; the weights "
        "do not depend on it. Put the rows back from a copy, if there is one.")


def _newest(
    context: RunContext, saver: checkpoints.Checkpoints,
    wanted: dict[str, Any],
) -> checkpoints.Restored:
  """The newest checkpoint, or as `checkpoint.on_damaged` says."""
  while True:
    try:
      return saver.restore(wanted)
    except checkpoint_integrity.DamagedError as error:
      steps = saver.steps()
      if context.section.checkpoint.on_damaged == "error" or len(steps) == 1:
        raise
      kept = saver.set_aside(steps[-1])
      context.console.warning(
          f"{context.name}: {error} It is in {kept} now. GOING BACK from step "
          f"{steps[-1]} to step {steps[-2]}, since checkpoint.on_damaged is "
          "previous.")


def save(
    context: RunContext, saver: checkpoints.Checkpoints,
    state: state_lib.TrainState, number: int, extras: dict[str, Any],
    **more: Any,
) -> None:
  """Saves the state with `extras` and what tells that it fits a run.

  Frozen weights are saved once, beside the stages. The rows of metrics up to
  here are on the disk before.

  Args:
    number: the step, as the stage counts it.
    **more: `rollouts` and `metrics` of `Checkpoints.save`.
  """
  distributed.on_first_host(context.workdir.check_lease)
  if context.workdir.is_writer:
    metrics.sync(context.workdir.metrics)
  frozen = weights.save_frozen(state.frozen, context.workdir)
  saver.save(
      number, state_lib.to_checkpoint(state),
      _identity(context, frozen) | extras, **more)


def leave(
    context: RunContext, saver: checkpoints.Checkpoints, number: int,
) -> NoReturn:
  """Ends the process with the preempted status, once the save is whole."""
  saver.wait()
  stop(context, f"saved at step {number}")


def stop(context: RunContext, kept: str) -> NoReturn:
  """Ends the process with the preempted status; `kept` says what stays."""
  message = (
      f"{context.name}: SIGTERM; {kept}. The same command goes on from there.")
  context.console.line(message)  # The exit status alone says little.
  raise preemption.Preempted(message)


def _identity(context: RunContext, frozen: str) -> dict[str, Any]:
  """What a checkpoint and a run must share; `frozen` as `frozen_name` has it.
  """
  return {
      "seed": context.config.seed, "renderer_hash": context.renderer.hash,
      "plan": plan(context.section, context.config.compute).to_json(),
      "frozen": frozen}
