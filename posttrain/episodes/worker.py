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
from types import FrameType
from typing import Any, NoReturn

from posttrain.episodes import frames, processes
from posttrain.tasks import loading

CONNECTION_LOST = 71  # Exit status: the call closed the socket.
_HIGH = 600  # Descriptors from here on are seldom closed by mistake.
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
    os.register_at_fork(after_in_child=_restore_signals)
    _redirect(output)
    # Calls that close descriptors 3 to 255 must not close these.
    self.output = fcntl.fcntl(output, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    os.close(output)
    self.socket = socket.socket(
        fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, _HIGH))
    sock.close()
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    if limit != resource.RLIM_INFINITY:
      memory_bytes = min(memory_bytes, limit)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open(
        "/proc/self/oom_score_adj", "w") as file:
      file.write("1000")  # Without memory, a worker goes before the run.
    self.memory_bytes = memory_bytes
    self.folder = os.getcwd()
    self.standard = _identities()
    self.streams = sys.stdout, sys.stderr
    self.functions: dict[str, Callable[..., Any] | BaseException] = {}
    self.inbox = bytearray()
    for name in preload:
      self._load(name)
    # What has failed is tried again by the call that needs it.
    self.functions = {name: found for name, found in self.functions.items()
                      if not isinstance(found, BaseException)}
    self._flush()
    self._send(frames.Frame(frames.READY))

  def run(self) -> None:
    while True:
      frame = self._receive()
      # Before the call, in case it has none.
      before, start = (_threads(), _memory()), time.monotonic()
      try:
        function, args, kwargs = self._unpack(frame)
        before, start = (_threads(), _memory()), time.monotonic()
        answer = "ok", function(*args, **kwargs), ""
      except BaseException as error:
        answer = "error", None, _described(error)
        with contextlib.suppress(BaseException):
          traceback.print_exc()  # The output is kept.
      seconds = time.monotonic() - start
      clean = self._flush() and self._is_clean(*before)
      self._send(frames.Frame(
          frames.DONE if clean else frames.LAST, frame.number, seconds,
          body=_encoded(*answer)))

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
    names = [name for name in names if name not in self.functions]
    if names:
      self._send(frames.Frame(
          frames.IMPORT, number, body=json.dumps(names).encode()))
      for name in names:
        self._load(name)
      self._send(frames.Frame(frames.START, number))

  def _load(self, name: str) -> None:
    try:
      function = loading.load_function(name)
      getattr(function, "prepare", lambda: None)()
      self.functions[name] = function
    except BaseException as error:
      self.functions[name] = error
    gc.freeze()

  def _unpack(
      self, frame: frames.Frame) -> tuple[Callable[..., Any], tuple, dict]:
    """Imports the function of a job, and what it needs; gives its arguments."""
    name = frame.head.decode()
    self._import(frame.number, [name])
    function = self._function(name)
    args, kwargs = pickle.loads(frame.body)
    imports = getattr(function, "imports", None)
    if imports is not None:
      self._import(frame.number, imports(*args, **kwargs))
    return function, args, kwargs

  def _function(self, name: str) -> Callable[..., Any]:
    found = self.functions[name]
    if isinstance(found, BaseException):
      raise found
    return found

  # What a call has left.

  def _flush(self) -> bool:
    """Waits until the supervisor has read all output; False: it cannot be."""
    try:
      for stream in self.streams:
        stream.flush()
      unread = array.array("i", [0])
      deadline = time.monotonic() + 2
      while time.monotonic() < deadline:
        fcntl.ioctl(self.output, termios.FIONREAD, unread)
        if not unread[0]:
          return True
        time.sleep(0.0002)
    except (OSError, ValueError):
      pass
    return False

  def _is_clean(self, threads: int, memory: int) -> bool:
    try:
      while os.waitpid(-1, os.WNOHANG)[0]:
        pass  # A child that has ended.
      return False  # One that has not. Its orphans would be here, too.
    except ChildProcessError:
      pass
    try:
      return (
          _threads() <= threads
          and _memory() - memory < self.memory_bytes // 4
          and os.getcwd() == self.folder and _identities() == self.standard
          and (sys.stdout, sys.stderr) == self.streams
          and signal.getitimer(signal.ITIMER_REAL)[0] == 0
          and all(signal.getsignal(number) is _nothing for number in _QUIET))
    except OSError:
      return False


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


def _restore_signals() -> None:
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  signal.signal(signal.SIGINT, signal.default_int_handler)


def _identities() -> list[tuple[int, int]]:
  stats = [os.fstat(number) for number in (0, 1, 2)]
  return [(stat.st_dev, stat.st_ino) for stat in stats]


def _threads() -> int:
  """Counts the threads, those without Python too."""
  try:
    return os.stat("/proc/self/task").st_nlink
  except OSError:
    return 0


def _memory() -> int:
  """Measures the address space, in bytes."""
  try:
    with open("/proc/self/statm", "rb") as file:
      return int(file.read().split()[0]) * resource.getpagesize()
  except OSError:
    return 0


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
