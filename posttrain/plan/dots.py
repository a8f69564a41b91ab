"""FLOPs of matrix products, as a TPU's HLO has them: dots and convolutions.

A TPU's compiler writes a product as a convolution, and a batch dimension as a
spatial one that is padded and dilated so that each element meets its own.
Only pairs that really meet are counted. A product of one row, as of a decode
step with one sample on a device, it writes as a multiplication and a sum, for
the vector unit.
"""

import functools
import math
import re

import numpy as np

from posttrain.plan.hlo import Computation, Instruction

# Passes through the matrix unit, whose products are bfloat16: a float32
# product at the highest precision is made of six, at high of three.
PASSES = {"highest": 6, "high": 3}


def flops(computation: Computation, instruction: Instruction) -> int:
  """Counts two FLOPs per multiplication and addition; 0 for no product."""
  if instruction.opcode == "dot":
    left = computation.operand(instruction).array
    contracted = instruction.attribute("lhs_contracting_dims")
    return 2 * math.prod(instruction.array.dims) * math.prod(
        left.dims[int(d)] for d in re.findall(r"\d+", contracted))
  if instruction.opcode == "convolution":
    return _convolution(computation, instruction)
  if _is_product_of_one_row(computation, instruction):
    return 2 * math.prod(computation.operand(instruction).array.dims)
  return 0


def _is_product_of_one_row(
    computation: Computation, instruction: Instruction) -> bool:
  """Tests for a sum over a multiplication that was a traced `dot_general`."""
  if instruction.opcode != "reduce" or (
      instruction.op_name.rpartition("/")[2] != "dot_general"):
    return False
  summed = computation.operand(instruction)
  while summed.opcode in ("bitcast", "convert", "copy", "reshape"):
    summed = computation.operand(summed)
  return summed.opcode == "multiply"


def passes(computation: Computation, instruction: Instruction) -> int:
  """Counts the passes of the matrix unit for each product.

  One of the vector unit counts once: a bound that is lower than its time.
  """
  if instruction.opcode == "reduce":
    return 1
  dtypes = {
      computation.operand(instruction, i).array.dtype for i in (0, 1)}
  precision = instruction.attribute("operand_precision").strip("{}")
  if "f32" not in dtypes:
    return 1
  return max(PASSES.get(each, 1) for each in precision.split(","))


def _convolution(computation: Computation, instruction: Instruction) -> int:
  left = computation.operand(instruction, 0).array.dims
  right = computation.operand(instruction, 1).array.dims
  out = instruction.array.dims
  labels = re.fullmatch(
      r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels"))
  assert labels is not None, instruction
  size = lambda dims, names, label: dims[names.index(label)]
  window = instruction.attribute("window")
  pairs = 1
  for number in range(sum(label.isdigit() for label in labels[1])):
    label = str(number)
    pairs *= _pairs(
        size(left, labels[1], label), size(out, labels[3], label),
        *_window(window, number))
  groups = int(instruction.attribute("batch_group_count") or 1)
  return (2 * size(left, labels[1], "b") * size(right, labels[2], "i")
          * size(out, labels[3], "f") * pairs // groups)


def _window(text: str, number: int) -> list[int]:
  """Reads size, stride, low padding and dilations of a spatial dimension."""
  fields = dict(re.findall(r"(\w+)=([\w\-]+)", text))
  defaults = dict(size=1, stride=1, pad=0, lhs_dilate=1, rhs_dilate=1)
  return [  # Padding is written as `low_high`.
      int(fields[name].split("x")[number].partition("_")[0])
      if name in fields else default for name, default in defaults.items()]


@functools.cache
def _pairs(
    length: int, out: int, size: int, stride: int, low: int, dilated: int,
    spread: int,
) -> int:
  """Counts pairs of an output and a kernel position that meet a real input."""
  at = np.arange(out)[:, None] * stride + np.arange(size) * spread - low
  return int(np.sum((at >= 0) & (at % dilated == 0) & (at // dilated < length)))
