"""Processes: finds and kills descendants, and says how a process ended."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Mapping

_PDEATHSIG, _SUBREAPER = 1, 36  # Of linux/prctl.h.


def adopt_orphans() -> None:
  """Makes the orphans among this process's descendants its own children."""
  _prctl(_SUBREAPER, 1)


def die_with_parent() -> None:
  """Has this process killed when its parent ends."""
  _prctl(_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def wake_at_signals() -> int:
  """Returns a descriptor that can be read after a signal.

  A child's end can so wake a loop. The signals that end a run do nothing else.
  """
  read, write = os.pipe()
  for end in (read, write):
    os.set_blocking(end, False)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  for number in (
      signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
  return read


def children() -> dict[int, list[int]]:
  """Lists the children of every process; those that have ended are left out."""
  found: dict[int, list[int]] = {}
  for name in _listed():
    with contextlib.suppress(OSError, IndexError), open(
        f"/proc/{name}/stat", "rb") as file:
      # The command's name is in parentheses, and may contain any character.
      state, parent = file.read().rpartition(b")")[2].split()[:2]
      if state != b"Z":
        found.setdefault(int(parent), []).append(int(name))
  return found


def descendants(
    root: int, tree: Mapping[int, list[int]], but: Iterable[int] = ()
) -> list[int]:
  """Lists the children of a process in a tree, their children and so on.

  Args:
    root: number of the process.
    tree: of `children`.
    but: processes that are left out, with their own descendants.
  """
  spared, found, todo = frozenset(but), [], [root]
  while todo:
    new = [pid for pid in tree.get(todo.pop(), ()) if pid not in spared]
    found += new
    todo += new
  return found


def marked(variable: str, value: str) -> list[int]:
  """Lists processes that were started with an environment variable."""
  wanted, found = f"{variable}={value}".encode(), []
  for name in _listed():
    with contextlib.suppress(OSError), open(
        f"/proc/{name}/environ", "rb") as file:
      if wanted in file.read().split(b"\0"):
        found.append(int(name))
  return found


def kill(pid: int) -> None:
  """Kills a process, and the group that it leads."""
  for send in (os.killpg, os.kill):
    with contextlib.suppress(ProcessLookupError, PermissionError):
      send(pid, signal.SIGKILL)


def describe_end(status: int) -> str:
  """Says how a process ended, from the status of `os.waitpid`."""
  if os.WIFSIGNALED(status):
    number = os.WTERMSIG(status)
    with contextlib.suppress(ValueError):
      return f"was killed by {signal.Signals(number).name}"
    return f"was killed by signal {number}"
  return f"exited with status {os.WEXITSTATUS(status)}"


def _listed() -> list[str]:
  with contextlib.suppress(OSError):  # Linux has it.
    return [name for name in os.listdir("/proc") if name.isdigit()]
  return []
