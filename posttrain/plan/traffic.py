"""Bytes that a compiled program moves between HBM and the core.

An operation outside of fusions reads its operands and writes its results;
what lies in on-chip memory costs nothing, and of an operand that is only
sliced, or a result that is only updated in place, the slice counts. Sizes
include the padding of tiles, as the hardware moves whole tiles.
"""

from collections.abc import Iterable

from posttrain.plan import collectives
from posttrain.plan.hlo import Array, Computation, Instruction, Module
from posttrain.plan.walk import Visit

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


def hbm_bytes(visits: Iterable[Visit], module: Module) -> int:
  """Counts bytes that one device reads and writes in one run of the program."""
  total, seen = 0, set[tuple[str, str]]()
  for visit in visits:
    if collectives.kind_of(visit):
      if collectives.is_first(visit, seen):
        total += visit.times * _direct(visit)
    elif not visit.fused:
      total += visit.times * _bytes(visit, module)
  return total


def _bytes(visit: Visit, module: Module) -> int:
  instruction, computation = visit.instruction, visit.scope.computation
  if (instruction.opcode in _FREE or instruction.opcode.endswith("-done")
      or _is_free_call(instruction)):
    return 0
  if instruction.opcode == "fusion":
    return _fusion(computation, instruction, module)
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


def _fusion(
    computation: Computation, fusion: Instruction, module: Module) -> int:
  inner = module[fusion.called]
  total = 0
  for operand, parameter in zip(
      fusion.operands, inner.parameters, strict=True):
    array = computation[operand].arrays[0]
    if array.space == 0:
      total += _read(inner, parameter.name, module, array.padded_bytes)
  root = inner[inner.root]
  results = ([inner[name] for name in root.operands]
             if root.opcode == "tuple" else [root])
  for result, array in zip(results, fusion.arrays, strict=False):
    if array.space == 0:
      total += _written(inner, result, module, array.padded_bytes)
  return total


def _read(
    inner: Computation, name: str, module: Module, whole: int) -> int:
  """Counts a fusion parameter's bytes that its users read: all, or slices."""
  total = 0
  for user in inner.users.get(name, []):
    if user.opcode == "tuple" or _is_collective(user):
      continue  # Handed on, or counted with the collective.
    if user.opcode == "bitcast":
      total += _read(inner, user.name, module, whole)
    elif user.opcode in _SLICES and user.operands[0] == name:
      total += user.array.padded_bytes
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
      continue  # Updated in place.
    elif user.opcode == "fusion":
      within = module[user.called]
      for operand, parameter in zip(
          user.operands, within.parameters, strict=True):
        if operand == name:
          total += _read(within, parameter.name, module, whole)
    else:
      return whole
  return min(total, whole)


def _written(
    inner: Computation, result: Instruction, module: Module, whole: int,
) -> int:
  """Counts the new bytes of a fusion's result."""
  if result.opcode == "bitcast":
    return _written(inner, inner.operand(result), module, whole)
  if result.opcode == "dynamic-update-slice":
    return inner.operand(result, 1).array.padded_bytes
  if result.opcode == "fusion":
    within = module[result.called]
    root = within[within.root]
    return whole if root.opcode == "tuple" else _written(
        within, root, module, whole)
  if result.opcode == "parameter" or _is_collective(result):
    return 0
  return whole


def _is_collective(instruction: Instruction) -> bool:
  """Tests for a part of an asynchronous collective, inside of a fusion."""
  return instruction.opcode in collectives.KINDS or _is_free_call(instruction)


def _is_free_call(instruction: Instruction) -> bool:
  return instruction.opcode == "custom-call" and instruction.attribute(
      "custom_call_target").strip('"') in _FREE_CALLS
