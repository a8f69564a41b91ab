"""What to change where a program does not fit."""

import dataclasses

from ml_collections import config_dict

from posttrain import sharding
from posttrain.plan import estimate
from posttrain.plan.measure import Result
from posttrain.plan.topology import Topology
from posttrain.telemetry.chips import GIB

REMAT_ORDER = ("none", "dots", "full")
LARGEST = 1024  # Devices up to which a larger slice is looked for.


def advise(
    result: Result, stages: estimate.Stages, topology: Topology,
    mesh: sharding.MeshSizes,
) -> list[str]:
  """Lines of advice for a program that is too large.

  The estimates are `train.memory`'s, scaled by how far it was off for this
  program: never down, as it may have been another stage's.
  """
  lines = needs_and_keys(result, stages.config, topology)
  estimated = estimate.peak_bytes(stages, stages.model.remat, mesh)
  scale = max(1.0, result.memory.total / estimated)
  room = topology.chip.hbm_bytes / scale
  if result.program.kind in ("update", "later_update"):
    lines += _remat(stages, topology, mesh, room)
  return lines + _topology(stages, topology, room)


def needs_and_keys(
    result: Result, config: config_dict.ConfigDict, topology: Topology,
) -> list[str]:
  """Two lines, which need no estimate."""
  return [
      f"{result.name} needs {result.memory.total / GIB:.2f} GiB of "
      f"{result.memory.available / GIB:.2f} on {topology}.",
      *_keys(result, config)]


def _keys(result: Result, config: config_dict.ConfigDict) -> list[str]:
  """The keys that make this program smaller, with what they are now."""
  stage, section = result.program.stage, config[result.program.stage]
  kind, compute = result.program.kind, config.compute
  now = []
  if kind in ("update", "later_update", "held_out", "old_logprobs",
              "ref_logprobs"):
    if section.kind == "sft":
      now.append(f"{stage}.num_microbatches={section.num_microbatches} (more "
                 "parts, each with fewer rows)")
    else:
      now.append(f"{stage}.rows_per_microbatch={section.rows_per_microbatch} "
                 "(fewer)")
    if compute.loss_chunk > 32:
      now.append(f"compute.loss_chunk={compute.loss_chunk} (smaller)")
    if compute.dtype == "float32":
      now.append("compute.dtype=float32 (bfloat16)")
    if section.moments_dtype == "float32" and "update" in kind:
      now.append(f"{stage}.moments_dtype=float32 (bfloat16 halves the "
                 "optimizer's state)")
  else:
    now.append(
        f"{stage}.rollout.max_num_seqs={section.rollout.max_num_seqs} (fewer)"
        if section.rollout.max_num_seqs else
        f"{stage}.num_groups={section.num_groups} (fewer; or continuous "
        f"batching, {stage}.rollout.max_num_seqs)")
    now.append(f"{stage}.rollout.max_tokens={section.rollout.max_tokens} "
               "(fewer)")
    if compute.dtype == "float32":
      now.append("compute.dtype=float32 (bfloat16 halves cache and weights)")
  if "reference" in result.memory.beside and compute.frozen_dtype == "float32":
    now.append("compute.frozen_dtype=float32 (bfloat16 halves the reference)")
  return ["Keys that make it smaller: " + "; ".join(now) + "."]


def _remat(stages, topology, mesh, room) -> list[str]:
  """The first policy beyond the present one that fits."""
  now = stages.model.remat
  after = REMAT_ORDER[REMAT_ORDER.index(now) + 1:]
  for remat in after:
    if estimate.peak_bytes(stages, remat, mesh) <= room:
      return [f"compute.remat={remat} fits on {topology} (modelled)."]
  tried = f"{' and '.join(after)} included" if after else (
      f"compute.remat is {now} already")
  return [f"No remat policy fits on {topology} ({tried}; modelled)."]


def _topology(stages, topology, room) -> list[str]:
  """The smallest slice of the same chip on which some mesh fits."""
  for size in topology.chip.sizes:
    other = dataclasses.replace(topology, size=size)
    if other.num_devices > LARGEST:
      break
    found = list(estimate.candidates(stages, other))
    for remat in dict.fromkeys((stages.model.remat, *REMAT_ORDER)):
      fitting = [each for each in found
                 if each.remat == remat and each.bytes <= room]
      if fitting:
        best = min(fitting, key=lambda each: each.seconds)
        return [f"The smallest slice that fits: {best} (modelled)."]
  return [f"No slice of {topology.chip.name} up to {LARGEST} devices fits "
          "(modelled)."]
