"""Handle: a worker as its supervisor sees it."""

import collections
import contextlib
import dataclasses
import math
import os
import selectors
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Sequence

from posttrain.episodes import frames, processes, worker

IMPORT_SECONDS = 120.0
END_SECONDS = 0.5  # From a connection's end to that of the worker.
RUNNING = struct.Struct("<Q")  # One a worker: the job that it runs, or 0.


@dataclasses.dataclass(eq=False)
class Job:
  """Call that waits or runs; its frame goes to a worker as it came."""

  number: int
  name: bytes
  seconds: float
  data: bytes


@dataclasses.dataclass(eq=False)
class Handle:
  """Worker as its supervisor sees it.

  Attributes:
    slot: its place in the table of running jobs.
    channel: connection to it.
    pipe: descriptor of what its calls print.
    deadline: when the job that runs, or an import, is late; a clock's seconds.
    started: when that job was started.
    queue: jobs that were sent to it; the first one runs.
    names: of the functions that it is importing.
    output: the beginning of what the job that runs has printed.
    num_done: jobs that it has finished.
    ready: it has started.
    lost: its connection has ended.
    doomed: it was killed and only has to be reaped.
  """

  slot: int
  pid: int
  channel: frames.Channel
  pipe: int
  deadline: float
  started: float
  queue: collections.deque[Job] = dataclasses.field(
      default_factory=collections.deque)
  names: list[str] = dataclasses.field(default_factory=list)
  output: bytearray = dataclasses.field(default_factory=bytearray)
  num_done: int = 0
  ready: bool = False
  lost: bool = False
  doomed: bool = False

  @property
  def is_usable(self) -> bool:
    return not (self.lost or self.doomed)

  def start_clock(self) -> int:
    """Starts the clock of the first job; returns its number, or 0."""
    self.started = time.monotonic()
    self.deadline = self.started + (
        self.queue[0].seconds if self.queue else math.inf)
    return self.queue[0].number if self.queue else 0

  def drain(self, limit: int, most: int) -> bool:
    """Reads what was printed, in parts of 64 KiB.

    Args:
      limit: bytes of a job that are kept, its first ones.
      most: parts that are read.

    Returns:
      False if no process holds the other end.
    """
    for _ in range(most):
      try:
        part = os.read(self.pipe, 2**16)
      except BlockingIOError:
        break
      if not part:
        return False
      self.output += part[:max(0, limit - len(self.output))]
    return True

  def describe_end(self, status: int) -> str:
    """Says how it ended, from the status of `os.waitpid`."""
    if status == worker.CONNECTION_LOST << 8 or (
        self.lost and math.isinf(self.deadline)):
      return "lost its connection, which the call may have closed"
    return processes.describe_end(status)

  def deafen(self, selector: selectors.BaseSelector) -> None:
    """Stops listening to it."""
    for file in (self.channel.socket, self.pipe):
      with contextlib.suppress(KeyError):
        selector.unregister(file)

  def close(self) -> None:
    self.channel.close()
    os.close(self.pipe)


def fork(
    slot: int, *, memory_bytes: int, preload: Sequence[str],
    close: Callable[[], None]) -> Handle:
  """Forks a worker.

  Args:
    slot: its place in the table of running jobs.
    memory_bytes: its address space.
    preload: names of functions that it imports before its first job.
    close: is called in the worker; closes what the supervisor has open.
  """
  ours, theirs = socket.socketpair()
  read, write = os.pipe()
  pid = os.fork()
  if not pid:
    try:
      os.close(signal.set_wakeup_fd(-1))
      for number in (signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
      close()
      ours.close()
      os.close(read)
      worker.serve(theirs, write, memory_bytes=memory_bytes, preload=preload)
    except BaseException:
      traceback.print_exc()
    finally:
      os._exit(1)
  theirs.close()
  os.close(write)
  os.set_blocking(read, False)
  now = time.monotonic()
  return Handle(
      slot, pid, frames.Channel(ours, frames.MAX_RESULT + 2**10), read,
      deadline=now + IMPORT_SECONDS, started=now)
