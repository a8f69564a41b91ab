"""Which host holds the others up, and which one is gone.

Hosts that share a program wait for each other within it, so all of their steps
take as long as those of the slowest. What differs is a host's own time: that
in which it did not wait for devices (`sharding.waited`). At `log_every` the
own times are gathered, and a host is named whose own time is more than
`FACTOR` times the median host's, if the others lost at least `LEAST` of the
time and a second to it. A chip that is slow by itself does not show here: all
hosts wait for it alike; a trace of a step does (`profile.steps`).

A thread of each host says every `PULSE` seconds that it is there, and whether
it waits, in the store of JAX's coordinator. Process 0 names a host that it has
not heard of for `SILENT` seconds, and one that does not wait while all others
have for `STUCK` seconds: it hangs, and will reach no `log_every`. JAX itself
ends all processes when one has been silent for 100; its message has the number
of the lost process and not its host. If process 0 is lost, with the
coordinator, JAX ends the others at once, and says that the leader died: whose
host that is, each process says when it begins. The thread also measures for
how long the whole process stood still.
"""

import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # The store has no public name.

from posttrain import sharding

FACTOR = 2.0
LEAST = 0.1
PULSE = 5.0
SILENT = 20.0
STUCK = 60.0
STORE = "posttrain/alive/"


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


class Silence:
  """Who has not been heard of, from values that hosts keep changing."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self._last: dict[int, tuple[str, float]] = {}
    self.lost: set[int] = set()

  def update(self, values: dict[int, str]) -> tuple[list[int], list[int]]:
    """Takes what is in the store now; who fell silent, and who is back."""
    now = self._clock()
    for host, value in values.items():
      if host not in self._last or self._last[host][0] != value:
        self._last[host] = (value, now)
    silent = {host for host, (_, heard) in self._last.items()
              if now - heard >= SILENT}
    fell, back = sorted(silent - self.lost), sorted(self.lost - silent)
    self.lost = silent
    return fell, back


class Hosts:
  """The hosts of a run; does nothing in a run of one process."""

  def __init__(self, warn: Callable[[str], None]):
    """
    Args:
      warn: takes a line for a person; from a thread too.
    """
    self._warn = warn
    self._alone = jax.process_count() == 1
    self._stopped = threading.Event()
    self._stalled = 0.0
    self._silence = Silence()
    self._stuck: list[int] = []
    self._names: dict[int, str] = {}
    self.restart()

  def begin(self) -> None:
    """Says who is who, and starts the thread."""
    if self._alone:
      return
    self._names = _names()
    me = jax.process_index()
    if me:
      print(f"{self.name(me)} of {jax.process_count()}; the coordinator is "
            f"{self.name(0)}", file=sys.stderr, flush=True)
    threading.Thread(target=self._pulse, daemon=True).start()
    self.restart()

  def end(self) -> None:
    self._stopped.set()

  def name(self, process: int) -> str:
    return f"process {process} ({self._names[process]})"

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
    if self._alone:
      return {}
    wall = time.monotonic() - self._since
    own = max(
        wall - apart - (sharding.waited() - self._waited),
        self._stalled - self._was_stalled)
    found = sharding.of_all_hosts(np.array([own], np.float32))
    times = np.asarray(found, np.float64).ravel()
    for process, seconds, median in slow_hosts(times, wall):
      self._warn(
          f"{self.name(process)} holds the others up: {seconds:.1f} s of its "
          f"own in the last {wall:.1f} s, where the median host has "
          f"{median:.1f} s.")
    self.restart()
    return {"time/host_slowest": float(times.max()),
            "time/host_median": float(np.median(times))}

  def _pulse(self) -> None:
    client: Any = distributed.global_state.client
    me = jax.process_index()
    beat, last = 0, time.monotonic()
    while not self._stopped.wait(PULSE):
      now = time.monotonic()
      late = now - last - PULSE
      if late > 0.5:  # The whole process stood still.
        self._stalled += late
      last = now
      try:
        beat += 1
        client.key_value_set(
            f"{STORE}{me}", f"{beat} {sharding.waits()}", allow_overwrite=True)
        if me == 0:
          self._listen(client)
      except Exception:  # The coordinator is gone: JAX says so, and ends us.
        return

  def _listen(self, client: Any) -> None:
    values = {int(key.rpartition("/")[2]): value
              for key, value in client.key_value_dir_get(STORE)}
    fell, back = self._silence.update(values)
    for process in fell:
      self._warn(
          f"{self.name(process)} has not been heard of for {SILENT:.0f} s: it "
          "is dead, stands still or has lost its network. If it does not come "
          "back, JAX ends all processes, and the same command goes on from the "
          "last checkpoint.")
    for process in back:
      self._warn(f"{self.name(process)} is back.")
    stuck = stuck_hosts({
        process: float(value.partition(" ")[2])
        for process, value in values.items()
        if process not in self._silence.lost})
    for process in set(stuck) - set(self._stuck):
      self._warn(
          f"all others have waited for {self.name(process)} for {STUCK:.0f} s: "
          "it hangs, or works alone.")
    self._stuck = stuck


def _names() -> dict[int, str]:
  """The host of each process."""
  name = np.zeros(64, np.uint8)
  text = socket.gethostname().encode()[:64]
  name[:len(text)] = np.frombuffer(text, np.uint8)
  found = sharding.of_all_hosts(name)
  return {i: row[row > 0].astype(np.uint8).tobytes().decode(errors="replace")
          for i, row in enumerate(found)}
