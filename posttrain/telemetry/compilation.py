"""Seconds that this process has spent compiling, as JAX reports them.

JAX tells when a trace, a lowering or a compilation has ended and how long it
took. These lie within each other where one jitted function calls another, so
the time is that of their union.
"""

import time

import jax.monitoring

PREFIX = "/jax/core/compile/"  # Tracing, lowering, XLA or its cache.


class Union:
  """The length of what intervals cover, told by their ends, in order."""

  def __init__(self) -> None:
    self.seconds = 0.0
    self._intervals: list[tuple[float, float]] = []  # Apart, in order.

  def add(self, start: float, end: float) -> None:
    """Takes the next: its end is not before any other's."""
    while self._intervals and self._intervals[-1][1] > start:
      before = self._intervals.pop()
      self.seconds -= before[1] - before[0]
      start = min(start, before[0])
    self._intervals.append((start, end))
    self.seconds += end - start


_union = Union()
_listening = False


def seconds() -> float:
  """So far, from the first call on."""
  global _listening
  if not _listening:
    _listening = True
    jax.monitoring.register_event_duration_secs_listener(_listen)
  return _union.seconds


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
  if event.startswith(PREFIX):
    now = time.monotonic()
    _union.add(now - duration_secs, now)
