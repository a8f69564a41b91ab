"""Keeps the code of tasks and rewards from ending a run that is unfinished.

A launcher takes status 0 for finished, and 75 for preempted. `sys.exit` is an
exception, which can be caught; `os._exit` is not, so that function is replaced
while a run is on. It is a plain attribute of a module: the replacement is also
what a task's `from os import _exit` gets, since a run imports tasks later.

Not caught is what leaves without Python: `exit` called through ctypes or by a
C extension, `posix._exit`, and `os.exec...` of another program. A process that
is killed, by itself or by another, has a status of its own that is not 0.
Processes that a task forks may end as they like.
"""

import contextlib
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

_called = threading.local()
leave = os._exit  # For our own code, which may leave.


class Left(BaseException):
  """Code that was called has tried to end the process.

  No `except Exception` of its own shall hide that.
  """


class Unfinished(RuntimeError):
  """A run has been ended, by code that it called, before it had finished."""


@contextlib.contextmanager
def raised() -> Iterator[None]:
  """Turns `os._exit` of this thread into `Left`, around a call."""
  with _replaced():
    before = getattr(_called, "depth", 0)
    _called.depth = before + 1
    try:
      yield
    finally:
      _called.depth = before


@contextlib.contextmanager
def refused(
    on_exit: Callable[[], None] = lambda: None) -> Iterator[None]:
  """Turns the exit of an unfinished run into a failure, around the run.

  What is raised as a SystemExit of a class of its own, as `Preempted` is, is
  no such exit.

  Args:
    on_exit: is called before `os._exit` ends the process, which unwinds
      nothing.

  Raises:
    Unfinished: by `sys.exit`. After `os._exit` the process ends with status 1
      at once, as it may be called on any thread.
  """
  with _replaced(on_exit):
    try:
      yield
    except SystemExit as error:
      if type(error) is not SystemExit:
        raise
      by = traceback.extract_tb(error.__traceback__)[-1]
      raise Unfinished(
          f"{by.filename}, line {by.lineno}, has left with status "
          f"{error.code or 0} (a SystemExit) before the run had finished."
      ) from error


@contextlib.contextmanager
def _replaced(
    on_exit: Callable[[], None] = lambda: None) -> Iterator[None]:
  """Puts `_exit_of` in the place of `os._exit`; nested, once."""
  real = os._exit
  if getattr(real, "of_posttrain", False):
    yield
    return
  os._exit = _exit_of(real, on_exit)  # type: ignore[assignment]
  try:
    yield
  finally:
    os._exit = real


def _exit_of(
    real: Callable[[int], NoReturn], on_exit: Callable[[], None],
) -> Callable[[int], NoReturn]:
  owner = os.getpid()

  def refuse(status: int) -> NoReturn:
    if os.getpid() != owner:  # A child that was forked.
      real(status)
    if getattr(_called, "depth", 0):
      raise Left(f"os._exit({status})")
    os.write(2, f"posttrain: os._exit({status}) was called before the run "
             "had finished.\n".encode())
    try:
      on_exit()
    finally:
      real(1)

  refuse.of_posttrain = True  # type: ignore[attr-defined]
  return refuse
