"""Telemetry of a training stage: times, rates, goodput, hosts, traces.

Nothing here changes a number of the training.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from posttrain.telemetry import console, goodput, hardware, stragglers

# Parts of a step's time, as far as a stage has spans of these names.
PARTS = ("input_wait", "dispatch", "device_wait")
APART = ("checkpoint", "evaluation", "profile")  # No part of a step.


class Tracer:
  """Traces a range of steps, and writes the trace after the last one."""

  def __init__(
      self, directory: pathlib.Path, steps: Sequence[int], *,
      say: Callable[[str], None], write: bool = True):
    """Takes the range of steps.

    Args:
      directory: for the traces, each in a folder named by its time.
      steps: the first and the last step, or a single one; empty: none.
      say: takes a line for a person.
      write: false on all hosts but the first.
    """
    self._directory, self._say = directory, say
    steps = steps if write else ()
    self._first, self._last = (min(steps), max(steps)) if steps else (0, 0)
    self._active = False

  def before(self, step: int, latest: Any) -> None:
    """Starts the trace if the step is the first; a later resume starts none.

    Args:
      latest: results of the step before, which the devices may still compute.
    """
    if step == self._first:
      # JAX returns before the devices are done. Without this wait the trace
      # would begin with the rest of the step before.
      jax.block_until_ready(latest)
      jax.profiler.start_trace(self._directory)
      self._active = True

  def after(self, step: int, latest: Any) -> None:
    """Ends and writes the trace if the step is the last."""
    if self._active and step == self._last:
      # And without this one it would end before the last step.
      jax.block_until_ready(latest)
      self.close()

  def close(self) -> None:
    """Writes the trace as far as it is, if one is running."""
    if self._active:
      self._active = False
      jax.profiler.stop_trace()
      self._say(f"trace from step {self._first} on: "
                f"xprof --logdir={self._directory}")


class StageTelemetry:
  """Telemetry of one start of one stage; a context manager around it."""

  def __init__(
      self, name: str, directory: pathlib.Path, *,
      console: console.Console, profile_steps: Sequence[int] = (),
      is_writer: bool = True):
    """
    Args:
      name: the stage's.
      directory: the stage's; `goodput.json` and traces are written there.
      profile_steps: the first and the last step of a trace; empty: none.
      is_writer: false on all hosts but the first.
    """
    self._name, self._console = name, console
    self._ledger = goodput.Ledger(
        directory / "goodput.json", write=is_writer, warn=console.warning)
    self._tracer = Tracer(
        directory / "profile", profile_steps, say=console.line,
        write=is_writer)
    self._machine = hardware.find()
    self._hosts = stragglers.Stragglers(warn=console.warning)
    self._compared = goodput.compile_seconds()
    self._start_lap()

  def __enter__(self) -> "StageTelemetry":
    return self

  def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
    self._tracer.close()
    self._ledger.write()
    if error is None:
      self._hosts.end()
      self._console.line(f"{self._name}: {self._ledger.line()}")

  def begin(self, step: int) -> None:
    """Ends the set-up; the first step follows.

    Args:
      step: of the checkpoint that this start goes on from; 0 without one.
    """
    self._hosts.begin()
    self._ledger.begin(step)
    self._compared = goodput.compile_seconds()
    self._start_lap()

  @contextlib.contextmanager
  def step(self, number: int, latest: Callable[[], Any]) -> Iterator[None]:
    """Surrounds a step, which is traced if the config says so.

    Args:
      latest: gives the newest arrays that the devices make.
    """
    with self._ledger.span("profile"):
      self._tracer.before(number, latest())
    with jax.profiler.StepTraceAnnotation(self._name, step_num=number):
      yield
    with self._ledger.span("profile"):
      self._tracer.after(number, latest())

  def span(self, name: str) -> contextlib.AbstractContextManager[None]:
    """Measures a part of the time: one of `PARTS`, or of `goodput.NAMES`."""
    return self._ledger.span(name)

  @contextlib.contextmanager
  def saving(self, step: int) -> Iterator[None]:
    """Surrounds the save of a checkpoint."""
    with self._ledger.span("checkpoint"):
      yield
    self._ledger.mark(step)

  def lap(self, steps: int) -> dict[str, float]:
    """Seconds per step since the last lap, without what is `APART`."""
    spans, compiled = self._ledger.spans, goodput.compile_seconds()
    took = {name: spans.get(name, 0.0) - self._spans.get(name, 0.0)
            for name in (*PARTS, *APART) if name in spans or name in APART}
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

  def compare_hosts(self) -> dict[str, float]:
    """`Stragglers.compare`; every host calls it after the same step."""
    compiled = goodput.compile_seconds()
    found = self._hosts.compare(apart=compiled - self._compared)
    self._compared = compiled
    return found

  def _start_lap(self) -> None:
    self._since, self._compiled = time.monotonic(), goodput.compile_seconds()
    self._spans = dict(self._ledger.spans)
