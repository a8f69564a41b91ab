"""Worker: makes calls one after another; the supervisor has forked it.

It answers each call and then looks whether the call has left something: a
child, a thread, a timer, much memory, another working directory, closed or
replaced descriptors. If so it says that this was its last call, and is
replaced.
"""

import array
import contextlib
import fcntl
import gc
import json
import os
import pickle
import resource
import signal
import socket
import sys
import termios
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn

from posttrain.episodes import frames, processes
from posttrain.tasks import loading

CONNECTION_LOST = 71  # Exit status: the call closed the socket.
_HIGH = 600  # Descriptors from here on are seldom closed by mistake.
_FLUSH_SECONDS = 2
_LINUX = sys.platform == "linux"
_PAGE = resource.getpagesize()
_QUIET = (signal.SIGTERM, signal.SIGINT)


def serve(
    sock: socket.socket, output: int, *, memory_bytes: int,
    preload: Sequence[str],
) -> NoReturn:
  """Makes the calls that come through a socket, in a process of its own.

  Args:
    sock: connection to the supervisor.
    output: descriptor for what the calls print.
    memory_bytes: address space of the process.
    preload: names of functions that it imports first.
  """
  try:
    _Worker(sock, output, memory_bytes, preload).run()
  except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
  finally:
    os._exit(1)


