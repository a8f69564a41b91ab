"""Stages that cannot fit are refused before the first of them begins.

The estimate of `footprint` is one: an update's is within a third of what the
compiler says. So a stage is refused only where it is far too large, by a
factor of `MARGIN`, and `compute.on_too_large="warn"` goes on all the same.
"""

import os
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import config_dict

from posttrain import sharding
from posttrain.model.config import ModelConfig
from posttrain.stages import memory_estimate
from posttrain.stages.run_context import RunContext
from posttrain.telemetry import chips, memory

MARGIN, MIB = 1.5, 2**20
# Of a row on its host: tokens, positions, segments, targets' masks.
ROW_BYTES_PER_TOKEN = 16
CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


def host_bytes() -> int:
  """The memory of this host, or as much of it as the process may use."""
  installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
  return min(installed, int(limit)) if limit.isdecimal() else installed


def device_bytes() -> int:
  """The memory of one device; of CPU devices, which share it, of the host.

  What a device says itself goes before the table of chips.
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
  """The first host's, to the MiB: all must come to one verdict."""
  return int(sharding.of_first_host(np.array(size // MIB, np.int32))) * MIB


def problems(context: RunContext, model: ModelConfig) -> Iterator[str]:
  """Lists why the stage of `context` cannot fit, on its mesh."""
  section, available = context.section, _everywhere(device_bytes())
  for role, estimate in memory_estimate.of_stage(context, model).items():
    if estimate.peak > MARGIN * available:
      yield (f"{f'{context.name}, {role}' if role else context.name}: "
             f"{estimate.line(available)}. It cannot fit. Lower "
             f"{', '.join(_keys(estimate, context))}; or go on all the same "
             "with compute.on_too_large='warn'.")
  batch, host = _batch_bytes(section), _everywhere(host_bytes())
  if batch > host:
    keys = (*_ROWS[section.kind], "sequence_length")
    yield (f"{context.name}: a batch of rows takes "
           f"{memory.format_bytes(batch)} of its host's "
           f"{memory.format_bytes(host)}. It cannot fit. Lower "
           f"{', '.join(f'{context.name}.{key}' for key in keys)}; or go on "
           "all the same with compute.on_too_large='warn'.")


# What makes a batch large, by the kind of stage.
_ROWS = {"sft": ("rows",), "rl": ("num_groups", "group_size")}


def _batch_bytes(section: config_dict.ConfigDict) -> int:
  if section.kind not in _ROWS:
    return 0
  rows = section.rows if section.kind == "sft" else (
      section.num_groups * section.group_size)
  return rows * section.sequence_length * ROW_BYTES_PER_TOKEN


def _keys(estimate: memory.Estimate, context: RunContext) -> list[str]:
  """Keys that the two largest parts depend on."""
  phases = (estimate.training, estimate.sampling, estimate.scoring)
  phase = max(phases, key=lambda phase: sum(phase.values()))
  parts = estimate.persistent | phase
  largest = sorted(parts, key=parts.__getitem__, reverse=True)[:2]
  sampled = phase is estimate.sampling
  return list(dict.fromkeys(
      key for part in largest for key in _of_part(part, context, sampled)))


def _of_part(part: str, context: RunContext, sampled: bool) -> list[str]:
  name, section = context.name, context.section
  kind = section.kind
  if part == "cache" or (part == "logits" and sampled):
    rows = ("rollout.max_num_seqs", "samples_per_problem") if (
        kind == "evaluate") else ("rollout.max_num_seqs",) if (
            section.rollout.max_num_seqs) else _ROWS[kind]
    return [f"{name}.{key}" for key in (
        *rows, "rollout.max_tokens", "rollout.max_prompt_tokens")]
  if part in ("activations", "logits"):
    part_of_batch = "rows_per_microbatch" if kind == "rl" else (
        "rows (or raise num_microbatches)")
    return [f"{name}.{part_of_batch}", f"{name}.sequence_length"]
  return ["the model (model, model_overrides) or its part of a device "
          "(mesh.fsdp)"]
