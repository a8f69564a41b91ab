"""Traffic of a compiled program: collectives, and bytes to and from HBM.

An operation outside of fusions reads its operands and writes its results;
what lies in on-chip memory costs nothing, and of an operand that is only
sliced, or a result that is only updated in place, the slice counts. Sizes
include the padding of tiles, as the hardware moves whole tiles.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from posttrain.plan.hlo import Array, Instruction
from posttrain.plan.walk import Scope, Visit

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
    "collective-permute", "ragged-all-to-all", "collective-broadcast")
# A TPU's compiler keeps a reduce-scatter as an all-reduce inside of a fusion
# of this name.
_SCATTER_FUSION = "all-reduce-scatter"
# Of these, nothing moves: they name, regroup or order what is there.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
    "call", "conditional", "after-all", "partition-id", "replica-id",
    "optimization-barrier", "async-start", "async-update"}
# Custom calls that reserve or announce and do not compute.
_FREE_CALLS = (
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart",
    "AsyncCollectiveDone")
_SLICES = ("dynamic-slice", "slice", "gather")


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
    bytes: of the whole that is gathered, reduced or sent, without the padding
      of tiles; summed over runs.
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
      groups = parse_groups(visit.instruction, math.prod(layout.sizes))
      size = groups.shape[1]
      key = (kind, layout.axis(groups), size, False)
    else:
      continue
    given = sum(
        array.bytes for operand in visit.instruction.operands
        for array in visit.scope.computation[operand].arrays)
    whole = given * size if kind == "all-gather" else given
    count, total = found.get(key, (0, 0))
    found[key] = count + visit.times, total + visit.times * whole
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


def hbm_bytes(visits: Iterable[Visit]) -> int:
  """Counts bytes that one device reads and writes in one run of the program."""
  total, seen = 0, set[tuple[str, str]]()
  for visit in visits:
    if kind_of(visit):
      if is_first(visit, seen):
        total += visit.times * _direct(visit)
    elif not visit.fused:
      total += visit.times * _bytes(visit)
  return total


def _bytes(visit: Visit) -> int:
  instruction, computation = visit.instruction, visit.scope.computation
  if (instruction.opcode in _FREE or instruction.opcode.endswith("-done")
      or _is_free_call(instruction)):
    return 0
  if instruction.opcode == "fusion":
    return _fusion(visit.scope, instruction)
  if instruction.opcode in _SLICES:
    return 2 * _hbm(instruction.arrays) if instruction.array.space == 0 else (
        _moved(instruction.array, computation.operand(instruction).array))
  if instruction.opcode == "dynamic-update-slice":
    update = computation.operand(instruction, 1).array
    return update.hbm_bytes + _moved(update, instruction.array)
  if instruction.opcode == "copy-start":  # (destination, source, context)
    return _hbm(instruction.arrays[:2])
  if instruction.opcode.removesuffix("-start") in _SLICES:
    whole, part = instruction.arrays[:2]
    return part.hbm_bytes + _moved(part, whole)
  return _direct(visit)


def _direct(visit: Visit) -> int:
  """Counts the bytes of whole operands and results."""
  computation, instruction = visit.scope.computation, visit.instruction
  if instruction.opcode.endswith("-start"):  # Its results hold its operands.
    return _hbm(instruction.arrays)
  return _hbm(instruction.arrays) + sum(
      _hbm(computation[name].arrays) for name in instruction.operands)


def _hbm(arrays: Iterable[Array]) -> int:
  return sum(array.hbm_bytes for array in arrays)


def _moved(part: Array, where: Array) -> int:
  """Counts the bytes of a part of an array, if that lies in HBM."""
  return part.padded_bytes if where.space == 0 else 0


def _fusion(scope: Scope, fusion: Instruction) -> int:
  inner, total = scope.inner(fusion.called, fusion), 0
  for operand, parameter in zip(
      fusion.operands, inner.computation.parameters, strict=True):
    array = scope.computation[operand].arrays[0]
    if array.space == 0:
      total += _read(inner, parameter.name, array.padded_bytes)
  root = inner.root
  results = ([inner.computation[name] for name in root.operands]
             if root.opcode == "tuple" else [root])
  for result, array in zip(results, fusion.arrays, strict=False):
    if array.space == 0:
      total += _written(inner, result, array.padded_bytes)
  return total


def _read(scope: Scope, name: str, whole: int) -> int:
  """Counts a fusion parameter's bytes that its users read: all, or slices."""
  total = 0
  for user in scope.computation.users.get(name, []):
    if user.opcode == "tuple" or _is_collective(user):
      continue  # Handed on, or counted with the collective.
    if user.opcode == "bitcast":
      total += _read(scope, user.name, whole)
    elif user.opcode in _SLICES and user.operands[0] == name:
      total += user.array.padded_bytes
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
      continue  # Updated in place.
    elif user.opcode == "fusion":
      within = scope.inner(user.called, user)
      for operand, parameter in zip(
          user.operands, within.computation.parameters, strict=True):
        if operand == name:
          total += _read(within, parameter.name, whole)
    else:
      return whole
  return min(total, whole)


def _written(scope: Scope, result: Instruction, whole: int) -> int:
  """Counts the new bytes of a fusion's result."""
  if result.opcode == "bitcast":
    return _written(scope, scope.computation.operand(result), whole)
  if result.opcode == "dynamic-update-slice":
    return scope.computation.operand(result, 1).array.padded_bytes
  if result.opcode == "fusion":
    within = scope.inner(result.called, result)
    return whole if within.root.opcode == "tuple" else _written(
        within, within.root, whole)
  if result.opcode == "parameter" or _is_collective(result):
    return 0
  return whole


def _is_collective(instruction: Instruction) -> bool:
  """Tests for a part of an asynchronous collective, inside of a fusion."""
  return instruction.opcode in KINDS or _is_free_call(instruction)


def _is_free_call(instruction: Instruction) -> bool:
  return instruction.opcode == "custom-call" and instruction.attribute(
      "custom_call_target").strip('"') in _FREE_CALLS
