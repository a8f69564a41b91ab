"""Processes: finds and kills descendants, and says how a process ended."""

import contextlib
import ctypes
import os
import signal
import sys

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


def descendants(root: int) -> list[int]:
  """Lists the children of a process, their children and so on."""
  children: dict[int, list[int]] = {}
  for name in _listed():
    with contextlib.suppress(OSError, IndexError, ValueError):
      with open(f"/proc/{name}/stat", "rb") as file:
        # The command's name is in parentheses, and may contain any.
        fields = file.read().rpartition(b")")[2].split()
      if fields[0] != b"Z":
        children.setdefault(int(fields[1]), []).append(int(name))
  found, todo = [], [root]
  while todo:
    new = children.get(todo.pop(), [])
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
