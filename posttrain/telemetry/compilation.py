"""Compile time: seconds that this process has spent compiling.

JAX reports when a trace, a lowering or a compilation has ended and how long it
took. These intervals overlap where one jitted function calls another, so the
time is the length of their union.
"""

import time

import jax.monitoring

PREFIX = "/jax/core/compile/"  # Tracing, lowering, XLA or its cache.


class Union:
  """Length of the union of intervals, which come in the order of their ends."""

  def __init__(self) -> None:
    self.seconds = 0.0
    self._intervals: list[tuple[float, float]] = []  # Disjoint, in order.

  def add(self, start: float, end: float) -> None:
    """Adds an interval whose end is not before that of any earlier one."""
    while self._intervals and self._intervals[-1][1] > start:
      before = self._intervals.pop()
      self.seconds -= before[1] - before[0]
      start = min(start, before[0])
    self._intervals.append((start, end))
    self.seconds += end - start


_union = Union()
_listening = False


def seconds() -> float:
  """Returns the compile time since the first call of this function."""
  # JAX cannot remove a single listener, so it is registered once per process.
  global _listening
  if not _listening:
    _listening = True
    jax.monitoring.register_event_duration_secs_listener(_listen)
  return _union.seconds


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
  if event.startswith(PREFIX):
    now = time.monotonic()
    _union.add(now - duration_secs, now)
