"""Supervisor: forks workers, gives them jobs, keeps deadlines, kills.

It is a process of its own, with one thread and without JAX, started by
`posttrain.episodes.workers`. It stays small, so that a fork takes milliseconds.
Orphans of its workers become its children. When the pool closes its socket, or
is gone, it kills all that descends from it and exits.
"""

import collections
import contextlib
import dataclasses
import json
import mmap
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

from posttrain.episodes import frames, processes, worker
from posttrain.tasks import loading, scoring  # noqa: F401  Workers have them.

IMPORT_SECONDS = 120.0
QUICK_SECONDS = 0.005  # Calls faster than this are sent ahead.
AHEAD = 4
SLOW_SECONDS = 0.05  # A call behind one that takes longer may go elsewhere.
MAX_FAILED_STARTS = 5
LOST = "lost its connection, which the call may have closed"
END_SECONDS = 0.5  # From a connection's end to that of the worker.
RUNNING = struct.Struct("<Q")  # One a worker: the job that it runs, or 0.


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of the workers, as of `workers.Settings`."""

  num_workers: int
  memory_bytes: int
  output_bytes: int


@dataclasses.dataclass(eq=False)
class Job:
  """Call that waits or runs; its frame goes to a worker as it came."""

  number: int
  seconds: float
  data: bytes
  retried: bool = False


@dataclasses.dataclass(eq=False)
class Worker:
  """Worker as the supervisor sees it.

  Attributes:
    slot: its place in the table of running jobs.
    queue: jobs that were sent to it; the first one runs.
    deadline: when the job that runs, or an import, is too late.
    started: when that job was started.
    num_done: jobs that it has finished.
    quick: its last job took less than `QUICK_SECONDS`.
    ready: it has started.
    doomed: it was killed; it only has to be reaped.
    lost: the reason of its end, where this is known.
  """

  slot: int
  pid: int
  channel: frames.Channel
  pipe: int
  queue: collections.deque[Job]
  deadline: float
  started: float
  output: bytearray = dataclasses.field(default_factory=bytearray)
  num_done: int = 0
  importing: bool = True
  quick: bool = False
  ready: bool = False
  doomed: bool = False
  lost: str = ""


class Supervisor:
  """Loop of the process; see the module's text."""

  def __init__(
      self, sock: socket.socket, running: mmap.mmap, settings: Settings):
    self.pool = frames.Channel(sock, 2 * frames.MAX_JOB)
    self.running = running
    self.settings = settings
    self.selector = selectors.DefaultSelector()
    self.jobs: dict[int, Job] = {}
    self.waiting: collections.deque[Job] = collections.deque()
    self.workers: dict[int, Worker] = {}
    self.preload: dict[str, None] = {}
    self.failed_starts = 0
    self.parent = os.getppid()
    self.orphans = False  # There may be some.
    self.wakeup, write = os.pipe()
    for end in (self.wakeup, write):
      os.set_blocking(end, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      signal.signal(number, lambda *_: None)
    processes.adopt_orphans()
    self.selector.register(sock, selectors.EVENT_READ, "pool")
    self.selector.register(self.wakeup, selectors.EVENT_READ, "wakeup")

  def run(self) -> None:
    """Works until the pool is gone."""
    for slot in range(self.settings.num_workers):
      self._fork(slot)
    while not self.pool.closed and os.getppid() == self.parent:
      self._watch_writes()
      found = self.selector.select(self._timeout())
      # Jobs that have ended before output: what comes behind is the next one's.
      for key, events in sorted(found, key=lambda item: item[0].data == "pipe"):
        self._handle(key, events)
      self._expire()
      self._reap()
      self._dispatch()

  def close(self) -> None:
    """Kills all descendants, and waits until they are gone."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
      for pid in [*self.workers, *processes.descendants(os.getpid())]:
        processes.kill(pid)
      try:
        while os.waitpid(-1, os.WNOHANG)[0]:
          pass
      except ChildProcessError:
        return
      time.sleep(0.002)

  # Events.

  def _handle(self, key: selectors.SelectorKey, events: int) -> None:
    if key.data == "pool":
      self._hear_pool(events)
    elif key.data == "wakeup":
      os.read(self.wakeup, 4096)
    else:
      found = self.workers.get(key.data if isinstance(key.data, int) else
                               self._owner(key.fd))
      if found and not found.doomed:
        if isinstance(key.data, int):
          self._hear(found, events)
        else:
          self._drain(found)

  def _owner(self, pipe: int) -> int:
    return next((pid for pid, found in self.workers.items()
                 if found.pipe == pipe), 0)

  def _hear_pool(self, events: int) -> None:
    if events & selectors.EVENT_WRITE:
      self.pool.flush()
    if events & selectors.EVENT_READ:
      for frame in self.pool.receive():
        if frame.kind == frames.JOB:
          job = Job(frame.number, frame.seconds, frames.encode(frame))
          self.jobs[job.number] = job
          self.waiting.append(job)
        elif frame.kind == frames.CANCEL:
          self._cancel()
        else:
          self.pool.send(frames.encode(frames.Frame(frames.PONG)))

  def _hear(self, found: Worker, events: int) -> None:
    if events & selectors.EVENT_WRITE:
      found.channel.flush()
    if events & selectors.EVENT_READ:
      for frame in found.channel.receive():
        self._answer(found, frame)
    if found.channel.closed and not found.doomed:
      # It is about to end, and its status says more; or the call has closed
      # the connection.
      found.lost = LOST
      found.deadline = min(
          found.deadline, time.monotonic() + END_SECONDS)
      self._deafen(found)

  def _answer(self, found: Worker, frame: frames.Frame) -> None:
    """Takes in a frame of a worker."""
    if found.doomed:
      return
    job, now = found.queue[0] if found.queue else None, time.monotonic()
    if frame.kind == frames.READY:
      self.failed_starts, found.ready = 0, True
      self._drain(found)
      found.output = bytearray()
      self._start(found)
    elif job is None or frame.number != job.number:
      found.channel.closed = True  # Nobody asked.
    elif frame.kind == frames.IMPORT:
      found.importing, found.deadline = True, now + IMPORT_SECONDS
      self.preload.update(dict.fromkeys(json.loads(frame.body)[:64]))
    elif frame.kind == frames.START:
      self._start(found)
    else:
      found.num_done += 1
      found.quick = frame.seconds < QUICK_SECONDS
      self._finish(job, frame.body, frame.seconds, found.output)
      self._next(found)
      if frame.kind == frames.LAST:
        self._retire(found)

  def _drain(self, found: Worker) -> None:
    """Reads what was printed; keeps the first bytes of each job."""
    for _ in range(16):
      try:
        part = os.read(found.pipe, 2**16)
      except BlockingIOError:
        return
      if not part:  # Every process has closed it.
        with contextlib.suppress(KeyError):
          self.selector.unregister(found.pipe)
        return
      room = self.settings.output_bytes - len(found.output)
      found.output += part[:max(0, room)]

  # Jobs.

  def _dispatch(self) -> None:
    """Gives jobs to workers: one to each idle one, then ahead."""
    ready = [found for found in self.workers.values() if not found.doomed]
    for depth in range(AHEAD):
      for found in ready:
        if len(found.queue) == depth and (
            depth == 0 or (found.quick and found.num_done)):
          job = self._take(found)
          if job is not None:
            self._send(found, job)

  def _take(self, found: Worker) -> Job | None:
    """Takes a job that waits; else, if idle, one stuck behind a slow one."""
    while self.waiting:
      job = self.waiting.popleft()
      if job.number in self.jobs:
        return job
    if not found.queue:
      late = time.monotonic() - SLOW_SECONDS
      for other in self.workers.values():
        if other.started < late and not other.doomed:
          for job in list(other.queue)[1:]:
            if job.number in self.jobs and not self._elsewhere(job, other):
              return job
    return None

  def _elsewhere(self, job: Job, found: Worker) -> bool:
    return any(job in other.queue for other in self.workers.values()
               if other is not found)

  def _send(self, found: Worker, job: Job) -> None:
    found.queue.append(job)
    found.channel.send(job.data)
    if len(found.queue) == 1 and found.ready:
      self._start(found)

  def _start(self, found: Worker) -> None:
    """Starts the clock of a worker's first job."""
    found.started, found.importing = time.monotonic(), False
    if found.queue:
      found.deadline = found.started + found.queue[0].seconds
      RUNNING.pack_into(self.running, found.slot * RUNNING.size,
                        found.queue[0].number)
    else:
      found.deadline = float("inf")
      RUNNING.pack_into(self.running, found.slot * RUNNING.size, 0)

  def _next(self, found: Worker) -> None:
    found.queue.popleft()
    found.output = bytearray()
    self._start(found)

  def _finish(
      self, job: Job, body: bytes, seconds: float, output: bytearray) -> None:
    """Sends a result; the first one of a job counts."""
    if self.jobs.pop(job.number, None):
      self.pool.send(frames.encode(frames.Frame(
          frames.DONE, job.number, seconds, bytes(output), body)))

  def _fail(self, found: Worker, job: Job, status: str, reason: str) -> None:
    self._finish(
        job, json.dumps([status, None, reason]).encode(),
        time.monotonic() - found.started, found.output)

  def _expire(self) -> None:
    """Ends the jobs that are too late, and their workers."""
    now = time.monotonic()
    for found in list(self.workers.values()):
      if found.doomed or now < found.deadline:
        continue
      if found.lost:
        processes.kill(found.pid)
        found.deadline = float("inf")
        continue
      if found.ready and found.queue:
        self._drain(found)
        reason = (f"importing took more than {IMPORT_SECONDS:g} s"
                  if found.importing else
                  f"more than {found.queue[0].seconds:g} s")
        self._fail(found, found.queue.popleft(), "timeout", reason)
      self._retire(found)

  def _cancel(self) -> None:
    self.jobs.clear()
    self.waiting.clear()
    for found in list(self.workers.values()):
      if found.queue:
        found.queue.clear()
        self._retire(found)

  # Workers.

  def _fork(self, slot: int, first: Job | None = None) -> None:
    """Forks a worker; `first` is the job that it starts with."""
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
      signal.set_wakeup_fd(-1)
      signal.signal(signal.SIGCHLD, signal.SIG_DFL)
      signal.signal(signal.SIGHUP, signal.SIG_DFL)
      self._close_all(ours, read)
      worker.serve(
          theirs, write, memory_bytes=self.settings.memory_bytes,
          preload=list(self.preload))
    theirs.close()
    os.close(write)
    os.set_blocking(read, False)
    now = time.monotonic()
    found = Worker(
        slot, pid, frames.Channel(ours, frames.MAX_RESULT + 1024), read,
        collections.deque(), now + IMPORT_SECONDS, now)
    self.workers[pid] = found
    self.selector.register(ours, selectors.EVENT_READ, pid)
    self.selector.register(read, selectors.EVENT_READ, "pipe")
    if first is not None:
      self._send(found, first)

  def _close_all(self, ours: socket.socket, read: int) -> None:
    """Closes, in a child, what belongs to the supervisor."""
    self.selector.close()
    self.pool.close()
    self.running.close()
    for found in self.workers.values():
      found.channel.close()
      os.close(found.pipe)
    ours.close()
    os.close(read)
    os.close(self.wakeup)

  def _retire(self, found: Worker) -> None:
    """Kills a worker; what was sent to it ahead waits again."""
    found.doomed = True
    RUNNING.pack_into(self.running, found.slot * RUNNING.size, 0)
    if not found.ready:
      self._failed_start()
    self._again(found.queue)
    self._deafen(found)
    processes.kill(found.pid)

  def _again(self, jobs: Iterable[Job]) -> None:
    for job in reversed(list(jobs)):
      held = any(job in other.queue for other in self.workers.values()
                 if not other.doomed)
      if job.number in self.jobs and not held:
        self.waiting.appendleft(job)

  def _reap(self) -> None:
    """Replaces workers that have ended, and kills the orphans they left."""
    while True:
      try:
        pid, status = os.waitpid(-1, os.WNOHANG)
      except ChildProcessError:
        break
      if not pid:
        break
      self.orphans = True
      found = self.workers.get(pid)
      if found:
        self._ended(found, status)
    if self.orphans:
      theirs = set(processes.descendants(os.getpid()))
      for pid in self.workers:
        theirs -= {pid, *processes.descendants(pid)}
      for pid in theirs:
        processes.kill(pid)
      self.orphans = bool(theirs)

  def _ended(self, found: Worker, status: int) -> None:
    """Sees to a worker that has ended by itself or was killed."""
    first = None
    if not found.doomed:
      for frame in found.channel.receive():
        self._answer(found, frame)
      self._drain(found)
    if not found.doomed:
      found.doomed = True
      if not found.ready:
        self._failed_start()
      elif found.queue:
        first = self._blame(found, found.queue.popleft(), status)
      self._again(found.queue)
    self._remove(found)
    self._fork(found.slot, first)

  def _blame(self, found: Worker, job: Job, status: int) -> Job | None:
    """Gives a job the status of its worker's end, or returns it to try again.

    An earlier job may have caused the end (a signal on its way, say). So a job
    is blamed only if it was the first of its worker.
    """
    if job.number not in self.jobs:
      return None
    if found.num_done and not job.retried:
      job.retried = True
      return job
    end = processes.describe_end(status)
    if (found.lost and found.deadline == float("inf")) or (
        status == worker.CONNECTION_LOST << 8):
      end = LOST
    self._fail(found, job, "error", f"The worker {end}.")
    return None

  def _failed_start(self) -> None:
    """Counts a start that failed: with what was imported last time, or at all.
    """
    self.failed_starts += 1
    self.preload.clear()
    if self.failed_starts >= MAX_FAILED_STARTS:
      raise RuntimeError(
          f"{self.failed_starts} worker processes in a row did not start. Give "
          "them more memory (workers.memory_gb), or see what they printed "
          "above.")

  def _remove(self, found: Worker) -> None:
    del self.workers[found.pid]
    self._deafen(found)
    found.channel.close()
    os.close(found.pipe)

  def _deafen(self, found: Worker) -> None:
    for file in (found.channel.socket, found.pipe):
      with contextlib.suppress(KeyError):
        self.selector.unregister(file)

  # Waiting.

  def _timeout(self) -> float:
    if self.orphans:
      return 0.002
    now = time.monotonic()
    waits = [1.0, *(found.deadline - now for found in self.workers.values()
                    if not found.doomed)]
    if any(len(found.queue) > 1 for found in self.workers.values()):
      waits.append(SLOW_SECONDS)
    return max(0.0, min(waits))

  def _watch_writes(self) -> None:
    """Asks for sockets that can be written to, where something is unsent."""
    for channel in (self.pool, *(
        found.channel for found in self.workers.values() if not found.doomed)):
      if channel.closed:
        continue
      wanted = selectors.EVENT_READ | (
          selectors.EVENT_WRITE if channel.unsent else 0)
      key = self.selector.get_key(channel.socket)
      if key.events != wanted:
        self.selector.modify(channel.socket, wanted, key.data)


def main(descriptor: int, table: int, settings: str) -> NoReturn:
  """Runs the supervisor over a connected socket.

  Args:
    descriptor: of the socket.
    table: of a file with 8 bytes a worker, in which the running jobs are.
    settings: of `Settings`, as JSON.
  """
  found = Settings(**json.loads(settings))
  running = mmap.mmap(table, RUNNING.size * found.num_workers)
  os.close(table)
  supervisor = Supervisor(
      socket.socket(fileno=descriptor), running, found)
  try:
    supervisor.run()
  finally:
    supervisor.close()
    sys.stderr.flush()
  sys.exit()
