"""A stage that is planned and not run: shapes in place of arrays.

`RunContext` is its counterpart of a stage that runs.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from posttrain import sharding
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.programs import abstract, transfer
from posttrain.programs.program import Program
from posttrain.rl import weight_sync
from posttrain.sampler import budget_tables
from posttrain.sampler import sampler as sampler_lib
from posttrain.stages import sampling, training
from posttrain.text import thinking
from posttrain.text import tokenizer as tokenizer_lib
from posttrain.train import microbatches
from posttrain.train import state as state_lib


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
  thinking_ids: thinking.ThinkingIds
  tables: budget_tables.BudgetTables
  tokenizer: tokenizer_lib.Tokenizer | None
  notes: tuple[str, ...] = ()

  def sampler(self, rollout: config_dict.ConfigDict) -> sampler_lib.Sampler:
    """The sampler of a section `rollout`."""
    tables, words = self.tables, rollout.get("suppress", ())
    if words and self.tokenizer:
      tables = sampling.make_tables(self.tokenizer, self.thinking_ids, words)
    elif words:  # Which tokens they are is data.
      tables = dataclasses.replace(
          tables, reflections=np.zeros(tables.vocab_size, bool))
    return sampling.of_tables(self.thinking_ids, tables, rollout)


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
    return abstract.trained(
        self.setup.model, training.plan(self.section, self.compute))

  def state(self, optimizer: Any) -> state_lib.TrainState:
    """The training state before an update."""
    return abstract.state_of(
        *self.trained, optimizer, training.spike_rule(self.section))

  def update(
      self, optimizer: Any, update: Any, batch: Mapping[str, np.ndarray],
      num_microbatches: int,
  ) -> Program:
    """The program of an update; its arguments are the state and the batch.

    Args:
      optimizer, update: of `training.make_update`.
      batch: of the shapes of the stage's batches.
    """
    state = self.state(optimizer)
    stacked = microbatches.stack(
        batch, num_microbatches, put=sharding.abstract)
    return Program(
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
