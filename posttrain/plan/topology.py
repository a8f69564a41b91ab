"""TPU slices by name, their devices, and what the chips can do.

Rates and links are those that Google Cloud publishes per chip
(https://docs.cloud.google.com/tpu/docs/v5p and its neighbours). The memory is
what libtpu 0.0.42 names when a program is too large for it. Chips are listed
for which training and decoding programs of this size have been compiled.
"""

import dataclasses
import math
import re
from typing import Any

from posttrain.plan.environment import PlanError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device, as JAX sees it: all of a chip, or a half of a tpu7x.

  Attributes:
    flops: per second, bfloat16.
    hbm_bytes: that a program may use.
    hbm_rate: bytes per second.
    axis_rate: bytes per second that a device sends along one axis of the
      torus, both ways together: half of the published bidirectional rate,
      over the axes.
    dcn_rate: bytes per second between slices, one way.
    per_chip: devices of a chip.
    sizes: slice shapes that libtpu knows and that Google Cloud offers,
      smallest first.
  """

  name: str
  flops: float
  hbm_bytes: int
  hbm_rate: float
  axis_rate: float
  dcn_rate: float
  per_chip: int
  sizes: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8",
          "8x8x8", "8x8x16", "8x16x16")


def _chip(
    name: str, *, teraflops: float, usable_gib: float, hbm_gbps: float,
    ici_gbps: float, dcn_gbits: float, sizes: tuple[str, ...],
    per_chip: int = 1,
) -> Chip:
  """From figures per chip, except `usable_gib`, which is per device."""
  axes = sizes[0].count("x") + 1
  return Chip(
      name=name, flops=teraflops * 1e12 / per_chip,
      hbm_bytes=int(usable_gib * GIB), hbm_rate=hbm_gbps * 1e9 / per_chip,
      axis_rate=ici_gbps * 1e9 / 2 / axes / per_chip,
      dcn_rate=dcn_gbits * 1e9 / 8 / per_chip, per_chip=per_chip, sizes=sizes)


CHIPS = {chip.name: chip for chip in (
    # Of v5e and v6e the network's rate is published per pod of 256 chips.
    _chip("v5e", teraflops=197, usable_gib=15.75, hbm_gbps=819, ici_gbps=400,
          dcn_gbits=25, sizes=_FLAT),
    _chip("v5p", teraflops=459, usable_gib=95.74, hbm_gbps=2765, ici_gbps=1200,
          dcn_gbits=50, sizes=_CUBES),
    _chip("v6e", teraflops=918, usable_gib=31.25, hbm_gbps=1638, ici_gbps=800,
          dcn_gbits=100, sizes=_FLAT),
    _chip("tpu7x", teraflops=2307, usable_gib=94.75, hbm_gbps=7380,
          ici_gbps=1200, dcn_gbits=100, sizes=_CUBES, per_chip=2),
)}


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

  def __str__(self) -> str:
    times = f"{self.num_slices} x " if self.num_slices > 1 else ""
    return times + self.name


def parse(name: str, num_slices: int = 1) -> Topology:
  """The topology of a name such as `v5e:2x2`.

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
  """Devices that programs can be compiled for, and nothing else.

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
