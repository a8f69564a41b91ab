"""Visits every instruction of a module, with the number of its runs.

XLA's own analysis counts the body of a loop once, and TPU HLO states no trip
counts, so they are read from the loops: counter, start, bound and step. A
bound that is an argument of the program (the number of microbatches) has to be
given.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterator

from posttrain.plan.hlo import Computation, Instruction, Module

_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start",
         "optimization-barrier")
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul,
    "minimum": min, "maximum": max}
_COMPARISONS = ("LT", "LE", "GT", "GE", "NE")


@dataclasses.dataclass(frozen=True)
class Visit:
  """An instruction in its place.

  Attributes:
    times: runs of it in one run of the program.
    place: the outermost computation that it is fused into; two visits with
      one place and one channel are parts of one asynchronous operation.
    fused: it is inside of a fusion, and its result never reaches memory.
  """

  scope: "Scope"
  instruction: Instruction
  times: int
  place: str
  fused: bool


@dataclasses.dataclass(frozen=True)
class Scope:
  """A computation, and where it was called from."""

  module: Module
  computation: Computation
  caller: "Scope | None" = None
  call: Instruction | None = None

  def inner(self, name: str, call: Instruction) -> "Scope":
    return Scope(self.module, self.module[name], self, call)

  @property
  def root(self) -> Instruction:
    return self.computation[self.computation.root]

  def source(self, name: str) -> tuple["Scope", Instruction] | None:
    """Finds the place where a value that may be copied was computed.

    Goes through copies, tuples, fusions and values that a loop leaves alone;
    None where it is an argument of the program or changes in a loop.
    """
    instruction = self.computation[name]
    if instruction.opcode in _SAME:
      return self.source(instruction.operands[0])
    if instruction.opcode == "parameter":
      passed = self.argument(instruction)
      return passed[0].source(passed[1]) if passed else None
    if instruction.opcode == "fusion":
      inner = self.inner(instruction.called, instruction)
      return inner.source(inner.root.name)
    if instruction.opcode == "get-tuple-element":
      return self._element(instruction)
    return self, instruction

  def argument(self, parameter: Instruction) -> tuple["Scope", str] | None:
    """Finds the value that the caller passes for a parameter.

    None for the program's own, and for a loop's, which is the whole state:
    `_element` takes one of it.
    """
    if self.caller is None or self.call is None or self.in_loop:
      return None
    return self.caller, self.call.operands[int(parameter.operands[0])]

  def _element(self, get: Instruction) -> tuple["Scope", Instruction] | None:
    of = self.computation.operand(get)
    if of.opcode == "parameter" and self.in_loop:
      return self.initial(get.index) if self.keeps(get.index) else None
    found = (self, of) if of.opcode == "tuple" else self.source(of.name)
    if found is None or found[1].opcode != "tuple":
      return None
    return found[0].source(found[1].operands[get.index])

  @property
  def in_loop(self) -> bool:
    return self.call is not None and self.call.opcode == "while"

  def initial(self, index: int) -> tuple["Scope", Instruction] | None:
    """Finds element `index` of a loop's state before its first iteration."""
    assert self.caller is not None and self.call is not None
    start = self.caller.computation.operand(self.call)
    if start.opcode != "tuple":
      return None
    return self.caller.source(start.operands[index])

  def keeps(self, index: int) -> bool:
    """Tests if the body of a loop leaves element `index` unchanged."""
    assert self.caller is not None and self.call is not None
    body = self.caller.inner(self.call.called, self.call)
    return body.root.opcode == "tuple" and counter(
        body, body.root.operands[index]) == index

  def integer(self, name: str) -> int | None:
    """Evaluates a scalar that the program itself determines.

    A minimum with one known part is taken for that part: a loop over pairs of
    blocks visits at most all of them.
    """
    found = self.source(name)
    if found is None:
      return None
    scope, instruction = found
    if instruction.opcode == "constant":
      text = instruction.operands[0]
      return int(text) if re.fullmatch(r"-?\d+", text) else None
    if instruction.opcode in _ARITHMETIC:
      a, b = map(scope.integer, instruction.operands)
      if a is not None and b is not None:
        return _ARITHMETIC[instruction.opcode](a, b)
      if instruction.opcode == "minimum":
        return b if a is None else a
    return None


def counter(scope: Scope, name: str) -> int | None:
  """Finds the element of the loop's state that a value is, if it is one."""
  instruction = scope.computation[name]
  if instruction.opcode in _SAME:
    return counter(scope, instruction.operands[0])
  if instruction.opcode == "parameter":
    passed = scope.argument(instruction)
    return counter(*passed) if passed else None
  if instruction.opcode == "get-tuple-element" and scope.in_loop and (
      scope.computation.operand(instruction).opcode == "parameter"):
    return instruction.index
  return None


def _step(body: Scope, index: int) -> int | None:
  """Reads the number that one iteration adds to the counter."""
  found = body.source(body.root.operands[index])
  if found is None or found[1].opcode != "add":
    return None
  scope, add = found
  for one, other in (add.operands, add.operands[::-1]):
    if counter(scope, one) == index:
      return scope.integer(other)
  return None


def trip_count(scope: Scope, loop: Instruction) -> int | None:
  """Counts the iterations of a `while`; None if the program lacks its bound.

  A loop that may also end early (a decode loop whose rows are done) has the
  count that its counter allows.
  """
  body = scope.inner(loop.called, loop)
  condition = scope.inner(loop.attribute("condition").lstrip("%"), loop)
  for visit in _visit(condition, 1, "", 0):
    where, instruction = visit.scope, visit.instruction
    direction = instruction.attribute("direction")
    if instruction.opcode != "compare" or direction not in _COMPARISONS:
      continue
    index = counter(where, instruction.operands[0])
    bound = where.integer(instruction.operands[1])
    if index is None or bound is None:
      continue
    start, step = body.initial(index), _step(body, index)
    first = start[0].integer(start[1].name) if start else None
    if first is not None and step:
      last = bound + {"LE": 1, "GE": -1}.get(direction, 0)
      return max(0, -(-(last - first) // step))
  return None


def walk(module: Module, unknown_trips: int | None = None) -> Iterator[Visit]:
  """Yields all instructions, with loops multiplied out.

  Args:
    unknown_trips: iterations of a loop whose bound is an argument.

  Raises:
    ValueError: there is such a loop, and `unknown_trips` is None.
  """
  yield from _visit(
      Scope(module, module[module.entry]), 1, "", unknown_trips)


def _visit(
    scope: Scope, times: int, place: str, unknown_trips: int | None,
) -> Iterator[Visit]:
  fused = bool(place)
  here = place or scope.computation.name
  for instruction in scope.computation:
    inside = lambda name, times, place: _visit(
        scope.inner(name, instruction), times, place, unknown_trips)
    yield Visit(scope, instruction, times, here, fused)
    if instruction.opcode == "while":
      trips = trip_count(scope, instruction)
      trips = unknown_trips if trips is None else trips
      if trips is None:
        raise ValueError(
            f"The trip count of the loop {instruction.name} "
            f"({instruction.op_name}) is an argument of the program.")
      yield from inside(instruction.called, times * trips, "")
    elif instruction.opcode == "fusion":
      yield from inside(instruction.called, times, here)
    elif instruction.opcode in ("call", "async-start"):
      yield from inside(instruction.called, times, place)
    elif instruction.opcode == "conditional":
      for name in re.findall(
          r"%([\w.\-]+)", instruction.attribute("branch_computations")):
        yield from inside(name, times, place)  # All: an upper bound.
