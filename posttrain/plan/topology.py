"""TPU slices by name, and their devices."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

from posttrain.plan.environment import PlanError
from posttrain.telemetry.chips import CHIPS, Chip

LARGEST = 1024  # Devices up to which other slices are looked at.


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or several slices of a kind, such as `v5p:4x4x4` twice."""

  chip: Chip
  size: str
  num_slices: int = 1

  @property
  def name(self) -> str:
    return f"{self.chip.name}:{self.size}"

  @property
  def num_chips(self) -> int:
    return self.num_slices * math.prod(map(int, self.size.split("x")))

  @property
  def num_devices(self) -> int:
    return self.num_chips * self.chip.per_chip

  def others(self) -> Iterator["Topology"]:
    """Yields the sizes of this kind up to LARGEST devices, smallest first."""
    found = (dataclasses.replace(self, size=s) for s in self.chip.sizes)
    return itertools.takewhile(
        lambda each: each.num_devices <= LARGEST, found)

  def __str__(self) -> str:
    times = f"{self.num_slices} x " if self.num_slices > 1 else ""
    return times + self.name


def parse(name: str, num_slices: int = 1) -> Topology:
  """Parses the name of a topology, such as `v5e:2x2`.

  Raises:
    PlanError: there is none of that name; the message lists those there are.
  """
  kind, _, size = name.partition(":")
  if kind in CHIPS and size in CHIPS[kind].sizes and num_slices >= 1:
    return Topology(CHIPS[kind], size, num_slices)
  if num_slices < 1:
    raise PlanError(f"--num_slices={num_slices} is below 1.")
  hint = " A size is of chips, not of cores." if re.search(
      r"-\d+$", name) else ""
  known = "\n".join(
      "  " + ", ".join(f"{chip.name}:{size}" for size in chip.sizes)
      for chip in CHIPS.values())
  raise PlanError(
      f"--topology={name} is no slice that a plan can be made for.{hint} "
      f"Choose from:\n{known}")


def devices(topology: Topology) -> list[Any]:
  """Describes devices that programs can be compiled for, not run on.

  Raises:
    PlanError: libtpu does not know the topology.
  """
  from jax.experimental import topologies  # The environment comes first.
  options: dict[str, Any] = {}
  if topology.num_slices > 1:
    options["num_slices"] = topology.num_slices
  if topology.size == "1x1":  # A host has four chips unless told otherwise.
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    return list(topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, **options).devices)
  except RuntimeError as error:
    raise PlanError(
        f"libtpu does not describe {topology}: {error}") from error
