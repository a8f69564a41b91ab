"""An XProf trace of some steps: what host and devices did, by the operation.

  pip install xprof && xprof --logdir=WORKDIR/STAGE/profile

shows it. Process 0 traces its own devices: under one program the others do
the same. Before the first step and after the last the devices finish what
they have, so that a trace holds these steps and no other.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax


class Tracer:
  """Writes the trace of a range of steps, once they are run."""

  def __init__(
      self, directory: pathlib.Path, steps: Sequence[int], *,
      say: Callable[[str], None], write: bool = True):
    """
    Args:
      directory: where traces go, each into a folder named by its time.
      steps: the first and the last, or one of both; empty: none.
      say: takes a line for a person.
      write: false on all hosts but the first.
    """
    self._directory, self._say = directory, say
    steps = steps if write else ()
    self._first, self._last = (min(steps), max(steps)) if steps else (0, 0)
    self._active = False

  def before(self, step: int, latest: Any) -> None:
    """Begins, if the step is the first; a run that resumes after it does not.

    Args:
      latest: arrays of the step before, which the devices may still make.
    """
    if step == self._first:
      jax.block_until_ready(latest)
      jax.profiler.start_trace(self._directory)
      self._active = True

  def after(self, step: int, latest: Any) -> None:
    """Ends and writes, if the step is the last."""
    if self._active and step == self._last:
      jax.block_until_ready(latest)
      self.close()

  def close(self) -> None:
    """Writes what was traced so far, if anything."""
    if self._active:
      self._active = False
      jax.profiler.stop_trace()
      self._say(f"trace from step {self._first} on: "
                f"xprof --logdir={self._directory}")
