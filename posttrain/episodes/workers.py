"""Workers: a pool of processes that makes calls of host code with deadlines.

  with WorkerPool(Settings(num_workers=2)) as pool:
    number = pool.submit(Call("my_rewards.py:reward", ("1 + 1", "2")))
    while pool.pending:
      for number, result in pool.poll(timeout=1.0):
        ...

One supervisor process forks the workers, so that neither copies the models of
this process. A call may raise, hang, exit, crash, print without end or leave
children: it has a status, and the next call a new worker. A call may be made
twice: again on a new worker where a worker ended that had made others before.
A worker is not a sandbox: a call may write files and use the network.

A function may have two attributes, which workers heed. What they take does not
count against the deadline of a call, but against one of two minutes.

  prepare()                 is called once in a worker, behind the import; for
                            modules that the function imports lazily
  imports(*args, **kwargs)  names of functions that a call with these arguments
                            will load with `tasks.loading`; imported, and
                            prepared, before the call
"""

import collections
import dataclasses
import json
import mmap
import os
import pickle
import select
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from typing import IO

from posttrain.episodes import frames, processes
from posttrain.episodes.call import Call, Result
from posttrain.episodes.handle import RUNNING
from posttrain.episodes.supervisor import Settings

MARK = "POSTTRAIN_WORKERS"  # Environment variable of all that a pool starts.
ONE_THREAD = {f"{name}_NUM_THREADS": "1"
              for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
MAX_FAILURES = 3
CLOSE_SECONDS = 10
ASK_SECONDS, SILENT_SECONDS = 5, 30  # For an answer of the supervisor.
_START = """
import sys
sys.path[:] = sys.argv[4:]
from posttrain.episodes import supervisor
supervisor.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
"""


class WorkerPool:
  """Makes calls in worker processes. For one thread; a context manager."""

  def __init__(
      self, settings: Settings, log: Callable[[str], None] = lambda text: None):
    """Starts the supervisor; does not wait for it.

    Args:
      settings: of the pool.
      log: takes lines for people, about supervisors that ended.
    """
    self._settings = settings
    self._log = log
    self._number = 0
    # Calls without a result: the function's name, and the frame.
    self._jobs: dict[int, tuple[str, bytes]] = {}
    self._unsent: collections.deque[int] = collections.deque()
    self._alone: set[int] = set()  # Calls that may have ended a supervisor.
    self._results: list[tuple[int, Result]] = []
    self._failures = 0
    self._start()

  def __enter__(self) -> "WorkerPool":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  @property
  def pending(self) -> int:
    """Number of calls whose result `poll` has not returned."""
    return len(self._jobs) + len(self._results)

  def submit(self, call: Call) -> int:
    """Submits a call; returns the number under which its result comes.

    Its `gather` is not looked at. Arguments that cannot be pickled give the
    call the status "error".
    """
    self._number += 1
    number = self._number
    seconds = self._settings.seconds if call.seconds is None else call.seconds
    try:
      body = pickle.dumps((call.args, dict(call.kwargs)), protocol=5)
      if len(body) > frames.MAX_JOB:
        raise ValueError(f"{len(body)} bytes, more than {frames.MAX_JOB}")
    except Exception as error:
      self._results.append((number, Result(
          "error", reason=f"The arguments of {call.function} cannot be sent to "
          f"a worker: {type(error).__name__}: {error}"[:500])))
      return number
    self._jobs[number] = call.function, frames.encode(frames.Frame(
        frames.JOB, number, seconds, call.function.encode(), body))
    self._unsent.append(number)
    self._send()
    return number

  def poll(self, timeout: float = 0.0) -> list[tuple[int, Result]]:
    """Returns results that have come, in the order in which the calls ended.

    Args:
      timeout: seconds to wait for the first one, if calls are pending.

    Raises:
      RuntimeError: the supervisor does not start.
    """
    deadline = time.monotonic() + timeout
    while True:
      self._receive()
      left = deadline - time.monotonic()
      if self._results or not self._jobs or left <= 0:
        break
      self._wait(min(left, 1.0))
    found, self._results = self._results, []
    return found

  def cancel(self) -> None:
    """Forgets all calls, and kills the workers that are making one."""
    self._forget()
    self._channel.send(frames.encode(frames.Frame(frames.CANCEL)))

  def close(self) -> None:
    """Ends the supervisor, its workers, and whatever these have started."""
    self._forget()
    self._stop()

  def _forget(self) -> None:
    for found in (self._jobs, self._unsent, self._alone, self._results):
      found.clear()

  # The supervisor.

  def _start(self) -> None:
    ours, theirs = socket.socketpair()
    self._mark = uuid.uuid4().hex
    with tempfile.TemporaryFile() as table, theirs:
      size = RUNNING.size * self._settings.num_workers
      table.truncate(size)
      self._running = mmap.mmap(table.fileno(), size)
      self._process = subprocess.Popen(
          self._command(theirs, table), stdin=subprocess.DEVNULL,
          stdout=subprocess.DEVNULL, start_new_session=True,
          pass_fds=(theirs.fileno(), table.fileno()),
          env={**os.environ, **ONE_THREAD, "JAX_PLATFORMS": "cpu",
               MARK: self._mark})
    self._channel = frames.Channel(ours, 2 * frames.MAX_JOB)
    self._heard = self._asked = time.monotonic()

  def _command(self, theirs: socket.socket, table: IO[bytes]) -> list[str]:
    settings = json.dumps(dataclasses.asdict(self._settings))
    return [sys.executable, "-c", _START, str(theirs.fileno()),
            str(table.fileno()), settings,
            *(os.fspath(path) or os.getcwd() for path in sys.path)]

  def _stop(self) -> None:
    """Ends the supervisor; kills what it leaves."""
    self._channel.shutdown()
    try:
      self._process.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._kill_marked()
    self._running.close()

  def _kill_marked(self) -> None:
    """Kills what a supervisor has left, as one that was killed itself does."""
    deadline = time.monotonic() + CLOSE_SECONDS
    while time.monotonic() < deadline:
      left = processes.marked(MARK, self._mark)
      if not left:
        break
      for pid in left:
        processes.kill(pid)
      time.sleep(0.002)

  def _restart(self) -> None:
    """Starts another supervisor; finds out which call has ended the last one.

    The calls that ran are made again, each alone. One that was alone is it.
    """
    suspects = {
        number for (number,) in RUNNING.iter_unpack(self._running[:])
        if number in self._jobs}
    self._stop()
    status = self._process.returncode
    for number in suspects & self._alone:
      self._log(f"{self._jobs[number][0]}: a call has ended the supervisor of "
                "the worker processes, twice")
      self._finish(number, Result(
          "error", reason="The call ended the supervisor of its worker, "
          f"with status {status}."))
    self._alone |= suspects & self._jobs.keys()
    self._failures = 0 if suspects else self._failures + 1
    if self._failures >= MAX_FAILURES:
      raise RuntimeError(
          f"The supervisor of the worker processes ended {self._failures} "
          f"times in a row without a call, the last time with status {status}. "
          "See what it printed above.")
    self._log("the supervisor of the worker processes ended with status "
              f"{status}; another one makes {len(self._jobs)} calls again")
    self._start()
    self._unsent = collections.deque(sorted(
        self._jobs, key=lambda number: (number not in self._alone, number)))
    self._send()

  # Messages.

  def _send(self) -> None:
    """Sends calls: one by one those that may end the supervisor, then all."""
    while self._unsent and not (
        self._alone and len(self._unsent) < len(self._jobs)):
      self._channel.send(self._jobs[self._unsent.popleft()][1])
    self._channel.flush()

  def _receive(self) -> None:
    for frame in self._channel.receive():
      self._heard = time.monotonic()
      if frame.kind == frames.DONE and frame.number in self._jobs:
        self._failures = 0
        self._finish(frame.number, _result(frame))
    self._send()
    if self._channel.closed:
      self._restart()

  def _finish(self, number: int, result: Result) -> None:
    del self._jobs[number]
    self._alone.discard(number)
    self._results.append((number, result))

  def _wait(self, seconds: float) -> None:
    """Waits until there is something to receive; asks if it still lives."""
    sock = self._channel.socket
    poll = select.poll()  # `select.select` takes no descriptor above 1023.
    poll.register(sock, select.POLLIN | (
        select.POLLOUT if self._channel.unsent else 0))
    poll.poll(seconds * 1000)
    now = time.monotonic()
    # It never blocks, so that silence means that a call has stopped it.
    if self._asked > self._heard:
      if now - self._asked > SILENT_SECONDS:
        self._process.kill()
    elif now - self._heard > ASK_SECONDS:
      self._asked = now
      self._channel.send(frames.encode(frames.Frame(frames.PING)))


def _result(frame: frames.Frame) -> Result:
  output = frame.head.decode(errors="backslashreplace")
  try:
    status, value, reason = frames.decode_result(frame.body)
    return Result(status, value, reason, output, frame.seconds)
  except (ValueError, TypeError, RecursionError) as error:
    return Result(
        "error", None, f"The result is not JSON: {error}"[:500], output,
        frame.seconds)
