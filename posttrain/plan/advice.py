"""Advice on a program that does not fit: keys, remat policies, slices."""

import functools
from collections.abc import Iterator

from posttrain import sharding
from posttrain.plan import estimate
from posttrain.plan.measure import Result
from posttrain.plan.topology import LARGEST, Topology
from posttrain.programs.program import SAMPLING, TRAINING
from posttrain.telemetry.chips import GIB

REMAT_ORDER = ("none", "dots", "full")


def advise(
    result: Result, stages: estimate.Stages, topology: Topology,
    mesh: sharding.MeshSizes,
) -> list[str]:
  """Advises on a program that is too large, a line each.

  The estimates are `telemetry.memory`'s, scaled by how far it was off for this
  program: never down, as it may have been another stage's.
  """
  lines = needs_and_keys(result, stages, topology)
  estimated = estimate.peak_bytes(stages, stages.model.remat, mesh)
  scale = max(1.0, result.memory.total / estimated)
  room = topology.chip.hbm_bytes / scale
  if result.program.phase == TRAINING:
    lines += _remat(stages, topology, mesh, room)
  return lines + _topology(stages, topology, room)


def needs_and_keys(
    result: Result, stages: estimate.Stages, topology: Topology,
) -> list[str]:
  """Writes two lines, which need no estimate."""
  return [
      f"{result.name} needs {result.memory.total / GIB:.2f} GiB of "
      f"{result.memory.available / GIB:.2f} on {topology}.",
      f"Keys that make it smaller: {'; '.join(_keys(result, stages))}."]


def _keys(result: Result, stages: estimate.Stages) -> Iterator[str]:
  """Yields the keys that make this program smaller, with their values."""
  stage, phase = result.program.stage, result.program.phase
  compute, section = stages.config.compute, stages.config[stage]
  keys = functools.partial(stages.sizes[stage].keys, stage, section)
  yield from keys("sampling" if phase == SAMPLING else "training")
  if phase != SAMPLING and compute.loss_chunk > 32:
    yield f"compute.loss_chunk={compute.loss_chunk} (smaller)"
  if compute.dtype == "float32":
    yield "compute.dtype=float32 (bfloat16" + (
        " halves cache and weights)" if phase == SAMPLING else ")")
  if phase == TRAINING:
    yield from keys("optimizer")
  if "reference" in result.memory.beside and compute.frozen_dtype == "float32":
    yield "compute.frozen_dtype=float32 (bfloat16 halves the reference)"


def _remat(stages, topology, mesh, room) -> list[str]:
  """Finds the first remat policy beyond the present one that fits."""
  now = stages.model.remat
  after = REMAT_ORDER[REMAT_ORDER.index(now) + 1:]
  for remat in after:
    if estimate.peak_bytes(stages, remat, mesh) <= room:
      return [f"compute.remat={remat} fits on {topology} (modelled)."]
  tried = f"{' and '.join(after)} included" if after else (
      f"compute.remat is {now} already")
  return [f"No remat policy fits on {topology} ({tried}; modelled)."]


def _topology(stages, topology, room) -> list[str]:
  """Finds the smallest slice of the same chip on which some mesh fits."""
  for other in topology.others():
    found = list(estimate.candidates(stages, other))
    for remat in dict.fromkeys((stages.model.remat, *REMAT_ORDER)):
      fitting = [each for each in found
                 if each.remat == remat and each.bytes <= room]
      if fitting:
        best = min(fitting, key=lambda each: each.seconds)
        return [f"The smallest slice that fits: {best} (modelled)."]
  return [f"No slice of {topology.chip.name} up to {LARGEST} devices fits "
          "(modelled)."]
