"""Profiling: an XProf trace of some steps, on host and devices, by operation.

  pip install xprof && xprof --logdir=WORKDIR/STAGE/profile

shows it. Process 0 traces its own devices, since under one program the others
do the same. Before the first step and after the last the devices finish their
queues, so that a trace holds exactly these steps.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax


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
