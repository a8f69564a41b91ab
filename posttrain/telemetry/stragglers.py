"""Finds stragglers, and hosts that hang or are lost.

Hosts that share a program wait for each other within it, so all of their steps
take as long as those of the slowest. They differ in their own time, in which
they do not wait for devices (`sharding.waited`). At `log_every` the own times
are gathered. A host is named a straggler if its own time is more than `FACTOR`
times the median host's, and the others lost at least `LEAST` of the time and a
second to it. A chip that is slow by itself does not show here, since all hosts
wait for it alike; a trace of a step shows it (`profile.steps`).

Over the connections between processes (`host_connections`) each sends a sign of
life every few seconds, with the seconds that it has waited. Process 0 warns of
a process that was silent for `host_connections.SILENT` seconds. It also warns
of one that does not wait while all others have waited for `STUCK` seconds: it
hangs, and will reach no `log_every`. A thread of each process also measures for
how long the whole process was stopped.
"""

import threading
import time
from collections.abc import Callable

import numpy as np

from posttrain import host_connections, sharding

FACTOR = 2.0  # A straggler's own time over the median host's.
LEAST = 0.1  # Share of the wall time that the others lose to it.
STUCK = 60.0  # Seconds.


def slow_hosts(
    own: np.ndarray, wall: float) -> list[tuple[int, float, float]]:
  """Finds stragglers: processes that hold the others up.

  Args:
    own: [N] seconds of each process's own time.
    wall: seconds of wall time in which they were measured.

  Returns:
    For each straggler its number, its seconds and the median's; slowest first.
  """
  # The lower median: with two hosts it is the faster one, so that the slower
  # one can be found at all.
  median = float(np.sort(own)[(len(own) - 1) // 2])
  return [
      (int(i), float(own[i]), median) for i in np.argsort(-own)
      if own[i] > FACTOR * median and own[i] - median > max(LEAST * wall, 1.0)]


def stuck_hosts(waits: dict[int, float]) -> list[int]:
  """Finds processes that all others wait for.

  Args:
    waits: seconds that each process has waited by now, 0 if it does not wait.
  """
  busy = [process for process, seconds in waits.items() if not seconds]
  others = [seconds for seconds in waits.values() if seconds]
  return busy if others and min(others) >= STUCK else []


class Stragglers:
  """Compares the hosts of a run; does nothing in a run of one process."""

  def __init__(self, warn: Callable[[str], None]):
    """Begins to measure.

    Args:
      warn: takes a line for a person; it is called from a thread too.
    """
    self._warn = warn
    self._connections = host_connections.current()
    self._stopped = threading.Event()
    self._stalled = 0.0
    self._silent: set[int] = set()
    self._stuck: set[int] = set()
    self.restart()

  def begin(self) -> None:
    """Starts the thread that measures stalls and warns of silent hosts."""
    if self._connections is not None:
      threading.Thread(
          target=self._watch, args=(self._connections,), daemon=True).start()
    self.restart()

  def end(self) -> None:
    self._stopped.set()

  def restart(self) -> None:
    """Begins a new interval: time before this call is not compared."""
    self._since = time.monotonic()
    self._waited, self._was_stalled = sharding.waited(), self._stalled

  def compare(self, *, apart: float = 0.0) -> dict[str, float]:
    """Gathers all hosts' own times since the last call; warns of the slow.

    All hosts call this together.

    Args:
      apart: seconds that count as no host's own time, such as compiling.

    Returns:
      Seconds of the slowest and the median host, as metrics; empty in a run of
      one process.
    """
    if self._connections is None:
      return {}
    wall = time.monotonic() - self._since
    # A process that was stopped within a wait for devices seems to have waited;
    # the stall that its thread measured is then the larger number.
    own = max(
        wall - apart - (sharding.waited() - self._waited),
        self._stalled - self._was_stalled)
    found = sharding.of_all_hosts(np.array([own], np.float32))
    times = np.asarray(found, np.float64).ravel()
    for process, seconds, median in slow_hosts(times, wall):
      self._warn(
          f"{self._connections.name(process)} holds the others up: "
          f"{seconds:.1f} s of its own in the last {wall:.1f} s, where the "
          f"median host has {median:.1f} s.")
    self.restart()
    return {"time/host_slowest": float(times.max()),
            "time/host_median": float(np.median(times))}

  def _watch(self, here: host_connections.Connections) -> None:
    last = time.monotonic()
    while not self._stopped.wait(host_connections.PULSE):
      now = time.monotonic()
      late = now - last - host_connections.PULSE
      # A thread that sleeps wakes late only if the whole process was stopped.
      if late > 0.5:
        self._stalled += late
      last = now
      if here.number == 0:
        self.check(here.silences(), here.waiting(), here.name)

  def check(
      self, silences: dict[int, float], waits: dict[int, float],
      name: Callable[[int], str],
  ) -> None:
    """Warns of processes that are silent or hang, and of those that are back.

    Args:
      silences: seconds since the last message of each other process.
      waits: seconds that each process has waited by now, 0 if it does not wait.
      name: names a process, by its number.
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
