"""Exits: keeps the code of tasks from ending an unfinished run.

A launcher takes status 0 for finished, and 75 for preempted. `sys.exit` is an
exception, which can be caught; `os._exit` is not, so that function is replaced
during a run. It is a plain attribute of a module: a task's `from os import
_exit` gets the replacement too, since a run imports tasks later.

Not caught are exits without Python: `exit` called through ctypes or by a C
extension, `posix._exit`, and `os.exec...` of another program. A process that is
killed, by itself or by another, has a status of its own that is not 0.
Processes that a task forks may end as they like.
"""

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

leave = os._exit  # For our own code, which may leave.


class Unfinished(RuntimeError):
  """A task's code has ended the run before it had finished."""


@contextlib.contextmanager
def refused(
    on_exit: Callable[[], None] = lambda: None) -> Iterator[None]:
  """Turns the exit of an unfinished run into a failure, around the run.

  A SystemExit of a class of its own, such as `Preempted`, passes: it is this
  project's.

  Args:
    on_exit: is called before `os._exit` ends the process, which unwinds
      nothing.

  Raises:
    Unfinished: after `sys.exit`. After `os._exit` the process ends at once,
      with status 1: it may be called in any thread, where an exception would
      not reach the run.
  """
  real = os._exit
  os._exit = _exit_of(real, on_exit)  # type: ignore[assignment]
  try:
    yield
  except SystemExit as error:
    if type(error) is not SystemExit:
      raise
    # `sys.exit` is C code, so that the last frame is the line that called it.
    by = traceback.extract_tb(error.__traceback__)[-1]
    raise Unfinished(
        f"{by.filename}, line {by.lineno}, has left with status "
        f"{error.code or 0} (a SystemExit) before the run had finished."
    ) from error
  finally:
    os._exit = real


def _exit_of(
    real: Callable[[int], NoReturn], on_exit: Callable[[], None],
) -> Callable[[int], NoReturn]:
  owner = os.getpid()

  def refuse(status: int) -> NoReturn:
    if os.getpid() != owner:  # A forked child may end as it likes.
      real(status)
    os.write(2, f"posttrain: os._exit({status}) was called before the run "
             "had finished.\n".encode())
    try:
      on_exit()
    finally:
      real(1)

  return refuse
