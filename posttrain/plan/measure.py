"""Compiles a program for a slice, and measures the result.

A compilation for chips elsewhere cannot be cached: jax writes the persistent
cache and cannot read it back.
"""

import dataclasses
import re
import time
from collections.abc import Collection
from typing import Any

import jax

from posttrain.plan import dots, hlo, kernels, roofline, traffic, transposes
from posttrain.plan import walk as walk_lib
from posttrain.programs.program import Program, shard_bytes
from posttrain.telemetry.chips import Chip


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    arguments: of the program's arrays, by their shapes alone.
    padded_arguments: the same as the compiler lays them out, in whole tiles;
      None where it did not compile.
    temporaries: of the compiler; None where it did not compile.
    peak: of the program, its arguments included; of one that was too large,
      what the compiler said that it needs.
    beside: what else is on the device meanwhile, by its shapes.
    available: what the device has.
  """

  arguments: int
  padded_arguments: int | None
  temporaries: int | None
  peak: int
  beside: dict[str, int]
  available: int

  @property
  def total(self) -> int:
    return self.peak + sum(self.beside.values())

  @property
  def fits(self) -> bool:
    return self.total <= self.available


@dataclasses.dataclass(frozen=True)
class Counts:
  """Work of one device in one run, counted in the HLO.

  Attributes:
    dot_flops: of matrix products, loops multiplied out; those of one row too,
      which the vector unit does.
    passes_flops: the same, times the passes that each takes.
    kernel_flops: of attention and of products by expert, counted by hand
      from their shapes.
    uncounted: kernels of other kinds, which are in no figure.
    hbm_bytes: between memory and core, with the padding of tiles.
  """

  dot_flops: int
  passes_flops: int
  kernel_flops: int
  uncounted: list[str]
  hbm_bytes: int
  collectives: list[traffic.Collective]
  transposes: list[transposes.Transpose]


@dataclasses.dataclass(frozen=True)
class Result:
  """One program on one slice.

  Attributes:
    seconds: that compiling took, tracing included.
    same_as: the name of a program that is the same and was compiled instead.
    error: the compiler's, where the program is too large.
  """

  program: Program
  memory: Memory
  counts: Counts | None
  times: roofline.Times | None
  seconds: float
  same_as: str = ""
  error: str = ""

  @property
  def name(self) -> str:
    return self.program.name

  @property
  def fits(self) -> bool:
    return self.counts is not None and self.memory.fits


class Compiler:
  """Compiles for one mesh; a program that it has seen before is free."""

  def __init__(
      self, chip: Chip, layout: traffic.Layout,
      weights: Collection[tuple[int, ...]], experts: int = 0):
    """Makes a compiler.

    Args:
      weights: shapes of weight gradients, see `transposes.beside_gradients`.
      experts: of the model.
    """
    self._experts = experts
    self._chip, self._layout, self._weights = chip, layout, weights
    self._seen: dict[int, Result] = {}

  def measure(self, program: Program) -> Result:
    """Compiles a program on the current mesh.

    Raises:
      JaxRuntimeError: the compiler failed, and not for want of memory.
    """
    started = time.monotonic()
    lowered = program.lower()
    key = hash((program.unknown_trips, lowered.as_text()))
    memory = Memory(
        arguments=shard_bytes(program.arguments), padded_arguments=None,
        temporaries=None, peak=0, available=self._chip.hbm_bytes, beside={
            name: shard_bytes(tree) for name, tree in program.beside.items()})
    if key in self._seen:
      first = self._seen[key]
      return dataclasses.replace(
          first, program=program, seconds=0.0, same_as=first.name,
          memory=dataclasses.replace(first.memory, beside=memory.beside))
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      needed = needed_bytes(str(error))
      if needed is None:
        raise
      result = Result(
          program, dataclasses.replace(memory, peak=needed), None, None,
          time.monotonic() - started, error=str(error).splitlines()[0])
    else:
      result = self._read(program, memory, compiled, started)
    self._seen[key] = result
    return result

  def _read(
      self, program: Program, memory: Memory, compiled: Any, started: float,
  ) -> Result:
    seconds, chip = time.monotonic() - started, self._chip
    stats = compiled.memory_analysis()
    counts = count(
        compiled.as_text(), self._layout, self._weights,
        program.unknown_trips, experts=self._experts)
    sent = lambda across: sum(
        each.wire_bytes for each in counts.collectives
        if each.across_slices == across)
    return Result(
        program, dataclasses.replace(
            memory, padded_arguments=stats.argument_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            peak=stats.peak_memory_in_bytes),
        counts, roofline.Times(
            matrix=(counts.passes_flops + counts.kernel_flops) / chip.flops,
            memory=counts.hbm_bytes / chip.hbm_rate,
            ici=sent(False) / chip.axis_rate, dcn=sent(True) / chip.dcn_rate),
        seconds)


def count(
    text: str, layout: traffic.Layout,
    weights: Collection[tuple[int, ...]], unknown_trips: int | None, *,
    experts: int = 0,
) -> Counts:
  """Counts the work of a compiled program's HLO on one device."""
  visits = list(walk_lib.walk(hlo.parse(text), unknown_trips))
  dot_flops = passes_flops = kernel_flops = 0
  uncounted = []
  for visit in visits:
    computation, instruction = visit.scope.computation, visit.instruction
    flops = visit.times * dots.flops(computation, instruction)
    if flops:
      dot_flops += flops
      passes_flops += flops * dots.passes(computation, instruction)
    of_kernel = kernels.flops(computation, instruction, experts)
    if of_kernel is None:
      uncounted.append(instruction.name)
    kernel_flops += visit.times * (of_kernel or 0)
  return Counts(
      dot_flops=dot_flops, passes_flops=passes_flops,
      kernel_flops=kernel_flops, uncounted=uncounted,
      hbm_bytes=traffic.hbm_bytes(visits),
      collectives=traffic.collect(visits, layout),
      transposes=transposes.beside_gradients(visits, weights))


# As XLA prints a size, and where the compiler says what a program needs.
_SIZE = r"([\d.]+)([KMGTPE]?)(?:i?B)?"
_NEEDED = (rf"\({_SIZE}\) exceeds available", rf"Used {_SIZE} of \S+ hbm")


def needed_bytes(message: str) -> int | None:
  """Reads the needed bytes of an out-of-memory message; None of another."""
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  for pattern in _NEEDED:
    found = re.search(pattern, message)
    if found:
      power = "KMGTPE".find(found[2]) + 1 if found[2] else 0
      return int(float(found[1]) * 2**(10 * power))
  return None
