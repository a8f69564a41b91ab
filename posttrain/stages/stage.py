"""The record by which a kind of stage describes itself.

`pipeline`, `plan`, `report`, the memory estimate and the checks ask it, and
know no kind by its name. A stage that runs is given a `RunContext`; one that is
planned, a `PlannedStage`, with shapes in place of arrays.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from posttrain import sharding, weights
from posttrain.config import stages
from posttrain.config.stages import StageSchema
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.programs import program, transfer
from posttrain.rl import weight_sync
from posttrain.sampler import budget_tables
from posttrain.sampler import sampler as sampler_lib
from posttrain.stages import sampling, training
from posttrain.stages.run_context import RunContext
from posttrain.tasks import loading
from posttrain.telemetry.charts import Chart
from posttrain.text import render
from posttrain.text import tokenizer as tokenizer_lib
from posttrain.train import state as state_lib
from posttrain.train import step, trainable


@dataclasses.dataclass(frozen=True)
class Setup:
  """A config as far as its programs need it, without weights and data.

  Attributes:
    model: with the vocabulary filled in.
    tokenizer: None where it is not on this machine.
    notes: assumptions, for the report.
  """

  config: config_dict.ConfigDict
  model: ModelConfig
  tables: budget_tables.BudgetTables
  tokenizer: tokenizer_lib.Tokenizer | None
  notes: tuple[str, ...] = ()

  def sampler(self, rollout: config_dict.ConfigDict) -> sampler_lib.Sampler:
    """The sampler of a section `rollout`."""
    tables, words = self.tables, rollout.get("suppress", ())
    if words and self.tokenizer:
      tables = sampling.make_tables(self.tokenizer, tables.ids, words)
    elif words:  # Which tokens they are is data.
      tables = dataclasses.replace(
          tables, reflections=np.zeros(tables.vocab_size, bool))
    return sampling.of_tables(tables, rollout)


@dataclasses.dataclass(frozen=True)
class PlannedStage:
  """One stage of a config, on abstract arrays on the current mesh.

  Attributes:
    start: the model as the stage before leaves it.
    beside: abstract arrays that the pipeline keeps on the devices meanwhile.
    sampling_mesh: of the devices that only sample; None if the roles share
      their devices.
  """

  name: str
  setup: Setup
  start: Transformer
  beside: dict[str, Any]
  sampling_mesh: jax.sharding.Mesh | None = None

  @property
  def section(self) -> config_dict.ConfigDict:
    return self.setup.config[self.name]

  @property
  def compute(self) -> config_dict.ConfigDict:
    return self.setup.config.compute

  @functools.cached_property
  def trained(self) -> tuple[Transformer, frozenset[str]]:
    """The model as the stage trains it, and the paths of what it trains."""
    whole, paths = trainable.abstract(
        self.setup.model, training.plan(self.section, self.compute))
    return weights.on_mesh(whole), paths

  def state(self, optimizer: Any) -> state_lib.TrainState:
    """The training state before an update."""
    model, paths = self.trained
    return weights.on_mesh(jax.eval_shape(
        lambda model: state_lib.create(
            model, optimizer, paths, training.spike_rule(self.section)), model))

  def update(
      self, optimizer: Any, update: Any, batch: Mapping[str, np.ndarray],
      num_microbatches: int,
  ) -> program.Program:
    """The program of an update; its arguments are the state and the batch.

    Args:
      optimizer, update: of `training.make_update`.
      batch: of the shapes of the stage's batches.
    """
    state = self.state(optimizer)
    stacked = step.stack(batch, num_microbatches, put=sharding.abstract)
    return program.Program(
        self.name, "update", functools.partial(
            update.lower, state, stacked, num_microbatches),
        (state, stacked), calls=1, unknown_trips=num_microbatches)

  @functools.cached_property
  def policy_there(self) -> Transformer:
    """The policy on the devices that only sample."""
    assert self.sampling_mesh is not None
    return weight_sync.wanted(
        self.setup.model, training.plan(self.section, self.compute),
        self.sampling_mesh, weights_dtype=self.section.rollout.weights_dtype)

  @property
  def transfer(self) -> transfer.Transfer:
    """The transfer of the policy to the devices that only sample."""
    return transfer.of_policy(self.name, *self.trained, self.policy_there)


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
  programs: Callable[[PlannedStage], Iterator[program.Program]] | None = None
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


def stage_of(kind: str) -> Stage:
  """Finds the record of a kind: a shipped one's, or `file.py:STAGE`'s.

  Raises:
    ValueError: there is no such kind.
  """
  stages.schema_of(kind)
  return loading.load(kind if ":" in kind else f"posttrain.stages.{kind}:STAGE")
