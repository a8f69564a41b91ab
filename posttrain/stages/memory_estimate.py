"""Memory estimate of a stage, before anything is compiled.

It needs the stage's section and the model's shape alone, so that weights that
do not fit are reported before they are made.
"""

import dataclasses
from typing import Any

import jax
from ml_collections import config_dict

from posttrain import sharding
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.stages import training
from posttrain.stages.run_context import RunContext
from posttrain.stages.stage import Sizes, stage_of
from posttrain.telemetry import memory
from posttrain.train import trainable


def of_stage(
    context: RunContext, model: ModelConfig) -> dict[str, memory.Estimate]:
  """The estimate for the stage of `context`, on the current mesh.

  Returns:
    One, without a name; of split roles one for each, of whose devices it is.
  """
  section, config = context.section, context.config
  sizes = sizes_of(section, config.compute, model)
  both = of_sizes(sizes, config.compute, sharding.mesh_sizes())
  if config.mesh.roles == "shared" or not stage_of(
      section.kind).learns_from_rollouts:
    return {"": both}
  _, sampling = sharding.roles_of(config.mesh)
  with jax.set_mesh(sampling):
    there = sharding.mesh_sizes()
  only = of_sizes(sizes, config.compute, there)
  copy = {"parameters": only.persistent["parameters"]}
  return {
      "training": dataclasses.replace(both, sampling={}),
      "sampling": memory.Estimate(copy, {}, only.sampling)}


def sizes_of(
    section: config_dict.ConfigDict, compute: config_dict.ConfigDict,
    model: ModelConfig,
) -> Sizes:
  """Sizes of a stage's arrays; of a kind that gives none, the parameters."""
  memory_of = stage_of(section.kind).memory
  return memory_of(section, compute, model) if memory_of else Sizes(
      model, note=f"the parameters alone, as {section.kind} gives no `memory`")


def of_sizes(
    sizes: Sizes, compute: config_dict.ConfigDict, mesh: sharding.MeshSizes,
) -> memory.Estimate:
  """The estimate for one mesh."""
  return dataclasses.replace(memory.estimate(
      sizes.model, **mesh._asdict(), loss_chunk=compute.loss_chunk,
      **sizes.arguments), note=sizes.note)


def of_trained(
    section: config_dict.ConfigDict, compute: config_dict.ConfigDict,
    model: ModelConfig,
) -> tuple[Transformer, dict[str, Any]]:
  """Arguments of an estimate for what is trained and what stays frozen.

  Returns:
    The abstract model as the stage has it, and the arguments.
  """
  whole, paths = trainable.abstract(model, training.plan(section, compute))
  moving, frozen = trainable.split(whole, paths)
  return whole, dict(
      trained=sum(w.size for w in jax.tree.leaves(moving)),
      optimizer_bytes=bytes_of(jax.eval_shape(
          training.make_optimizer(section).init, moving)),
      frozen_bytes=bytes_of(frozen))


def bytes_of(tree: Any) -> int:
  """Bytes of all arrays, over all devices."""
  return sum(w.size * w.dtype.itemsize for w in jax.tree.leaves(tree))


def of_rollout(rollout: config_dict.ConfigDict, rows: int) -> dict[str, Any]:
  """Arguments of an estimate for `rows` completions that are decoded."""
  return dict(
      cache_rows=rows, cache_slots=cache_slots(rollout),
      cache_dtype=rollout.cache_dtype, weights_dtype=rollout.weights_dtype)


SMALLER_ROLLOUT = {"rollout.max_tokens": "fewer",
                   "rollout.max_prompt_tokens": "fewer"}


def smaller_moments(section: config_dict.ConfigDict) -> dict[str, str]:
  """The key that makes the optimizer's state smaller, if it is not yet."""
  return {"moments_dtype": "bfloat16 halves the optimizer's state"} if (
      section.moments_dtype == "float32") else {}


def cache_slots(rollout: config_dict.ConfigDict) -> int:
  """Slots of the cache at its largest: a chunk behind the prompt, and doubled.

  Tokens that are taken back for a wait need slots too, and are not counted.
  """
  slots = rollout.chunk
  while slots < rollout.max_tokens:
    slots *= 2
  return rollout.max_prompt_tokens + slots
