"""Checkpoints that cannot be read or written: what to say, on which hosts."""

import contextlib
from collections.abc import Iterator

from etils import epath

from posttrain import sharding
from posttrain.workdir import StorageError


class DamagedError(StorageError):
  """A checkpoint that is there cannot be read; every host raises it."""


def damaged(path: epath.Path, what: str) -> DamagedError:
  return DamagedError(
      f"Checkpoint {path} could not be read: {what}. A file in it is damaged "
      "or missing. Move that step's directory away, and the run goes on from "
      "the checkpoint before it, or starts anew. With the stage's "
      "checkpoint.on_damaged=previous it does so by itself.")


@contextlib.contextmanager
def on_every_host(path: epath.Path) -> Iterator[None]:
  """`errors_name` of reading, on all hosts if it is on one.

  Each host reads its own files, and what one does next all have to do.
  """
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
  """Turns whatever a storage layer raises into an error with the path."""
  try:
    yield
  except Exception as error:  # Tensorstore's errors have no common type.
    what = f"{type(error).__name__}: {str(error)[:500]}"
    if verb == "read":
      raise damaged(path, what) from error
    raise StorageError(
        f"Checkpoint {path} could not be written: {what}. Is the disk full? "
        "Earlier checkpoints are untouched.") from error
