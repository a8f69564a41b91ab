"""Memory estimate of a stage, before anything is compiled.

From its section and the model's shape alone: where weights do not fit, it is
said before they are made.
"""

import dataclasses
from typing import Any

import jax
from ml_collections import config_dict

from posttrain import sharding
from posttrain.config import checks, stages
from posttrain.model import lora
from posttrain.model.config import ModelConfig
from posttrain.stages import training
from posttrain.stages.run_context import RunContext
from posttrain.telemetry import memory
from posttrain.train import trainable


def of_stage(
    context: RunContext, model: ModelConfig) -> dict[str, memory.Estimate]:
  """The estimate for the stage of `context`, on the current mesh.

  Returns:
    One, without a name; of split roles one for each, of whose devices it is.
  """
  section, compute = context.section, context.config.compute
  whole, weights = held(section, compute, model)
  here = sharding.mesh_sizes()
  both = of_section(section, compute, whole, weights, here)
  if context.config.mesh.roles == "shared" or section.kind != "rl":
    return {"": both}
  _, sampling = sharding.roles_of(context.config.mesh)
  with jax.set_mesh(sampling):
    there = sharding.mesh_sizes()
  only = of_section(section, compute, whole, weights, there)
  copy = {"parameters": only.persistent["parameters"]}
  return {
      "training": dataclasses.replace(both, sampling={}),
      "sampling": memory.Estimate(copy, {}, only.sampling)}


def of_section(
    section: config_dict.ConfigDict, compute: config_dict.ConfigDict,
    model: ModelConfig, weights: dict[str, int], mesh: sharding.MeshSizes,
) -> memory.Estimate:
  """The same on any mesh.

  Args:
    model, weights: of `held`.
  """
  sizes: dict[str, Any] = dict(weights)
  if section.kind == "sft":
    sizes |= dict(rows=-(-section.rows // section.num_microbatches),
                  sequence_length=section.sequence_length)
  if section.kind == "rl":
    sizes |= dict(
        rows=section.rows_per_microbatch,
        sequence_length=section.sequence_length,
        cache_rows=section.rollout.max_num_seqs
        or section.num_groups * section.group_size,
        offload=compute.offload)
  if section.kind == "evaluate":
    samples = max(section.samples_per_problem, section.majority.max_samples)
    rows, count = section.rollout.max_num_seqs, section.problems.count
    if not section.rollout.continuous_batching:  # An engine has all its slots.
      rows = max(rows, samples)
      rows = min(rows, count * samples) if count else rows
    sizes |= dict(cache_rows=rows)
  if "cache_rows" in sizes:
    rollout = section.rollout
    sizes |= dict(
        cache_slots=cache_slots(rollout), cache_dtype=rollout.cache_dtype,
        weights_dtype=rollout.weights_dtype)
  return memory.estimate(
      model, **mesh._asdict(), loss_chunk=compute.loss_chunk, **sizes)


def held(
    section: config_dict.ConfigDict, compute: config_dict.ConfigDict,
    model: ModelConfig,
) -> tuple[ModelConfig, dict[str, int]]:
  """The model as a stage has it; sizes of what it keeps beside, in all."""
  if not stages.schema_of(section.kind).trains:
    return model, {}
  plan = training.plan(section, compute)
  whole, trained = trainable.abstract(model, plan)
  size = lambda tree: sum(
      w.size * w.dtype.itemsize for w in jax.tree.leaves(tree))
  moving, frozen = trainable.split(whole, trained)
  reference = 0
  if section.kind == "rl" and section.loss.kl_coef:
    shared = section.reference in ("", checks.ADAPTER_OFF)
    like = whole if section.reference == "" else lora.without(whole)
    kept = jax.eval_shape(
        lambda model: trainable.at_rest(model, (), plan.frozen_dtype), like)
    reference = size(kept) - shared * size(frozen)
  return whole.config, dict(
      trained=sum(w.size for w in jax.tree.leaves(moving)),
      optimizer_bytes=size(jax.eval_shape(
          training.make_optimizer(section).init, moving)),
      frozen_bytes=size(frozen), reference_bytes=reference)


def cache_slots(rollout: config_dict.ConfigDict) -> int:
  """Of the cache at its largest: a chunk behind the prompt, and doubled.

  Tokens that are taken back for a wait need slots too, and are not counted.
  """
  slots = rollout.chunk
  while slots < rollout.max_tokens:
    slots *= 2
  return rollout.max_prompt_tokens + slots
