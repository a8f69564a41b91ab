"""Plan of one config on one slice: every program compiled and measured.

A program that does not fit comes with advice: keys, remat policies, slices.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import config_dict

from posttrain import sharding
from posttrain.plan import estimate, measure, programs, traffic, transposes
from posttrain.plan import topology as topology_lib
from posttrain.plan.environment import PlanError
from posttrain.programs.program import SAMPLING, TRAINING, Program, model_of
from posttrain.programs.transfer import Transfer
from posttrain.stages.stage import Setup
from posttrain.telemetry.chips import GIB

REMAT_ORDER = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Plan:
  """All figures of a config on a slice.

  Attributes:
    roles: size of each axis of the mesh of each role; sampling has none of
      its own where the roles share their devices.
    results: of every program that was asked for.
    padding: of each stage that pads.
    advice: where something does not fit.
    only: a part of the names of the programs that were asked for.
    transfers: of weights between the two, by stage.
  """

  topology: topology_lib.Topology
  roles: dict[str, dict[str, int]]
  setup: Setup
  results: list[measure.Result]
  padding: list[programs.Padding]
  advice: list[str]
  only: str = ""
  transfers: Sequence[Transfer] = ()

  @property
  def fits(self) -> bool:
    return all(result.fits for result in self.results)

  def step_seconds(self, stage: str) -> float | None:
    """Bound of one step of a stage; None if a part of it has none.

    Of roles that overlap it is that of the slower one.
    """
    stepping = {result.program.role for result in self.results
                if result.program.stage == stage and result.program.calls}
    known = [seconds for role in stepping if (
        seconds := self.role_seconds(stage, role)) is not None]
    if not known or len(known) < len(stepping):
      return None
    return max(known) if self.overlaps(stage) else sum(known)

  def role_seconds(self, stage: str, role: str) -> float | None:
    """Bound of the programs of one role; None too if it has none."""
    own = [result for result in self.results if result.program.calls and (
        result.program.stage, result.program.role) == (stage, role)]
    known = [result.program.calls * result.times.bound
             for result in own if result.times]
    return sum(known) if own and len(known) == len(own) else None

  def overlaps(self, stage: str) -> bool:
    """Tests if rollouts are asynchronous: drawn while others are trained on."""
    return SAMPLING in self.roles and bool(
        self.setup.config[stage].get("staleness"))


def make(
    config: config_dict.ConfigDict, topology: topology_lib.Topology, *,
    only: str = "", report: Callable[[measure.Result], None] = lambda _: None,
    with_padding: bool = True,
) -> Plan:
  """Compiles the programs of a config.

  Args:
    only: compile only programs with this in their name.
    report: called with each result as it is there.
    with_padding: read the data, where it is here.

  Raises:
    PlanError: the config does not go with the topology, or `only` names no
      program.
  """
  setup, meshes, wanted = _programs(config, topology, only)
  compilers = {role: _compiler(topology, mesh, setup)
               for role, mesh in meshes.items()}
  results = []
  for program in wanted:
    with jax.set_mesh(meshes[program.role]):
      results.append(compilers[program.role].measure(program))
    report(results[-1])
  sampling = meshes.get(SAMPLING)
  with jax.set_mesh(meshes[TRAINING]):
    transfers = programs.transfers(setup, sampling) if sampling else []
    padded = programs.padding(setup, {
        role: sharding.mesh_sizes(mesh) for role, mesh in meshes.items()
    }) if with_padding else []
  return Plan(
      topology, {role: dict(mesh.shape) for role, mesh in meshes.items()},
      setup, results, padded, _advice(results, setup, topology, meshes), only,
      transfers)


Meshes = dict[str, jax.sharding.Mesh]  # By role.


def _programs(
    config: config_dict.ConfigDict, topology: topology_lib.Topology,
    only: str,
) -> tuple[Setup, Meshes, list[Program]]:
  """Lists the programs to compile.

  Raises:
    PlanError: all that a user can have wrong shows here.
  """
  devices = topology_lib.devices(topology)
  try:
    meshes = _meshes(config, devices, topology.num_slices)
    # What "auto" stands for depends on the devices.
    with jax.set_mesh(meshes[TRAINING]):
      setup = programs.set_up(config)
      found = list(programs.of_config(setup, meshes.get(SAMPLING)))
  except ValueError as error:
    raise PlanError(str(error)) from error
  wanted = [program for program in found if only in program.name]
  if not wanted:
    names = ", ".join(program.name for program in found)
    raise PlanError(
        f"--only={only} is in no program's name, of {names}." if found else
        " ".join(("There is no program to compile.", *setup.notes)))
  return setup, meshes, wanted


def _meshes(
    config: config_dict.ConfigDict, devices: Sequence[Any], slices: int,
) -> Meshes:
  """The mesh of each role, on the devices that it has.

  libtpu compiles for a part of a slice's devices as for all of them.
  """
  training, sampling = sharding.roles_of(config.mesh, devices)
  if config.mesh.roles == "shared":
    return {TRAINING: training}
  for mesh, section in ((training, "mesh"), (sampling, "mesh.sampling")):
    if mesh.devices.shape[0] % slices:
      raise PlanError(
          f"The first axis of {section}, {mesh.axis_names[0]}="
          f"{mesh.devices.shape[0]}, cannot be split over {slices} slices. "
          f"Set {section}.data or {section}.{mesh.axis_names[0]} to a "
          f"multiple of {slices}.")
  return {TRAINING: training, SAMPLING: sampling}


def _compiler(
    topology: topology_lib.Topology, mesh: jax.sharding.Mesh,
    setup: Setup,
) -> measure.Compiler:
  across, *others = mesh.devices.shape
  with jax.set_mesh(mesh):
    shapes = gradient_shapes(setup)
  return measure.Compiler(
      topology.chip, traffic.Layout(
          mesh.axis_names, (across // topology.num_slices, *others),
          topology.num_slices), shapes, setup.model.num_experts)


def gradient_shapes(setup: Setup) -> set[tuple[int, ...]]:
  """Sizes that a weight's gradient may have on a device, on this mesh.

  Each dimension whole or split, for all layers or for one.
  """
  found = set()
  for weight in jax.tree.leaves(model_of(setup.model)):
    choices = [{whole, part} for whole, part in zip(
        weight.shape, weight.sharding.shard_shape(weight.shape), strict=True)]
    for dims in itertools.product(*choices):
      for part in (dims, dims[1:]):
        if len(transposes.sizes(part)) > 1:
          found.add(transposes.sizes(part))
  return found


def _advice(
    results: list[measure.Result], setup: Setup,
    topology: topology_lib.Topology, meshes: Meshes,
) -> list[str]:
  """Advises on the worst program of each kind."""
  too_large: dict[str, list[measure.Result]] = {}
  for result in results:
    if not result.fits:
      too_large.setdefault(result.program.kind, []).append(result)
  if not too_large:
    return []
  stages = estimate.of_config(setup.config, setup.model)
  mesh = None if SAMPLING in meshes else sharding.mesh_sizes(meshes[TRAINING])
  return [
      line for same in too_large.values() for line in advise(
          max(same, key=lambda result: result.memory.total), stages, topology,
          mesh)]


def advise(
    result: measure.Result, stages: estimate.Stages,
    topology: topology_lib.Topology, mesh: sharding.MeshSizes | None,
) -> list[str]:
  """Advises on a program that is too large, a line each.

  The estimates are `telemetry.memory`'s, scaled by how far it was off for this
  program: never down, as it may have been another stage's.

  Args:
    mesh: that the roles share; None if they do not.
  """
  lines = [
      f"{result.name} needs {result.memory.total / GIB:.2f} GiB of "
      f"{result.memory.available / GIB:.2f} on {topology}.",
      f"Keys that make it smaller: {'; '.join(_keys(result, stages))}."]
  if mesh is None:
    return [*lines, "No other policy or slice is looked for: estimates are of "
            "roles that share their devices."]
  estimated = estimate.peak_bytes(stages, stages.model.remat, mesh)
  scale = max(1.0, result.memory.total / estimated)
  room = topology.chip.hbm_bytes / scale
  if result.program.phase == TRAINING:
    lines += _remat(stages, topology, mesh, room)
  return lines + _topology(stages, topology, room)


def _keys(result: measure.Result, stages: estimate.Stages) -> Iterator[str]:
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
  return [f"No slice of {topology.chip.name} up to {topology_lib.LARGEST} "
          "devices fits (modelled)."]
