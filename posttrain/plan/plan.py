"""One config on one slice: every program compiled, and what follows."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
from ml_collections import config_dict

from posttrain import sharding
from posttrain.plan import advice as advice_lib
from posttrain.plan import (
  collectives,
  estimate,
  measure,
  padding,
  programs,
  transposes,
)
from posttrain.plan import setup as setup_lib
from posttrain.plan import topology as topology_lib
from posttrain.plan.environment import PlanError


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a config on a slice.

  Attributes:
    mesh: size of each axis.
    results: of every program that was asked for.
    padding: per training stage.
    advice: where something does not fit.
    only: what the names of the programs had to have in them.
  """

  topology: topology_lib.Topology
  mesh: dict[str, int]
  setup: setup_lib.Setup
  results: list[measure.Result]
  padding: list[padding.Padding]
  advice: list[str]
  only: str = ""

  @property
  def fits(self) -> bool:
    return all(result.fits for result in self.results)

  def step_seconds(self, stage: str) -> float | None:
    """Bound of one step of a stage; None if a part of it has none."""
    total, found = 0.0, False
    for result in self.results:
      if result.program.stage == stage and result.program.calls:
        if result.times is None:
          return None
        total += result.program.calls * result.times.bound
        found = True
    return total if found else None


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
  setup, mesh, wanted = _programs(config, topology, only)
  with jax.set_mesh(mesh):
    compiler = _compiler(topology, mesh, setup)
    results = []
    for program in wanted:
      results.append(compiler.measure(program))
      report(results[-1])
    sizes = sharding.mesh_sizes()
  return Plan(
      topology, dict(mesh.shape), setup, results,
      padding.of_config(setup, sizes) if with_padding else [],
      _advice(results, setup, topology, mesh), only)


def _programs(
    config: config_dict.ConfigDict, topology: topology_lib.Topology,
    only: str,
) -> tuple[setup_lib.Setup, jax.sharding.Mesh, list[programs.Program]]:
  """What there is to compile; all that a user can have wrong shows here."""
  devices = topology_lib.devices(topology)
  if config.mesh.roles == "split":
    raise PlanError(
        "mesh.roles='split' is not planned yet. Plan each part by itself, with "
        "mesh.roles='shared' and a --topology of as many chips: the updates "
        "with --only=update, the sampler with the sizes of mesh.sampling.")
  try:
    mesh = sharding.mesh_of(config.mesh, devices)
    with jax.set_mesh(mesh):  # What "auto" stands for depends on the devices.
      setup = setup_lib.set_up(config)
      found = list(programs.of_config(setup))
  except ValueError as error:
    raise PlanError(str(error)) from error
  wanted = [program for program in found if only in program.name]
  if not wanted:
    names = ", ".join(program.name for program in found)
    raise PlanError(f"--only={only} is in no program's name, of {names}.")
  return setup, mesh, wanted


def _compiler(
    topology: topology_lib.Topology, mesh: jax.sharding.Mesh,
    setup: setup_lib.Setup,
) -> measure.Compiler:
  across, *others = mesh.devices.shape
  return measure.Compiler(
      topology.chip, collectives.Layout(
          mesh.axis_names, (across // topology.num_slices, *others),
          topology.num_slices), gradient_shapes(setup))


def gradient_shapes(setup: setup_lib.Setup) -> set[tuple[int, ...]]:
  """Sizes that a weight's gradient may have on a device, on this mesh.

  Each dimension whole or split, for all layers or for one.
  """
  found = set()
  for weight in jax.tree.leaves(programs.abstract_model(setup)):
    choices = [{whole, part} for whole, part in zip(
        weight.shape, weight.sharding.shard_shape(weight.shape), strict=True)]
    for dims in itertools.product(*choices):
      for part in (dims, dims[1:]):
        if len(transposes.sizes(part)) > 1:
          found.add(transposes.sizes(part))
  return found


def _advice(
    results: list[measure.Result], setup: setup_lib.Setup,
    topology: topology_lib.Topology, mesh: jax.sharding.Mesh,
) -> list[str]:
  """For the worst program of each kind."""
  worst: dict[str, measure.Result] = {}
  for result in results:
    kind = result.program.kind
    if not result.fits and (
        kind not in worst or result.memory.total > worst[kind].memory.total):
      worst[kind] = result
  if not worst:
    return []
  stages = estimate.of_config(setup.config, setup.model)
  with jax.set_mesh(mesh):
    sizes = sharding.mesh_sizes()
  return [line for result in worst.values()
          for line in advice_lib.advise(result, stages, topology, sizes)]
