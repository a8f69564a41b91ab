"""The update of a training stage: optimizer, trained parameters, program."""

import functools
from typing import Any

import jax
import optax
from ml_collections import config_dict

from posttrain import sharding
from posttrain.model.config import LoraConfig
from posttrain.model.transformer import Transformer
from posttrain.stages.run_context import RunContext
from posttrain.telemetry import memory
from posttrain.train import optimizer as optimizer_lib
from posttrain.train import spikes, step, trainable
from posttrain.train import state as state_lib


def pick(section: config_dict.ConfigDict, names: str) -> dict[str, Any]:
  """`pick(section, "beta1 beta2")`: these keys of it, as keyword arguments."""
  return {name: section[name] for name in names.split()}


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
  schedule = optimizer_lib.make_schedule(**pick(
      section, "schedule learning_rate warmup_steps num_steps "
      "final_learning_rate"))
  optimize = make_optimizer(section)
  return optimize, step.compile_update(functools.partial(
      step.update, loss=loss, optimizer=optimize, schedule=schedule,
      router_aux_coef=section.router_aux_coef, spikes=spike_rule(section),
      skip=section.health.on_bad_step == "skip"))


def make_optimizer(
    section: config_dict.ConfigDict) -> optax.GradientTransformation:
  """The optimizer that the section names, without its learning rate."""
  return optimizer_lib.make_optimizer(**pick(
      section, "optimizer moments_dtype beta1 beta2 eps weight_decay "
      "max_grad_norm"))


def spike_rule(section: config_dict.ConfigDict) -> spikes.Rule | None:
  """Makes the rule by which a loss is a spike; None: none is."""
  rule = section.health
  return spikes.Rule(
      mads=rule.spike_mads, window=rule.spike_window
  ) if rule.spike_mads else None


def plan(
    section: config_dict.ConfigDict, compute: config_dict.ConfigDict,
) -> trainable.Plan:
  """Plans the trainable parameters, and the storage of the others."""
  lora = LoraConfig(**section.lora) if section.lora.rank else None
  return trainable.Plan(
      lora=lora, pattern=section.trained,
      frozen_dtype=compute.frozen_dtype)


def make_state(
    context: RunContext, start: Transformer,
    optimizer: optax.GradientTransformation,
) -> state_lib.TrainState:
  """Makes the state before the first step.

  Args:
    start: what the stage starts from. Its buffers are consumed.

  Raises:
    ValueError: nothing would be trained, or the mesh does not divide what is
      quantised.
  """
  model, trained = trainable.prepare(
      start, plan(context.section, context.config.compute),
      seed=context.config.seed, stage=context.name)
  moving, frozen = map(jax.tree.leaves, trainable.split(model, trained))
  if frozen:
    context.console.line(
        f"{context.name}: trains {sum(w.size for w in moving):,} parameters "
        f"in {len(moving)} arrays; {len(frozen)} are frozen, "
        f"{memory.format_bytes(sum(w.nbytes for w in frozen))} in all")
  return state_lib.create(
      model, optimizer, trained, spike_rule(context.section))


def trained_share(state: state_lib.TrainState) -> float:
  """The trained share of all weights; adapters count as a small part."""
  moving = sum(w.size for w in jax.tree.leaves(state.trained))
  return min(1.0, moving / memory.parameters(state.trained.config))
