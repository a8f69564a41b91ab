"""The record by which a kind of stage describes itself.

`pipeline`, `plan`, `report`, the memory estimate and the checks ask it, and
know no kind by its name.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from posttrain import sharding
from posttrain.config import stages
from posttrain.config.stages import StageSchema
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.programs.program import Program
from posttrain.stages.planned_stage import PlannedStage
from posttrain.stages.run_context import RunContext
from posttrain.tasks import loading
from posttrain.telemetry.charts import Chart
from posttrain.text import render


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a stage's arrays, whatever the mesh.

  Attributes:
    model: as the stage has it, with its adapters.
    arguments: of `telemetry.memory.estimate`, without the mesh's.
    batch_tokens: tokens of a batch in the memory of its host.
    smaller: keys of the section that make a part smaller, and how:
      `{"training": {"rows": "fewer"}}`. The parts are "training" (a forward
      or backward pass), "optimizer", "sampling" and "batch".
    note: says what the estimate leaves out.
  """

  model: ModelConfig
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  batch_tokens: int = 0
  smaller: Mapping[str, Mapping[str, str]] = dataclasses.field(
      default_factory=dict)
  note: str = ""

  def keys(
      self, stage: str, section: config_dict.ConfigDict, part: str,
  ) -> list[str]:
    """Keys that make a part smaller, such as `warm_up.rows=8 (fewer)`."""
    return [
        f"{stage}.{path}="
        f"{functools.reduce(operator.getitem, path.split('.'), section)} "
        f"({how})" for path, how in self.smaller.get(part, {}).items()]


@dataclasses.dataclass(frozen=True)
class Pass:
  """Forward passes over packed rows, with or without their backward passes.

  Attributes:
    rows, length: of one microbatch, over all devices.
    times: microbatches of a step.
  """

  rows: int
  length: int
  times: int
  backward: bool


@dataclasses.dataclass(frozen=True)
class Decoding:
  """Completions that are decoded together, all to their maximum.

  Attributes:
    rows: completions, over all devices.
    slots: of the cache of one, its prompt among them.
    steps: tokens of a completion.
    cache_dtype, weights_dtype: "compute" or "int8".
  """

  rows: int
  slots: int
  steps: int
  cache_dtype: str = "compute"
  weights_dtype: str = "compute"


def _nothing(context: RunContext) -> None:
  """Checks nothing."""


def _trained(context: RunContext) -> int | None:
  """The last step of a finished training stage."""
  summary = context.workdir.finished(context.name, "step")
  return summary["step"] if summary else None


@dataclasses.dataclass(frozen=True)
class Stage:
  """One kind of stage.

  A plan or an estimate that lacks a field says so, and goes on without it.

  Attributes:
    schema: keys and checks. A stage that trains has the keys `trained` and
      `lora` (`config.stages.training.shared`).
    run: (context, start) -> the trained model, or `start` of a stage that
      does not train, for which it may be None.
    check: looks at problems and budgets before the first stage, on process
      0; raises ValueError.
    finished: the number of the last row of metrics of a stage that has
      finished, or None; on process 0. A WorkdirError names a damaged file.
    programs: yields all that the stage jits, on abstract arrays, for a plan.
    memory: (section, config.compute, the model's shape) -> sizes of what lies
      on a device. It is traced on whatever mesh there is.
    work: (section, sizes of the mesh) -> passes of the model in one step, for
      a bound of its time before anything is compiled.
    padding: of a plan: name of what is padded -> (stage, renderer, sizes of
      each role's mesh) -> its share of the positions, and where the figure is
      from. Raises ValueError or OSError where it is unknown.
    charts: metrics that the report draws together. It draws the others one
      by one.
    leaves: what the report expects in the workdir: "rows" of metrics, one
      for each step up to `step` of done.json; "rollouts"; "evaluations".
  """

  schema: StageSchema
  run: Callable[[RunContext, Any], Transformer | None]
  check: Callable[[RunContext], None] = _nothing
  finished: Callable[[RunContext], int | None] = _trained
  programs: Callable[[PlannedStage], Iterator[Program]] | None = None
  memory: Callable[[
      config_dict.ConfigDict, config_dict.ConfigDict, ModelConfig,
  ], Sizes] | None = None
  work: Callable[
      [config_dict.ConfigDict, sharding.MeshSizes],
      Sequence[Pass | Decoding]] | None = None
  padding: Mapping[str, Callable[
      [PlannedStage, render.Renderer, Mapping[str, sharding.MeshSizes]],
      tuple[float, str]]] = dataclasses.field(default_factory=dict)
  charts: tuple[Chart, ...] = ()
  leaves: tuple[str, ...] = ()

  def __post_init__(self):
    """Raises ValueError where the schema lacks keys of a training stage."""
    lacking = {"trained", "lora"} - set(self.schema.keys.keys)
    if self.schema.trains and lacking:
      raise ValueError(
          f"A stage that trains has no key {' and '.join(sorted(lacking))}. "
          "Add **posttrain.config.stages.training.shared() to the keys of "
          "its schema.")

  @property
  def learns_from_rollouts(self) -> bool:
    """It trains on its own completions, maybe on other devices' (roles)."""
    return self.schema.trains and self.schema.samples


def stage_of(kind: str) -> Stage:
  """Finds the record of a kind: a shipped one's, or `file.py:STAGE`'s.

  Raises:
    ValueError: there is no such kind.
  """
  stages.schema_of(kind)
  return loading.load(kind if ":" in kind else f"posttrain.stages.{kind}:STAGE")
