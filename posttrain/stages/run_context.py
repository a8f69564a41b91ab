"""What the pipeline hands to a stage."""

import dataclasses
import pathlib

from ml_collections import config_dict

from posttrain import workdir as workdir_lib
from posttrain.telemetry import console as console_lib
from posttrain.text import render, thinking


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
  """

  name: str
  config: config_dict.ConfigDict
  workdir: workdir_lib.Workdir
  renderer: render.Renderer
  thinking_ids: thinking.ThinkingIds
  console: console_lib.Console

  @property
  def section(self) -> config_dict.ConfigDict:
    """The stage's own keys."""
    return self.config[self.name]

  @property
  def directory(self) -> pathlib.Path:
    return self.workdir.stage(self.name)