class _Worker:
  """State of the process."""

  def __init__(
      self, sock: socket.socket, output: int, memory_bytes: int,
      preload: Sequence[str]):
    os.setsid()
    processes.die_with_parent()
    processes.adopt_orphans()
    for number in _QUIET:
      signal.signal(number, _nothing)
    os.register_at_fork(after_in_child=self._leave)
    self.pid = os.getpid()
    _redirect(output)
    self.output = _moved(output)
    self.statm = _moved(os.open(
        "/proc/self/statm" if _LINUX else os.devnull, os.O_RDONLY))
    self.socket = socket.socket(fileno=_moved(sock.detach()))
    _limit_memory(memory_bytes)
    self.memory_bytes = memory_bytes
    self.folder = os.getcwd()
    self.standard = _identities()
    self.streams = sys.stdout, sys.stderr
    self.functions: dict[str, Callable[..., Any]] = {}
    self.failed: dict[str, tuple[BaseException, TracebackType | None]] = {}
    self.inbox = bytearray()
    for name in preload:
      self._load(name)
    self.failed.clear()  # The call that needs one tries again.
    self._flush(wait=True)
    self._send(frames.Frame(frames.READY))

  def run(self) -> None:
    while True:
      frame = self._receive()
      # Before the call, in case it has none.
      before, start = (_threads(), self._memory()), time.monotonic()
      try:
        function, args, kwargs = self._unpack(frame)
        before, start = (_threads(), self._memory()), time.monotonic()
        answer = "ok", function(*args, **kwargs), ""
      except BaseException as error:
        answer = "error", None, _described(error)
        self._print(error)
      if os.getpid() != self.pid:
        os._exit(0)  # A call has forked, and its child has come back.
      seconds = time.monotonic() - start
      clean = self._is_clean(*before)
      clean = self._flush(wait=clean) and clean
      self._send(frames.Frame(
          frames.DONE if clean else frames.LAST, frame.number, seconds,
          body=_encoded(*answer)))
      while not clean:
        signal.pause()  # To be killed.

  def _leave(self) -> None:
    """Makes a forked child an ordinary process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    self.socket.close()

  def _print(self, error: BaseException) -> None:
    """Prints where a call has failed, without the frame of `run`."""
    with contextlib.suppress(BaseException):
      trace = error.__traceback__
      traceback.print_exception(
          error.with_traceback(trace.tb_next if trace else None))

  def _receive(self) -> frames.Frame:
    while not (frame := frames.take(self.inbox, 2 * frames.MAX_JOB)):
      try:
        part = self.socket.recv(2**18)
      except OSError:
        os._exit(CONNECTION_LOST)
      if not part:
        os._exit(0)
      self.inbox += part
    return frame

  def _send(self, frame: frames.Frame) -> None:
    try:
      self.socket.sendall(frames.encode(frame))
    except OSError:
      os._exit(CONNECTION_LOST)

  # Calls.

  def _import(self, number: int, names: Sequence[str]) -> None:
    """Imports functions; the supervisor counts this time apart."""
    names = [name for name in names
             if name not in self.functions and name not in self.failed]
    if names:
      self._send(frames.Frame(
          frames.IMPORT, number, body="\n".join(names).encode()))
      for name in names:
        self._load(name)
      self._send(frames.Frame(frames.START, number))

  def _load(self, name: str) -> None:
    try:
      function = loading.load_function(name)
      getattr(function, "prepare", lambda: None)()
      self.functions[name] = function
    except BaseException as error:
      self.failed[name] = error, error.__traceback__
    gc.freeze()

  def _unpack(
      self, frame: frames.Frame) -> tuple[Callable[..., Any], tuple, dict]:
    """Imports the function of a job, and what it needs; gives its arguments."""
    name = frame.head.decode()
    self._import(frame.number, [name])
    if name in self.failed:
      error, trace = self.failed[name]
      raise error.with_traceback(trace)
    function = self.functions[name]
    args, kwargs = pickle.loads(frame.body)
    imports = getattr(function, "imports", None)
    if imports is not None:
      self._import(frame.number, imports(*args, **kwargs))
    return function, args, kwargs

  # What a call has left.

  def _memory(self) -> int:
    """Measures the address space, in bytes; 0 where this is not known."""
    if not _LINUX:
      return 0
    return int(os.pread(self.statm, 32, 0).split()[0]) * _PAGE

  def _flush(self, wait: bool) -> bool:
    """Flushes, and waits until the supervisor has read all; False: it failed.
    """
    try:
      for stream in self.streams:
        stream.flush()
      unread = array.array("i", [1])
      deadline = time.monotonic() + _FLUSH_SECONDS
      while wait and time.monotonic() < deadline:
        fcntl.ioctl(self.output, termios.FIONREAD, unread)
        if not unread[0]:
          return True
        time.sleep(0.0002)
    except (OSError, ValueError):
      pass
    return False

  def _is_clean(self, threads: int, memory: int) -> bool:
    with contextlib.suppress(ChildProcessError):
      while os.waitpid(-1, os.WNOHANG)[0]:
        pass  # A child that has ended.
      return False  # One that has not. Orphans would be here, too.
    try:
      return (
          _threads() <= threads
          and self._memory() - memory < self.memory_bytes // 4
          and os.getcwd() == self.folder and _identities() == self.standard
          and (sys.stdout, sys.stderr) == self.streams
          and signal.getitimer(signal.ITIMER_REAL)[0] == 0
          and all(signal.getsignal(number) is _nothing for number in _QUIET))
    except (OSError, ValueError, IndexError, MemoryError):
      return False


def _moved(descriptor: int) -> int:
  """Moves a descriptor to where calls that close 3 to 255 do not close it."""
  high = min(_HIGH, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
  moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, high)
  os.close(descriptor)
  return moved


def _limit_memory(num_bytes: int) -> None:
  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  if hard != resource.RLIM_INFINITY:
    num_bytes = min(num_bytes, hard)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  if _LINUX:  # Others refuse, or map more than they use.
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
  with contextlib.suppress(OSError), open(
      "/proc/self/oom_score_adj", "w") as file:
    file.write("1000")  # Without memory, a worker goes before the run.


def _redirect(output: int) -> None:
  """Sends what is printed, by Python or by others, to a descriptor."""
  nothing = os.open(os.devnull, os.O_RDONLY)
  os.dup2(nothing, 0)
  os.close(nothing)
  os.dup2(output, 1)
  os.dup2(output, 2)
  sys.stdin = os.fdopen(0, closefd=False)
  sys.stdout = os.fdopen(1, "w", errors="backslashreplace", closefd=False)
  sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
  sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]


def _nothing(number: int, frame: FrameType | None) -> None:
  """Handles a signal by doing nothing.

  A launcher may send SIGTERM to every process of a run, which must not change
  a result. The signal is not ignored, since programs that a call starts would
  inherit that.
  """


def _identities() -> list[tuple[int, int]]:
  stats = [os.fstat(number) for number in (0, 1, 2)]
  return [(stat.st_dev, stat.st_ino) for stat in stats]


def _threads() -> int:
  """Counts the threads, plus two; 0 where this is not known."""
  return os.stat("/proc/self/task").st_nlink if _LINUX else 0


def _encoded(status: str, value: Any, reason: str) -> bytes:
  """Encodes a result; one that is not JSON, or too large, is an error."""
  try:
    text = json.dumps([status, value, reason]).encode()
    if len(text) <= frames.MAX_RESULT:
      return text
    reason = (f"The result has {len(text)} bytes as JSON, and at most "
              f"{frames.MAX_RESULT} are taken.")
  except BaseException as error:
    reason = f"The result is not JSON: {_described(error)}"
  return json.dumps(["error", None, reason]).encode()


def _described(error: BaseException) -> str:
  try:
    text = " ".join(str(error).split())[:500]
  except BaseException:
    text = "(its text cannot be shown)"
  return f"{type(error).__name__}: {text}" if text else type(error).__name__
