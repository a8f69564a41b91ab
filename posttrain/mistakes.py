"""Tells a user's mistake from a bug, by where an exception was raised.

The convention of this project is that its own code raises ValueError, or an
OSError that names a path, for what a user can cause. So a mistake is

  - an exception that a `raise` statement of this package raised, when all
    frames between the command line and that statement are this package's or
    libraries';
  - a path that does not exist or is of the wrong kind, whoever opened it;
  - a package that is not installed.

Everything else, such as a ValueError of JAX, of NumPy or of a user's own loss
function, keeps its traceback, which shows where to look.
"""

import dis
import errno
import os
import pathlib
import sysconfig
import traceback
from types import FrameType, TracebackType

PACKAGE = pathlib.Path(__file__).parent
LIBRARIES = tuple({
    sysconfig.get_path(name)
    for name in ("stdlib", "platstdlib", "purelib", "platlib")})
WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
              errno.ENAMETOOLONG, errno.ELOOP)
# An environment variable: with it set, mistakes keep their traceback too.
TRACEBACK = "POSTTRAIN_TRACEBACK"
MARK = "no_mistake"  # An attribute of exceptions.


def line(error: Exception) -> str | None:
  """Returns the error in one line, or None if it is not a user's mistake."""
  if os.environ.get(TRACEBACK) or getattr(error, MARK, False):
    return None
  if isinstance(error, ModuleNotFoundError):
    return _missing_package(error)
  if isinstance(error, OSError) and error.errno in WRONG_PATH and (
      error.filename):
    return f"{os.fsdecode(error.filename)[:200]}: {os.strerror(error.errno)}."
  if isinstance(error, (ValueError, OSError)) and _raised_by_us(error):
    return str(error)
  return None


def mark_as_none(error: Exception) -> None:
  """Marks an exception as no user's mistake, though our `raise` passes it on.

  Another host has raised it, and its traceback is printed there.
  """
  setattr(error, MARK, True)


def _missing_package(error: ModuleNotFoundError) -> str | None:
  """Writes the line for a package that is not installed; None for our own."""
  name = (error.name or "").partition(".")[0]
  if not name or name == PACKAGE.name:
    return None
  # The last frame outside of the import machinery is where `import` stands.
  frames = [(frame, number) for frame, number in traceback.walk_tb(
      error.__traceback__) if not _is_importing(frame)]
  frame, number = frames[-1]
  return (f"the package {name} is not installed in this environment, and "
          f"{frame.f_code.co_filename}, line {number}, needs it. Install it: "
          f"pip install {name.replace('_', '-')}.")


def _is_importing(frame: FrameType) -> bool:
  file = frame.f_code.co_filename
  return file.startswith("<frozen") or "importlib" in pathlib.Path(file).parts


def _raised_by_us(error: Exception) -> bool:
  """Tests if a `raise` of this package raised it, with no user's code between.

  `int("x")` is a ValueError without a `raise`, and most likely a bug.
  """
  entries = []
  entry = error.__traceback__
  while entry is not None:
    entries.append(entry)
    entry = entry.tb_next
  return bool(entries) and _is_raise(entries[-1]) and (
      _is_ours(entries[-1].tb_frame)
      and all(_is_ours(entry.tb_frame) or _is_library(entry.tb_frame)
              for entry in entries))


def _is_raise(entry: TracebackType) -> bool:
  # The last instruction that ran: `raise` has an opcode of its own, while an
  # error inside a C function ends in a call.
  code = entry.tb_frame.f_code.co_code
  return dis.opname[code[entry.tb_lasti]] == "RAISE_VARARGS"


def _is_ours(frame: FrameType) -> bool:
  return pathlib.Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


def _is_library(frame: FrameType) -> bool:
  file = frame.f_code.co_filename
  return file.startswith(("<", *LIBRARIES))
