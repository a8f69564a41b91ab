"""Supervisor: forks workers, gives them jobs, keeps deadlines, kills.

It is a process of its own, with one thread and without JAX, started by
`posttrain.episodes.workers`. It is small, so that a fork takes milliseconds.
A worker adopts the orphans of its calls, the supervisor those of its workers:
what is its child and no worker was left by one that is gone. When the pool
closes its socket, or is gone, it kills all that descends from it and exits.
"""

import contextlib
import dataclasses
import gc
import json
import math
import mmap
import os
import selectors
import socket
import sys
import time
from typing import NoReturn

from posttrain.episodes import frames, handle, job_queue, processes
from posttrain.episodes.handle import Handle, Job
from posttrain.episodes.job_queue import JobQueue
from posttrain.tasks import loading, scoring  # noqa: F401  For the workers.

MAX_FAILED_STARTS = 5


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a pool.

  Attributes:
    num_workers: calls that run at a time.
    seconds: deadline of a call that names none.
    memory_bytes: address space of a worker.
    output_bytes: of what a call prints, how much is kept.
  """

  num_workers: int = 2
  seconds: float = 10.0
  memory_bytes: int = 4 * 2**30
  output_bytes: int = 4096


class Supervisor:
  """Loop of the process; see the module's text."""

  def __init__(
      self, sock: socket.socket, running: mmap.mmap, settings: Settings):
    """Starts no worker yet.

    Args:
      sock: connection to the pool.
      running: table of the jobs that run, which outlives this process.
      settings: of the workers.
    """
    self.pool = frames.Channel(sock, 2 * frames.MAX_JOB)
    self.running = running
    self.settings = settings
    self.workers: dict[int, Handle] = {}
    self.jobs = JobQueue(self.workers)
    self.preload: dict[str, None] = {}
    self.failed_starts = 0
    self.parent = os.getppid()
    self.orphans = False  # There may be some.
    self.selector = selectors.DefaultSelector()
    self.wakeup = processes.wake_at_signals()
    processes.adopt_orphans()
    self.selector.register(sock, selectors.EVENT_READ)
    self.selector.register(self.wakeup, selectors.EVENT_READ)

  def run(self) -> None:
    """Works until the pool is gone."""
    for slot in range(self.settings.num_workers):
      self._fork(slot)
    while not self.pool.closed and os.getppid() == self.parent:
      self._watch_writes()
      ready = {key.fd: events for key, events in self.selector.select(
          self._timeout())}
      if events := ready.get(self.pool.socket.fileno()):
        self._hear_pool(events)
      if self.wakeup in ready:
        os.read(self.wakeup, 4096)
      # Answers before output: what comes behind an answer is the next job's.
      # A worker answers when all that its job has printed was read.
      for found in list(self.workers.values()):
        if events := ready.get(found.channel.socket.fileno()):
          self._hear(found, events)
        if found.pipe in ready and not found.doomed:
          self._drain(found, most=1)  # A second part may be the next job's.
      self._expire()
      self._reap()
      for found, job in self.jobs.deal():
        self._send(found, job)

  def close(self) -> None:
    """Kills all descendants, and waits until they are gone."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
      for pid in processes.descendants(os.getpid(), processes.children()):
        processes.kill(pid)
      try:
        while os.waitpid(-1, os.WNOHANG)[0]:
          pass
      except ChildProcessError:
        return
      time.sleep(0.002)

  # Messages.

  def _hear_pool(self, events: int) -> None:
    if events & selectors.EVENT_WRITE:
      self.pool.flush()
    if events & selectors.EVENT_READ:
      for frame in self.pool.receive():
        if frame.kind == frames.JOB:
          self.jobs.put(Job(
              frame.number, frame.head, frame.seconds, frames.encode(frame)))
        elif frame.kind == frames.CANCEL:
          self._cancel()
        else:
          self.pool.send(frames.encode(frames.Frame(frames.PONG)))

  def _hear(self, found: Handle, events: int) -> None:
    if events & selectors.EVENT_WRITE:
      found.channel.flush()
    if events & selectors.EVENT_READ:
      self._receive(found)
    if found.channel.closed and not found.doomed and not found.lost:
      # It is about to end, and its status says more; or a call has closed
      # the connection, and it does not know yet.
      found.lost = True
      found.deadline = min(
          found.deadline, time.monotonic() + handle.END_SECONDS)
      found.deafen(self.selector)

  def _receive(self, found: Handle) -> None:
    for frame in found.channel.receive():
      if not found.doomed:
        self._answer(found, frame)

  def _answer(self, found: Handle, frame: frames.Frame) -> None:
    """Takes in a frame of a worker."""
    job = found.queue[0] if found.queue else None
    if frame.kind == frames.READY and not found.ready:
      self.failed_starts, found.ready = 0, True
      self._start(found)
    elif job is None or frame.number != job.number:
      found.channel.closed = True  # Nobody asked.
    elif frame.kind == frames.IMPORT:
      found.deadline = time.monotonic() + handle.IMPORT_SECONDS
      found.names = frame.body.decode(errors="replace").split("\n")
    elif frame.kind == frames.START:
      self.preload.update(dict.fromkeys(found.names))
      found.names = []
      self._start(found, keep=True)
    else:
      if frame.kind == frames.LAST:  # It has not waited, and nothing follows.
        self._drain(found)
      found.num_done += 1
      self._finish(job, frame.body, frame.seconds, found.output)
      found.queue.popleft()
      self._start(found)
      if frame.kind == frames.LAST:
        self._retire(found)

  def _drain(self, found: Handle, most: int = 16) -> None:
    if not found.drain(self.settings.output_bytes, most):
      with contextlib.suppress(KeyError):
        self.selector.unregister(found.pipe)

  # Jobs.

  def _send(self, found: Handle, job: Job) -> None:
    found.queue.append(job)
    found.channel.send(job.data)
    if len(found.queue) == 1 and found.ready:
      self._start(found)

  def _start(self, found: Handle, *, keep: bool = False) -> None:
    """Starts the clock of a worker's first job; `keep`: the output, too."""
    if not keep:
      found.output = bytearray()
    self._note(found, found.start_clock())

  def _note(self, found: Handle, number: int) -> None:
    handle.RUNNING.pack_into(
        self.running, found.slot * handle.RUNNING.size, number)

  def _finish(
      self, job: Job, body: bytes, seconds: float, output: bytearray) -> None:
    """Sends a result; the first one of a job counts."""
    if self.jobs.finish(job, seconds):
      self.pool.send(frames.encode(frames.Frame(
          frames.DONE, job.number, seconds, bytes(output), body)))

  def _fail(self, found: Handle, job: Job, status: str, reason: str) -> None:
    self._finish(
        job, json.dumps([status, None, reason]).encode(),
        time.monotonic() - found.started, found.output)

  def _expire(self) -> None:
    """Ends the jobs that are late, and their workers."""
    now = time.monotonic()
    for found in list(self.workers.values()):
      if found.doomed or now < found.deadline:
        continue
      if found.lost:
        found.deadline = math.inf
        processes.kill(found.pid)
        continue
      if found.ready and found.queue:
        self._drain(found)
        reason = (f"more than {handle.IMPORT_SECONDS:g} s to import "
                  f"{', '.join(found.names)}" if found.names
                  else f"more than {found.queue[0].seconds:g} s")
        self._fail(found, found.queue.popleft(), "timeout", reason)
      self._retire(found)
      if not found.ready:
        self._count_failed_start(found)

  def _cancel(self) -> None:
    self.jobs.clear()
    for found in list(self.workers.values()):
      if found.queue and not found.doomed:
        found.queue.clear()
        self._retire(found)

  # Workers.

  def _fork(self, slot: int, first: Job | None = None) -> None:
    """Forks a worker; `first` is the job that it starts with."""
    found = handle.fork(
        slot, memory_bytes=self.settings.memory_bytes,
        preload=list(self.preload), close=self._close_files)
    self.workers[found.pid] = found
    self.selector.register(found.channel.socket, selectors.EVENT_READ)
    self.selector.register(found.pipe, selectors.EVENT_READ)
    if first is not None:
      self._send(found, first)

  def _close_files(self) -> None:
    """Closes, in a worker, what belongs to the supervisor."""
    self.selector.close()
    self.pool.close()
    self.running.close()
    os.close(self.wakeup)
    for found in self.workers.values():
      found.close()

  def _retire(self, found: Handle) -> None:
    """Kills a worker; what was sent to it ahead waits again."""
    found.doomed = True
    self._note(found, 0)
    self.jobs.put_back(found.queue)
    found.queue.clear()
    found.deafen(self.selector)
    processes.kill(found.pid)

  def _reap(self) -> None:
    """Replaces workers that have ended, and kills the orphans they left."""
    with contextlib.suppress(ChildProcessError):
      while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
          break
        self.orphans = True
        if pid in self.workers:
          self._see_end(self.workers[pid], status)
    if self.orphans:
      left = processes.descendants(
          os.getpid(), processes.children(), but=self.workers)
      for pid in left:
        processes.kill(pid)
      self.orphans = bool(left)  # Looks again: one may just have forked.

  def _see_end(self, found: Handle, status: int) -> None:
    """Sees to a worker that has ended, by itself or killed."""
    first = None
    if not found.doomed:
      self._receive(found)
      self._drain(found)
    if not found.doomed:
      found.doomed = True
      self._note(found, 0)
      if not found.ready:
        self._count_failed_start(found)
      elif found.queue:
        first = self._blame(found, found.queue.popleft(), status)
      self.jobs.put_back(found.queue)
    del self.workers[found.pid]
    found.deafen(self.selector)
    found.close()
    self._fork(found.slot, first)

  def _blame(self, found: Handle, job: Job, status: int) -> Job | None:
    """Gives a job the status of its worker's end, or returns it to try again.

    An earlier job may have caused the end. So a job is blamed only if it was
    the first of its worker; another one is made the first of the next.
    """
    if found.num_done and self.jobs.is_open(job):
      return job
    self._fail(
        found, job, "error", f"The worker {found.describe_end(status)}.")
    return None

  def _count_failed_start(self, found: Handle) -> None:
    """Counts a start that failed; the next one imports nothing."""
    self._drain(found)
    self.failed_starts += 1
    self.preload.clear()
    if self.failed_starts >= MAX_FAILED_STARTS:
      raise RuntimeError(
          f"{self.failed_starts} worker processes in a row did not start. The "
          "last one printed:\n" + found.output.decode(errors="replace") +
          "\nIf it lacks memory, give the workers more.")

  # Waiting.

  def _timeout(self) -> float:
    if self.orphans:
      return 0.002
    # The pool's end is noticed within a second, if its socket is not closed
    # since another process has it.
    waits = [1.0]
    for found in self.workers.values():
      if not found.doomed:
        waits.append(found.deadline - time.monotonic())
      if len(found.queue) > 1:
        waits.append(job_queue.SLOW_SECONDS)
    return max(0.0, min(waits))

  def _watch_writes(self) -> None:
    """Asks for sockets that can be written to, where something is unsent."""
    for channel in (self.pool, *(
        found.channel for found in self.workers.values()
        if found.is_usable)):
      wanted = selectors.EVENT_READ | (
          selectors.EVENT_WRITE if channel.unsent else 0)
      if self.selector.get_key(channel.socket).events != wanted:
        self.selector.modify(channel.socket, wanted)


def main(descriptor: int, table: int, settings: str) -> NoReturn:
  """Runs the supervisor over a connected socket.

  Args:
    descriptor: of the socket.
    table: of a file with `RUNNING.size` bytes a worker.
    settings: of `Settings`, as JSON.
  """
  found = Settings(**json.loads(settings))
  running = mmap.mmap(table, handle.RUNNING.size * found.num_workers)
  os.close(table)
  supervisor = Supervisor(
      socket.socket(fileno=descriptor), running, found)
  gc.freeze()  # A collection in a worker would copy every page.
  try:
    supervisor.run()
  finally:
    supervisor.close()
  sys.exit()
