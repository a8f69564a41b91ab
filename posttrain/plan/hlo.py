"""Parser of the text of a compiled HLO module: computations and shapes.

What XLA prints is the only account of a program that was compiled for chips
that are not here. Only what `count` needs is read: shapes with their layouts,
opcodes, operands and attributes. No JAX here.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bits of an element. What is not in it (token, opaque) holds no data.
BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16,
    "f32": 32, "f64": 64, "c64": 64, "f8e4m3fn": 8, "f8e5m2": 8,
}

_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_DEPTH = {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}


@dataclasses.dataclass(frozen=True)
class Array:
  """Shape, layout and memory space of one array.

  Attributes:
    dtype, dims: as XLA names them.
    order: minor to major.
    tile: of the minor dimensions, major first; () without tiling.
    space: memory space; 0 is HBM, others are on the core.
  """

  dtype: str
  dims: tuple[int, ...]
  order: tuple[int, ...] = ()
  tile: tuple[int, ...] = ()
  space: int = 0

  @property
  def bytes(self) -> int:
    return math.prod(self.dims) * BITS.get(self.dtype, 0) // 8

  @property
  def padded_bytes(self) -> int:
    """Bytes with the minor dimensions filled up to whole tiles."""
    physical = [self.dims[i] for i in reversed(self.order)]
    physical = [1] * (len(self.tile) - len(physical)) + physical
    for back, size in enumerate(reversed(self.tile), 1):
      physical[-back] = -(-physical[-back] // size) * size
    return math.prod(physical) * BITS.get(self.dtype, 0) // 8

  @property
  def hbm_bytes(self) -> int:
    return self.padded_bytes if self.space == 0 else 0

  @property
  def physical(self) -> tuple[int, ...]:
    """Sizes from major to minor without the ones; a transpose changes them."""
    return tuple(
        i for i in reversed(self.order) if self.dims[i] > 1)


def parse_arrays(text: str) -> tuple[Array, ...]:
  """Parses the arrays of a shape in order; a tuple has several."""
  return tuple(
      Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d),
            *_parse_layout(layout))
      for dtype, dims, layout in _ARRAY.findall(text))


@functools.cache
def _parse_layout(text: str) -> tuple[tuple[int, ...], tuple[int, ...], int]:
  """Parses `1,0:T(8,128)(2,1)S(1)`: order, first tile, memory space."""
  numbers = lambda s: tuple(int(x) for x in s.split(",") if x)
  order, _, rest = text.partition(":")
  tile = re.search(r"T\(([\d,]*)\)", rest)
  space = re.search(r"S\((\d+)\)", rest)
  return (numbers(order), numbers(tile[1]) if tile else (),
          int(space[1]) if space else 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    arrays: of the result.
    operands: names in the same computation; of a constant, its text.
    attributes: the rest of the line.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str

  @property
  def array(self) -> Array:
    return self.arrays[0]

  def attribute(self, name: str) -> str:
    """Reads `name=VALUE` up to the next comma outside of braces, or ""."""
    start = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
    return self.attributes[
        start.end():_end(self.attributes, start.end(), ",")] if start else ""

  @property
  def called(self) -> str:
    """The computation that a fusion, call or loop runs, or ""."""
    found = map(self.attribute, ("calls", "to_apply", "body"))
    return next(filter(None, found), "").lstrip("%")

  @property
  def op_name(self) -> str:
    """Name of the traced operation that it comes from."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def index(self) -> int:
    return int(self.attribute("index"))


@dataclasses.dataclass
class Computation:
  name: str
  instructions: dict[str, Instruction] = dataclasses.field(
      default_factory=dict)
  root: str = ""

  def __getitem__(self, name: str) -> Instruction:
    return self.instructions[name]

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  def operand(self, instruction: Instruction, index: int = 0) -> Instruction:
    return self.instructions[instruction.operands[index]]

  @functools.cached_property
  def parameters(self) -> list[Instruction]:
    """Parameters in order of their numbers."""
    found = [i for i in self if i.opcode == "parameter"]
    return sorted(found, key=lambda i: int(i.operands[0]))

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    for instruction in self:
      for operand in instruction.operands:
        found.setdefault(operand, []).append(instruction)
    return found


@dataclasses.dataclass(frozen=True)
class Module:
  computations: dict[str, Computation]
  entry: str

  def __getitem__(self, name: str) -> Computation:
    return self.computations[name]


def parse(text: str) -> Module:
  """Parses the module of `compiled.as_text()`.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, Computation] = {}
  current, entry = Computation(""), ""
  for line in _COMMENT.sub("", text).splitlines():
    head = _COMPUTATION.match(line)
    if head:
      current = computations[head[2]] = Computation(head[2])
      entry = head[2] if head[1] else entry
      continue
    found = _INSTRUCTION.match(line)
    if found:
      instruction = _instruction(found[2], found[3])
      current.instructions[instruction.name] = instruction
      current.root = instruction.name if found[1] else current.root
  if not entry:
    raise ValueError("The HLO text has no ENTRY computation.")
  return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
  tupled = text.startswith("(")
  end = _end(text, 1, ")") + 1 if tupled else text.index(" ")
  opcode = _OPCODE.match(text, end + 1)
  if opcode is None:
    raise ValueError(f"No opcode in the HLO instruction {name} = {text[:80]}")
  start = opcode.end()
  stop = _end(text, start, ")")
  inner = text[start:stop]
  constant = opcode[1] in ("constant", "parameter")
  return Instruction(
      name=name, opcode=opcode[1], arrays=parse_arrays(text[:end]),
      operands=(inner,) if constant else tuple(_NAME.findall(inner)),
      attributes=text[stop + 1:].lstrip(", "))


def _end(text: str, start: int, mark: str) -> int:
  """Finds the first `mark` behind `start` that is in no brackets."""
  depth = 0
  for i in range(start, len(text)):
    if depth == 0 and text[i] == mark:
      return i
    depth += _DEPTH.get(text[i], 0)
  if mark == ")":
    raise ValueError(f"A parenthesis is not closed in {text[:80]}")
  return len(text)
