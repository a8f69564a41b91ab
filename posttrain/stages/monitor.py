"""Telemetry of a training stage: times, rates, goodput, hosts, traces.

Nothing here changes a number of the training.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from posttrain.stages.run_context import RunContext
from posttrain.telemetry import (
  compilation,
  goodput,
  hardware,
  stragglers,
  trace,
)

# Parts of a step's time, where the host runs ahead of the devices.
PARTS = ("input_wait", "dispatch", "device_wait")
APART = ("checkpoint", "evaluation", "profile")  # No part of a step.


class Monitor:
  """Telemetry of one start of one stage; a context manager around it."""

  def __init__(self, context: RunContext):
    writes, profile = context.workdir.is_writer, context.config.profile
    self._context = context
    self._ledger = goodput.Ledger(
        context.directory / "goodput.json", write=writes,
        warn=context.console.warning)
    chosen = not profile.stages or context.name in profile.stages
    self._tracer = trace.Tracer(
        context.directory / "profile", profile.steps if chosen else (),
        say=context.console.line, write=writes)
    self._machine = hardware.find()
    self._hosts = stragglers.Stragglers(warn=context.console.warning)
    self._compared = compilation.seconds()
    self._start_lap()

  def __enter__(self) -> "Monitor":
    return self

  def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
    self._tracer.close()
    self._ledger.write()
    if error is None:
      self._hosts.end()
      self._context.console.line(
          f"{self._context.name}: {self._ledger.line()}")

  def begin(self, step: int) -> None:
    """The first step follows; what came before was set-up.

    Args:
      step: of the checkpoint that this start goes on from; 0 without one.
    """
    self._hosts.begin()
    self._ledger.begin(step)
    self._compared = compilation.seconds()
    self._start_lap()

  @contextlib.contextmanager
  def step(self, number: int, latest: Callable[[], Any]) -> Iterator[None]:
    """Around a step, which is traced if the config says so.

    Args:
      latest: gives the newest arrays that the devices make.
    """
    with self._ledger.span("profile"):
      self._tracer.before(number, latest())
    with jax.profiler.StepTraceAnnotation(self._context.name, step_num=number):
      yield
    with self._ledger.span("profile"):
      self._tracer.after(number, latest())

  def span(self, name: str) -> contextlib.AbstractContextManager[None]:
    """Of `PARTS`, or `goodput.NAMES`."""
    return self._ledger.span(name)

  @contextlib.contextmanager
  def saving(self, step: int) -> Iterator[None]:
    """Around the save of a checkpoint."""
    with self._ledger.span("checkpoint"):
      yield
    self._ledger.mark(step)

  def lap(self, steps: int) -> dict[str, float]:
    """Seconds per step since the last lap, without what is `APART`."""
    spans, compiled = self._ledger.spans, compilation.seconds()
    took = {name: spans.get(name, 0.0) - self._spans.get(name, 0.0)
            for name in (*PARTS, *APART)}
    took["compile"] = compiled - self._compiled
    took["step"] = time.monotonic() - self._since - sum(
        took.pop(name) for name in APART)
    self._start_lap()
    return {f"time/{name}": seconds / steps for name, seconds in took.items()}

  def rates(
      self, *, flops: float, seconds: float, tokens: float | None = None,
  ) -> dict[str, float]:
    """`perf/*`, of all devices' model FLOPs and tokens in `seconds`."""
    self._ledger.tick()
    found = self._machine.mfu("perf/mfu", flops, seconds)
    if tokens is not None:
      found["perf/tokens_per_sec"] = tokens / seconds
      found["perf/tokens_per_sec_per_chip"] = (
          tokens / seconds / self._machine.chips)
    return found | hardware.memory_in_use() | {
        "perf/goodput": self._ledger.goodput()}

  def learn_mfu(self, flops: float, seconds: float) -> dict[str, float]:
    """`perf/learn_mfu`: of an update alone, without its rollouts."""
    return self._machine.mfu("perf/learn_mfu", flops, seconds)

  def compare_hosts(self) -> dict[str, float]:
    """`Stragglers.compare`; every host calls it after the same step."""
    compiled = compilation.seconds()
    found = self._hosts.compare(apart=compiled - self._compared)
    self._compared = compiled
    return found

  def _start_lap(self) -> None:
    self._since, self._compiled = time.monotonic(), compilation.seconds()
    self._spans = dict(self._ledger.spans)
