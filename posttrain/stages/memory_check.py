"""Stages that cannot fit are refused before the first of them begins.

The estimate of an update is within a third of the compiler's figure. So a stage
is refused only where it is far too large, by a factor of `MARGIN`, and
`compute.on_too_large="warn"` goes on all the same.
"""

import os
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

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
  name, section = context.name, context.section
  sizes = memory_estimate.sizes_of(section, context.config.compute, model)
  available = _everywhere(device_bytes())
  go_on = "or go on all the same with compute.on_too_large='warn'."
  for role, estimate in memory_estimate.of_stage(context, model).items():
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


MODEL = ("the model (model, model_overrides) or its part of a device "
         "(mesh.fsdp)")


def _parts(estimate: memory.Estimate) -> Iterator[str]:
  """Parts of `Sizes.smaller` that the two largest parts depend on."""
  phases = (estimate.training, estimate.sampling, estimate.scoring)
  phase = max(phases, key=lambda phase: sum(phase.values()))
  parts = estimate.persistent | phase
  sampled = phase is estimate.sampling
  for part in sorted(parts, key=parts.__getitem__, reverse=True)[:2]:
    yield "sampling" if part == "cache" or (part == "logits" and sampled) else (
        "training" if part in ("activations", "logits") else "model")
