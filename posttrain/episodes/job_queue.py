"""Job queue: which call goes to which worker, when several are sent ahead.

A worker that gets its next call only when it has answered the last one waits
for the supervisor. So some are sent ahead, but only quick ones behind quick
ones: a call behind a slow one would wait while other workers are idle. If it
does nevertheless, an idle worker makes it too, and the first result counts.
"""

import collections
import math
import time
from collections.abc import Iterable, Iterator, Mapping

from posttrain.episodes.handle import Handle, Job

AHEAD = 16  # Jobs that are at a worker at a time, if they are quick.
QUICK_SECONDS = 0.005
SLOW_SECONDS = 0.05  # A job behind one that takes longer may go elsewhere.


class JobQueue:
  """Jobs without a result, those that wait, and where the others are."""

  def __init__(self, workers: Mapping[int, Handle]):
    """Takes the workers, by their process numbers; they come and go."""
    self._workers = workers
    self._open: dict[int, Job] = {}  # By number; those without a result.
    self._waiting: collections.deque[Job] = collections.deque()
    self._means: dict[bytes, float] = {}  # Seconds of a function's calls.

  def put(self, job: Job) -> None:
    self._open[job.number] = job
    self._waiting.append(job)

  def put_back(self, jobs: Iterable[Job]) -> None:
    """Lets jobs wait again, in front, unless another worker has them."""
    for job in reversed(list(jobs)):
      if self.is_open(job) and not self._num_workers(job):
        self._waiting.appendleft(job)

  def clear(self) -> None:
    self._open.clear()
    self._waiting.clear()

  def is_open(self, job: Job) -> bool:
    return job.number in self._open

  def finish(self, job: Job, seconds: float) -> bool:
    """Notes that a job has ended; False if it had ended before."""
    mean = self._means.get(job.name, seconds)
    self._means[job.name] = 0.9 * mean + 0.1 * seconds
    return self._open.pop(job.number, None) is not None

  def deal(self) -> Iterator[tuple[Handle, Job]]:
    """Yields who gets which job: one for each idle worker, then ahead.

    The receiver adds the job to the worker's queue before it goes on.
    """
    for depth in range(AHEAD):
      for found in list(self._workers.values()):
        if found.is_usable and len(found.queue) == depth and (
            depth == 0 or self._is_quick(found)):
          job = self._take() or (self._stuck() if depth == 0 else None)
          if job is not None:
            yield found, job
      if not self._waiting:
        break

  def _take(self) -> Job | None:
    while self._waiting:
      job = self._waiting.popleft()
      if self.is_open(job):
        return job
    return None

  def _stuck(self) -> Job | None:
    """Finds a job behind one that is slow, the last one first."""
    late = time.monotonic() - SLOW_SECONDS
    for found in self._workers.values():
      if found.started < late:
        for job in list(found.queue)[:0:-1]:
          if self.is_open(job) and self._num_workers(job) == 1:
            return job
    return None

  def _is_quick(self, found: Handle) -> bool:
    """Says if a worker's job and the next one that waits are quick."""
    quick = lambda job: self._means.get(job.name, math.inf) < QUICK_SECONDS
    return bool(self._waiting) and quick(self._waiting[0]) and quick(
        found.queue[0])

  def _num_workers(self, job: Job) -> int:
    return sum(job in found.queue for found in self._workers.values()
               if not found.doomed)
