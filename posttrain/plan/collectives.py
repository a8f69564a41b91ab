"""Collectives of a compiled program: kind, mesh axis, how often, how large."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from posttrain.plan.hlo import Instruction
from posttrain.plan.walk import Visit

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
    "collective-permute", "ragged-all-to-all", "collective-broadcast")
# A TPU's compiler keeps a reduce-scatter as an all-reduce inside of a fusion
# of this name.
_SCATTER_FUSION = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Layout:
  """The mesh that a program was compiled for.

  Attributes:
    axes: names, in order; the first is the one that goes across slices.
    sizes: of each, within one slice.
    num_slices: of several slices, XLA compiles the program of one.
  """

  axes: tuple[str, ...]
  sizes: tuple[int, ...]
  num_slices: int = 1

  @property
  def devices(self) -> int:
    """Devices of one slice."""
    return math.prod(self.sizes)

  def axis(self, groups: np.ndarray) -> str:
    """Names the axes along which the devices of a group differ, joined by +."""
    places = np.stack(np.unravel_index(groups, self.sizes), -1)
    varies = (places != places[:, :1]).any((0, 1))
    return "+".join(
        name for name, differs in zip(self.axes, varies, strict=True)
        if differs) or "none"


@dataclasses.dataclass(frozen=True)
class Collective:
  """All runs of collectives of one kind over one axis, on one device.

  Attributes:
    axis: of the mesh; several are joined by +.
    group_size: devices that exchange.
    across_slices: the exchange leaves the slice.
    count: runs, loops multiplied out.
    bytes: of the whole that is gathered, reduced or sent; summed over runs.
  """

  kind: str
  axis: str
  group_size: int
  across_slices: bool
  count: int
  bytes: int

  @property
  def wire_bytes(self) -> float:
    """Bytes that a device sends in a ring: n - 1 of n parts."""
    share = (self.group_size - 1) / max(self.group_size, 1)
    if self.kind == "all-reduce":
      return 2 * share * self.bytes
    return self.bytes if self.kind == "collective-permute" else (
        share * self.bytes)


def collect(visits: Iterable[Visit], layout: Layout) -> list[Collective]:
  """Sums the collectives of a program; an asynchronous one counts once."""
  seen: set[tuple[str, str]] = set()
  found: dict[tuple[str, str, int, bool], tuple[int, int]] = {}
  for visit in visits:
    kind, between = kind_of(visit), _between_slices(visit.instruction)
    if between:
      kind, size = between, layout.num_slices
      key = (kind, layout.axes[0], size, True)
    elif kind and is_first(visit, seen):
      groups = parse_groups(visit.instruction, layout.devices)
      size = groups.shape[1]
      key = (kind, layout.axis(groups), size, False)
    else:
      continue
    size = payload(visit, kind, size)
    count, total = found.get(key, (0, 0))
    found[key] = count + visit.times, total + visit.times * size
  order = sorted(found.items(), key=lambda item: -item[1][1])
  return [Collective(*key, *sums) for key, sums in order]


def kind_of(visit: Visit) -> str | None:
  """The kind of collective that an instruction starts, if it is one."""
  opcode = visit.instruction.opcode.removesuffix("-start")
  if opcode not in KINDS:
    return None
  scattered = visit.scope.computation.name.startswith(_SCATTER_FUSION)
  return "reduce-scatter" if scattered else opcode


def _between_slices(instruction: Instruction) -> str | None:
  """The kind of a collective between slices, whose parts are sent by hosts."""
  found = re.search(
      r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
  if instruction.opcode != "send" or not found:
    return None
  return found[1].lower().replace("_", "-")


def is_first(visit: Visit, seen: set[tuple[str, str]]) -> bool:
  """Tests if a visit is the first fusion of an asynchronous operation."""
  channel = visit.instruction.attribute("channel_id")
  if not visit.fused or not channel:
    return True
  key = (channel, visit.place)
  if key in seen:
    return False
  seen.add(key)
  return True


def payload(visit: Visit, kind: str, group_size: int) -> int:
  """Bytes of the whole that a group gathers, reduces or sends.

  The padding of tiles is not among them.
  """
  computation = visit.scope.computation
  given = sum(
      array.bytes for operand in visit.instruction.operands
      for array in computation[operand].arrays)
  return given * group_size if kind == "all-gather" else given


def parse_groups(instruction: Instruction, devices: int) -> np.ndarray:
  """Reads device numbers, [groups, size], in any of XLA's notations.

  Raises:
    ValueError: the text is of another form.
  """
  pairs = instruction.attribute("source_target_pairs")
  if pairs:
    return _numbers(pairs).reshape(-1, 2)
  text = instruction.attribute("replica_groups")
  if text in ("", "{}"):
    return np.arange(devices)[None]
  if text.startswith("{{"):
    parts = [_numbers(part) for part in re.findall(r"\{([\d,]+)\}", text)]
    return np.stack(parts)
  if text.startswith("["):
    shape, _, source = text.partition("<=")
    return _iota(source).reshape(_numbers(shape))
  if text.startswith("mesh["):
    return _of_mesh(instruction.attributes, text)
  raise ValueError(f"Unknown form of replica_groups: {text}")


def _numbers(text: str) -> np.ndarray:
  return np.array([int(x) for x in re.findall(r"\d+", text)], int)


def _iota(text: str) -> np.ndarray:
  """`[2,2]T(1,0)`: counted up in that shape, transposed, flattened."""
  shape, _, order = text.partition("T")
  sizes = _numbers(shape)
  array = np.arange(sizes.prod()).reshape(sizes)
  return (array.transpose(_numbers(order)) if order else array).ravel()


def _of_mesh(attributes: str, text: str) -> np.ndarray:
  """`mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}`."""
  axes = re.findall(r"'(\w+)'=(\d+)", text)
  names, sizes = [name for name, _ in axes], [int(n) for _, n in axes]
  rest = attributes.split(text.split("]")[0], 1)[1]
  chosen: Sequence[str] = re.findall(
      r"'(\w+)'", re.search(r"\{(.*?)\}", rest)[1])  # type: ignore[index]
  ids = re.match(r"\], device_ids=\((.*?\]?(?:T\([\d,]*\))?)\) ", rest)
  devices = _iota(ids[1]) if ids else np.arange(math.prod(sizes))
  picked = [names.index(name) for name in chosen]
  others = [i for i in range(len(names)) if i not in picked]
  size = math.prod(sizes[i] for i in picked)
  return devices.reshape(sizes).transpose(*others, *picked).reshape(-1, size)
