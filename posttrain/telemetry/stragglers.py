"""Finds stragglers and lost hosts.

Hosts that share a program wait for each other within it, so all of their steps
take as long as those of the slowest. What differs is a host's own time: that
in which it did not wait for devices (`sharding.waited`). At `log_every` the
own times are gathered, and a host is named whose own time is more than
`FACTOR` times the median host's, if the others lost at least `LEAST` of the
time and a second to it. A chip that is slow by itself does not show here: all
hosts wait for it alike; a trace of a step does (`profile.steps`).

On the line between the processes (`line.py`) each says every few seconds that
it is there, and whether it waits. Process 0 warns of one that it has not heard
of for `line.SILENT` seconds, and of one that does not wait while all others
have for `STUCK` seconds: it hangs, and will reach no `log_every`. A thread of
each also measures for how long the whole process stood still.
"""

import threading
import time
from collections.abc import Callable

import numpy as np

from posttrain import host_connections, sharding

FACTOR = 2.0
LEAST = 0.1
STUCK = 60.0


def slow_hosts(
    own: np.ndarray, wall: float) -> list[tuple[int, float, float]]:
  """Processes that hold the others up; see the module's text.

  Args:
    own: [N] seconds of each process's own time.
    wall: seconds that they are a part of.

  Returns:
    Of each such process its number, its seconds and the median's.
  """
  # With two hosts that is the faster one.
  median = float(np.sort(own)[(len(own) - 1) // 2])
  return [
      (int(i), float(own[i]), median) for i in np.argsort(-own)
      if own[i] > FACTOR * median and own[i] - median > max(LEAST * wall, 1.0)]


def stuck_hosts(waits: dict[int, float]) -> list[int]:
  """Processes that all others wait for.

  Args:
    waits: seconds that each has waited by now, 0 if it does not wait.
  """
  busy = [process for process, seconds in waits.items() if not seconds]
  others = [seconds for seconds in waits.values() if seconds]
  return busy if others and min(others) >= STUCK else []


class Hosts:
  """The hosts of a run; does nothing in a run of one process."""

  def __init__(self, warn: Callable[[str], None]):
    """
    Args:
      warn: takes a line for a person; from a thread too.
    """
    self._warn = warn
    self._line = host_connections.current()
    self._stopped = threading.Event()
    self._stalled = 0.0
    self._silent: set[int] = set()
    self._stuck: set[int] = set()
    self.restart()

  def begin(self) -> None:
    """Says who is who, and starts the thread."""
    if self._line is not None:
      threading.Thread(
          target=self._watch, args=(self._line,), daemon=True).start()
    self.restart()

  def end(self) -> None:
    self._stopped.set()

  def restart(self) -> None:
    """What comes next is compared; what came before is not."""
    self._since = time.monotonic()
    self._waited, self._was_stalled = sharding.waited(), self._stalled

  def compare(self, *, apart: float = 0.0) -> dict[str, float]:
    """Gathers all hosts' own times since the last call; warns of the slow.

    All hosts call this together.

    Args:
      apart: seconds that are no host's own time, such as compiling.

    Returns:
      Seconds of the slowest and the median host, as metrics; none alone.
    """
    if self._line is None:
      return {}
    wall = time.monotonic() - self._since
    own = max(
        wall - apart - (sharding.waited() - self._waited),
        self._stalled - self._was_stalled)
    found = sharding.of_all_hosts(np.array([own], np.float32))
    times = np.asarray(found, np.float64).ravel()
    for process, seconds, median in slow_hosts(times, wall):
      self._warn(
          f"{self._line.name(process)} holds the others up: {seconds:.1f} s of "
          f"its own in the last {wall:.1f} s, where the median host has "
          f"{median:.1f} s.")
    self.restart()
    return {"time/host_slowest": float(times.max()),
            "time/host_median": float(np.median(times))}

  def _watch(self, here: host_connections.Line) -> None:
    last = time.monotonic()
    while not self._stopped.wait(host_connections.PULSE):
      now = time.monotonic()
      late = now - last - host_connections.PULSE
      if late > 0.5:  # The whole process stood still.
        self._stalled += late
      last = now
      if here.number == 0:
        self.look(here.silences(), here.waiting(), here.name)

  def look(
      self, silences: dict[int, float], waits: dict[int, float],
      name: Callable[[int], str],
  ) -> None:
    """Warns of who has fallen silent or hangs, and of who is back.

    Args:
      silences: seconds since each other process was heard of.
      waits: seconds that each has waited by now, 0 if it does not wait.
      name: of a process.
    """
    silent = {process for process, seconds in silences.items()
              if seconds >= host_connections.SILENT}
    for process in sorted(silent - self._silent):
      self._warn(
          f"{name(process)} has not been heard of for "
          f"{host_connections.SILENT:.0f} s: it stands still or has lost "
          "its network. If it does not come back, "
          "all processes end, and the same command goes on from the last "
          "checkpoint.")
    for process in sorted(self._silent - silent):
      self._warn(f"{name(process)} is back.")
    self._silent = silent
    stuck = set(stuck_hosts({
        process: seconds for process, seconds in waits.items()
        if process not in silent}))
    for process in sorted(stuck - self._stuck):
      self._warn(
          f"all others have waited for {name(process)} for {STUCK:.0f} s: "
          "it hangs, or works alone.")
    self._stuck = stuck
