"""Checkpoint integrity: errors of reading and writing, the same on all hosts.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from posttrain import sharding
from posttrain.workdir import StorageError


class DamagedError(StorageError):
  """A checkpoint exists and cannot be read; every host raises it."""


def damaged(path: epath.Path, what: str) -> DamagedError:
  return DamagedError(
      f"Checkpoint {path} could not be read: {what}. A file in it is damaged "
      "or missing. Move that step's directory away, and the run goes on from "
      "the checkpoint before it, or starts anew. With the stage's "
      "checkpoint.on_damaged=previous it does so by itself.")


@contextlib.contextmanager
def on_every_host(path: epath.Path) -> Iterator[None]:
  """Raises on all hosts if reading failed on one, as `errors_name` does.

  Each host reads its own files. All must take the same way afterwards: a host
  that goes on alone waits in the next collective.
  """
  # The error is kept until all hosts have finished reading.
  error: DamagedError | None = None
  try:
    with errors_name(path, "read"):
      yield
  except DamagedError as found:
    error = found
  if sharding.on_any_host(error is not None):
    raise error or damaged(path, "another host found it so, and says why")


@contextlib.contextmanager
def errors_name(path: epath.Path, verb: str) -> Iterator[None]:
  """Turns any error of a storage layer into one that names the path."""
  try:
    yield
  except Exception as error:  # Tensorstore's errors have no common type.
    text = " ".join(str(error).split())  # In one line.
    what = f"{type(error).__name__}: {text[:500]}"
    if verb == "read":
      raise damaged(path, what) from error
    if verb == "opened":
      raise DamagedError(
          f"{path} could not be opened: {what}. A file of a checkpoint in it "
          "is damaged. Move that step's directory away, and the run goes on "
          "from the checkpoint before it.") from error
    raise StorageError(
        f"Checkpoint {path} could not be written: {what}. Is the disk full? "
        "Earlier checkpoints are untouched.") from error


def say_errors_once() -> None:
  """Stops storage layers from printing errors that they also raise.

  Orbax logs each error from several threads, and Tensorstore's pending writes
  find their event loop closed. A full disk would otherwise print screens of
  that above the line that helps.
  """
  logging.getLogger("absl").addFilter(_is_not_raised)
  if not isinstance(sys.unraisablehook, _UnraisableHook):
    sys.unraisablehook = _UnraisableHook(sys.unraisablehook)


def _is_not_raised(record: logging.LogRecord) -> bool:
  return not (record.exc_info and "orbax" in record.pathname)


class _UnraisableHook:
  """Python's hook, without errors of callbacks into a closed event loop."""

  def __init__(self, before: Callable[[Any], Any]):
    self._before = before

  def __call__(self, unraisable: Any) -> None:
    if not (isinstance(unraisable.exc_value, RuntimeError)
            and str(unraisable.exc_value) == "Event loop is closed"):
      self._before(unraisable)
