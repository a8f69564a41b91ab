"""Memory estimate of a stage, before anything is compiled.

It needs the stage's section and the model's shape alone, so that weights that
do not fit are reported before they are made. `problems` refuses stages that
cannot fit before the first one begins. The estimate of an update is within a
third of the compiler's figure. So a stage is refused only where it is far too
large, by a factor of `MARGIN`; `compute.on_too_large="warn"` only warns.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from posttrain import sharding
from posttrain.config.stages import sampling as schema
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.sampler import requests
from posttrain.stages import training
from posttrain.stages.run_context import RunContext
from posttrain.stages.stage import Sizes, stage_of
from posttrain.telemetry import chips, memory
from posttrain.train import trainable

MARGIN, MIB = 1.5, 2**20
# A row on its host has tokens, positions, segments and the mask of targets.
ROW_BYTES_PER_TOKEN = 16
CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")
MODEL = ("the model (model, model_overrides) or its part of a device "
         "(mesh.fsdp)")
SMALLER_ROLLOUT = {"rollout.max_tokens": "fewer",
                   "rollout.max_prompt_tokens": "fewer"}


def of_stage(
    context: RunContext, model: ModelConfig) -> dict[str, memory.Estimate]:
  """The estimate for the stage of `context`, on the current mesh.

  Returns:
    One estimate under the name ""; with split roles, one for each role.
  """
  return _of_roles(
      context, sizes_of(context.section, context.config.compute, model))


def _of_roles(context: RunContext, sizes: Sizes) -> dict[str, memory.Estimate]:
  config = context.config
  both = of_sizes(sizes, config.compute, sharding.mesh_sizes())
  if config.mesh.roles == "shared" or not stage_of(
      context.section.kind).schema.learns_from_rollouts:
    return {"": both}
  _, sampling = sharding.roles_of(config.mesh)
  only = of_sizes(sizes, config.compute, sharding.mesh_sizes(sampling))
  copy = {"parameters": only.persistent["parameters"]}
  return {
      "training": dataclasses.replace(both, sampling={}),
      "sampling": memory.Estimate(copy, {}, only.sampling)}


def sizes_of(
    section: config_dict.ConfigDict, compute: config_dict.ConfigDict,
    model: ModelConfig,
) -> Sizes:
  """Computes the sizes of a stage's arrays.

  A kind that gives no `memory` has its parameters alone.
  """
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
  slots = cache_slots(rollout)
  kept = rollout.prefix_cache_tokens or rows * slots
  return dict(
      cache_rows=rows, cache_slots=slots,
      prefix_cache_rows=-(-kept // slots) if rollout.max_episode_tokens else 0,
      cache_dtype=rollout.cache_dtype, weights_dtype=rollout.weights_dtype)


def smaller_moments(section: config_dict.ConfigDict) -> dict[str, str]:
  """Names the key that makes the optimizer state smaller, if one would."""
  return {"moments_dtype": "bfloat16 halves the optimizer's state"} if (
      section.moments_dtype == "float32") else {}


def cache_slots(rollout: config_dict.ConfigDict) -> int:
  """Counts the slots of the largest cache: a prompt and all that is behind it.

  Tokens that are taken back for a wait need slots too, and are not counted.
  """
  return requests.Settings(
      max_num_seqs=1, max_seq_len=schema.longest(rollout)).sizes[-1]


def host_bytes() -> int:
  """Returns the memory of this host that the process may use."""
  installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
  return min(installed, int(limit)) if limit.isdecimal() else installed


def device_bytes() -> int:
  """Returns the memory of one device; CPU devices share the host's.

  A device's own figure goes before the table of chips.
  """
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  chip = chips.find(device.device_kind)
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  if chip is not None:
    return chip.hbm_bytes
  return host_bytes() // jax.local_device_count()


def _everywhere(size: int) -> int:
  """Takes the first host's size, in whole MiB, so that all hosts agree."""
  return int(sharding.of_first_host(np.array(size // MIB, np.int32))) * MIB


def problems(context: RunContext, model: ModelConfig) -> Iterator[str]:
  """Lists why the stage of `context` cannot fit, on its mesh."""
  name, section = context.name, context.section
  sizes = sizes_of(section, context.config.compute, model)
  available = _everywhere(device_bytes())
  go_on = "or go on all the same with compute.on_too_large='warn'."
  for role, estimate in _of_roles(context, sizes).items():
    if estimate.peak > MARGIN * available:
      keys = [key for part in _parts(estimate)
              for key in sizes.keys(name, section, part) or (MODEL,)]
      yield (f"{f'{name}, {role}' if role else name}: "
             f"{estimate.line(available)}. It cannot fit. Change "
             f"{', '.join(dict.fromkeys(keys))}; {go_on}")
  batch = sizes.batch_tokens * ROW_BYTES_PER_TOKEN
  host = _everywhere(host_bytes())
  if batch > host:
    yield (f"{name}: a batch of rows takes {memory.format_bytes(batch)} of its "
           f"host's {memory.format_bytes(host)}. It cannot fit. Change "
           f"{', '.join(sizes.keys(name, section, 'batch'))}; {go_on}")


def _parts(estimate: memory.Estimate) -> Iterator[str]:
  """Parts of `Sizes.smaller` that the two largest parts depend on."""
  phases = (estimate.training, estimate.sampling, estimate.scoring)
  phase = max(phases, key=lambda phase: sum(phase.values()))
  parts = estimate.persistent | phase
  sampled = phase is estimate.sampling
  for part in sorted(parts, key=parts.__getitem__, reverse=True)[:2]:
    yield "sampling" if part == "cache" or (part == "logits" and sampled) else (
        "training" if part in ("activations", "logits") else "model")
