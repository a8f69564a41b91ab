"""Run context: what the pipeline hands to a stage."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NoReturn

from ml_collections import config_dict

from posttrain import workdir as workdir_lib
from posttrain.model.transformer import Transformer
from posttrain.telemetry import console as console_lib
from posttrain.telemetry import metrics
from posttrain.text import render, thinking
from posttrain.train import preemption


@dataclasses.dataclass(frozen=True)
class RunContext:
  """One stage of one run. The mesh is set by the caller (`jax.set_mesh`).

  Attributes:
    name: of the stage; names its section, its directory and its metrics.
    config: the whole config, resolved.
    workdir: paths; process 0 alone writes.
    renderer: rows to tokens; has the tokenizer.
    thinking_ids: the thinking strings as token ids.
    console: quiet on all hosts but the first.
    weights_of: loads weights by a stage's name, "init" or a path.
    again: results that are there are made anew (`posttrain eval`).
  """

  name: str
  config: config_dict.ConfigDict
  workdir: workdir_lib.Workdir
  renderer: render.Renderer
  thinking_ids: thinking.ThinkingIds
  console: console_lib.Console
  weights_of: Callable[[str], Transformer]
  again: bool = False

  @property
  def section(self) -> config_dict.ConfigDict:
    """The stage's own keys."""
    return self.config[self.name]

  @property
  def directory(self) -> pathlib.Path:
    """The stage's directory; made where this process writes."""
    return self.workdir.stage(self.name)

  def leave(self, kept: str) -> NoReturn:
    """Ends the process with the preempted status; `kept` says what stays."""
    message = (
        f"{self.name}: SIGTERM; {kept}. The same command goes on from there.")
    self.console.line(message)  # The exit status alone says little.
    raise preemption.Preempted(message)

  def warn_of_missing_rows(self, last: int) -> None:
    """Says which steps of 1..`last` have no row in metrics.jsonl, if any.

    They cannot be told from elsewhere: TensorBoard's events have 32 bits, and
    lack what was not flushed.
    """
    if not self.workdir.is_writer:
      return
    path = self.workdir.metrics
    lost = metrics.missing(
        metrics.read(path) if path.exists() else [], self.name, last)
    if lost:
      self.console.warning(
          f"{self.name}: {path} HAS NO ROWS of step {lost}, which the stage "
          "has made. The file was cut or is not that of this run; the weights "
          "do not depend on it. Put the rows back from a copy, if there is "
          "one.")
