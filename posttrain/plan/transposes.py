"""Transposes between a weight gradient's product and its use.

XLA folds a transpose into the product beside it, unless a sharding annotation
stands between the two; each one that is left reads and writes a gradient for
nothing. In a TPU's HLO it is a copy to another layout.
"""

import dataclasses
from collections.abc import Collection, Iterable

from posttrain.plan import dots
from posttrain.plan.hlo import Computation, Instruction
from posttrain.plan.walk import Scope, Visit

_THROUGH = (
    "copy", "copy-start", "copy-done", "bitcast", "convert", "reshape",
    "transpose", "tuple", "add", "dynamic-update-slice", "all-reduce",
    "reduce-scatter", "dynamic-slice", "slice", "select", "multiply",
    "optimization-barrier")
_BACKWARD = "transpose(jvp("  # How JAX names what differentiation made.


@dataclasses.dataclass(frozen=True)
class Transpose:
  """One instruction.

  Attributes:
    shape: as `f32[3,256,128]`.
    bytes: of one run, without tiles' padding.
    count: runs, loops multiplied out.
  """

  name: str
  shape: str
  bytes: int
  count: int


def beside_gradients(
    visits: Iterable[Visit], weights: Collection[tuple[int, ...]],
) -> list[Transpose]:
  """Finds the transposes of weight gradients.

  Args:
    weights: shapes that a gradient has on a device (`sizes`).
  """
  found = []
  for visit in visits:
    instruction = visit.instruction
    if visit.fused or not _transposes(visit.scope.computation, instruction):
      continue
    array = instruction.array
    if sizes(array.dims) in weights and _of_gradient(
        visit.scope, instruction.operands[0], set()):
      dims = ",".join(map(str, array.dims))
      found.append(Transpose(
          instruction.name, f"{array.dtype}[{dims}]", array.bytes,
          visit.times))
  return found


def sizes(dims: Iterable[int]) -> tuple[int, ...]:
  """Sorts dimensions by size, without those of 1."""
  return tuple(sorted(size for size in dims if size > 1))


def _transposes(computation: Computation, instruction: Instruction) -> bool:
  if instruction.opcode not in ("copy", "transpose", "copy-start"):
    return False
  source = computation.operand(instruction).array
  if instruction.opcode == "transpose":
    order = [int(i) for i in instruction.attribute(
        "dimensions").strip("{}").split(",") if i]
    kept = [i for i in order if source.dims[i] > 1]
    return kept != sorted(kept)
  return source.physical != instruction.array.physical


def _of_gradient(scope: Scope, name: str, seen: set) -> bool:
  """Tests if a value comes from a product of the backward pass.

  Goes back through what moves, adds or reduces gradients, and into the bodies
  of loops; a value that the program is given is none.
  """
  if (scope.computation.name, name) in seen:
    return False
  seen.add((scope.computation.name, name))
  instruction = scope.computation[name]
  if instruction.opcode in ("dot", "convolution"):
    return _BACKWARD in instruction.op_name and bool(
        dots.flops(scope.computation, instruction)) and (
            "rematted_computation" not in instruction.op_name)
  if instruction.opcode == "fusion":
    inner = scope.inner(instruction.called, instruction)
    return _of_gradient(inner, inner.root.name, seen)
  if instruction.opcode == "get-tuple-element":
    return _element(scope, instruction, seen)
  if instruction.opcode == "parameter":
    passed = scope.argument(instruction)
    return passed is not None and _of_gradient(*passed, seen)
  return instruction.opcode in _THROUGH and any(
      _of_gradient(scope, operand, seen) for operand in instruction.operands)


def _element(scope: Scope, get: Instruction, seen: set) -> bool:
  """Tests one element of a tuple, a fusion's results or a loop's state."""
  of = scope.computation.operand(get)
  if of.opcode == "tuple":
    return _of_gradient(scope, of.operands[get.index], seen)
  if of.opcode in ("fusion", "while"):
    return _root_element(scope.inner(of.called, of), get.index, seen)
  if of.opcode == "parameter" and scope.in_loop:
    if _root_element(scope, get.index, seen):
      return True
    start = scope.initial(get.index)
    return start is not None and _of_gradient(start[0], start[1].name, seen)
  return of.opcode in _THROUGH and _of_gradient(scope, of.name, seen)


def _root_element(scope: Scope, index: int, seen: set) -> bool:
  root = scope.root
  name = root.operands[index] if root.opcode == "tuple" else root.name
  return _of_gradient(scope, name, seen)
