"""Journals of a stage: calls that have ended in batches no checkpoint holds.

  <stage>/journal/step_000004        RL: by the updates before the batch
  <stage>/journal/<checkpoint>/<cell>       evaluation

They are process 0's. A start that begins a batch again is told what its calls
gave, see `episodes.journal`. A file is removed when a checkpoint, or the file
of a cell, holds what was made of it.
"""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

from posttrain.episodes import journal
from posttrain.stages import facts
from posttrain.stages.run_context import RunContext
from posttrain.train import health


class Journals:
  """Journals of one stage; without effect on all hosts but the first."""

  def __init__(self, context: RunContext):
    self._context = context
    self._folder = context.directory / "journal"
    self._facts = facts.of_results(context) | {
        "renderer": context.renderer.hash}

  def of_batch(self, step: int) -> journal.Journal | None:
    """Opens the journal of a batch; removes those that are not needed.

    Args:
      step: updates made before it.
    """
    if not self._context.workdir.is_writer:
      return None
    saved = _newest_checkpoint(self._context)
    for path in self._folder.glob("step_*"):
      # Such a batch is in that checkpoint, or was learned from before it.
      if int(path.name.rpartition("_")[2]) < saved:
        path.unlink()
    return self._open(f"step_{step:06d}", step=step)

  def of_cell(self, checkpoint: str, cell: str) -> journal.Journal | None:
    """Opens the journal of a cell of an evaluation.

    Args:
      checkpoint: its name, as that of a file.
      cell: its name.
    """
    if not self._context.workdir.is_writer:
      return None
    return self._open(f"{checkpoint}/{cell}", checkpoint=checkpoint, cell=cell)

  def _open(self, name: str, **more: Any) -> journal.Journal:
    context = self._context
    return journal.Journal(
        self._folder / name, self._facts | more, say=context.console.line,
        check=context.workdir.check_known_lease)

  def clear(self) -> None:
    """Removes all, once the stage's results are written."""
    if self._context.workdir.is_writer and self._folder.exists():
      shutil.rmtree(self._folder)


@contextlib.contextmanager
def kept(context: RunContext) -> Iterator[None]:
  """Keeps the stage's journals where a run is killed, or told to go.

  They are removed when the stage has finished, and also where a person is to
  mend something: a health rule has stopped the run, or Ctrl-C. Errors of a
  judge that was not there would otherwise be told again.
  """
  try:
    yield
  except (health.HealthError, KeyboardInterrupt):
    Journals(context).clear()
    raise
  Journals(context).clear()


def _newest_checkpoint(context: RunContext) -> int:
  """Returns the step of the newest one that is whole; 0 without one."""
  # One that is being written has a name that is no number.
  return max((
      int(path.name)
      for path in context.workdir.checkpoints(context.name).glob("*")
      if path.name.isdecimal()), default=0)
