"""Shapes, programs and padding of a config's stages, on abstract arrays.

Nothing is copied from the stages: each makes the jitted functions and the
arrays that it runs, and is asked for shapes in place of arrays
(`sharding.abstract`).
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from ml_collections import config_dict

from posttrain import sharding, weights
from posttrain.model.transformer import Transformer
from posttrain.plan.environment import PlanError
from posttrain.programs import transfer
from posttrain.programs.program import Program, model_of
from posttrain.sampler import budget_tables
from posttrain.stages import sampling
from posttrain.stages.stage import PlannedStage, Setup, Stage, stage_of
from posttrain.text import thinking

# Fields of a kind's record, and what a plan does without them.
LACKING = {
    "programs": "no program of it is compiled",
    "memory": "its memory is that of its parameters alone",
    "work": "its steps are in no estimate of time"}


def set_up(config: config_dict.ConfigDict) -> Setup:
  """Finds the shapes of a config, with its tokenizer or without.

  Raises:
    PlanError: the vocabulary is the tokenizer's, and that cannot be read.
  """
  strings = thinking.Thinking(**config.thinking)
  notes = tuple(
      f"{name}: the kind {config[name].kind} gives no `{field}`, so {effect}."
      for name in config.stages for field, effect in LACKING.items()
      if getattr(stage_of(config[name].kind), field) is None)
  try:
    tokenizer = weights.tokenizer(config, None)
  except (ValueError, OSError) as error:
    return _without_tokenizer(config, strings, error, notes)
  return Setup(
      config, weights.model_config(config, tokenizer.vocab_size),
      sampling.make_tables(tokenizer, thinking.resolve(strings, tokenizer)),
      tokenizer, notes)


def _without_tokenizer(
    config: config_dict.ConfigDict, strings: thinking.Thinking,
    error: Exception, notes: tuple[str, ...],
) -> Setup:
  size = weights.model_config(config, 0).vocab_size
  if not size:
    raise PlanError(
        "the vocabulary is that of the tokenizer, which cannot be read here: "
        f"{error} Set model_overrides.vocab_size for the plan.") from error
  numbers = iter(range(1, size))
  one = lambda text: (next(numbers),) if text else ()
  ids = thinking.ThinkingIds(
      start=one(strings.start), end=one(strings.end),
      newline=one(strings.newline), final_answer=one(strings.final_answer),
      wait=one(strings.wait_text),
      more_waits=tuple(map(one, strings.more_wait_texts)))
  tables = budget_tables.BudgetTables.of_ids(
      ids, (0,), np.zeros(size, bool), step=one(strings.step),
      delimiters=map(one, strings.delimiters))
  return Setup(
      config, weights.model_config(config, size), tables, None, (
          *notes, f"The tokenizer is not here ({error}): the vocabulary is the "
          f"model's {size}, and each thinking string counts as one token.",))


@dataclasses.dataclass(frozen=True)
class Padding:
  """Padding that one stage computes.

  Attributes:
    what: rows or tokens that are padded.
    share: of the positions; None where it is unknown.
    text: the source of the figure, or why it is not known.
  """

  stage: str
  what: str
  share: float | None
  text: str


def of_config(
    setup: Setup, sampling: jax.sharding.Mesh | None = None,
) -> Iterator[Program]:
  """Yields the programs of all stages, in order.

  Args:
    sampling: the mesh of the programs whose role is to sample, if it has
      devices of its own. All others are on the current mesh.
  """
  for stage, record in planned(setup, sampling):
    if record.programs is not None:
      yield from record.programs(stage)


def planned(
    setup: Setup, sampling: jax.sharding.Mesh | None = None,
) -> Iterator[tuple[PlannedStage, Stage]]:
  """Yields the stages of a config, each from the model of the one before."""
  model: Transformer = model_of(setup.model)
  trained = False
  for name in setup.config.stages:
    record = stage_of(setup.config[name].kind)
    # The pipeline keeps what was trained last while other stages run that do
    # not train.
    stage = PlannedStage(
        name, setup, model, {"trained weights": model} if (
            trained and not record.schema.trains) else {}, sampling)
    yield stage, record
    if record.schema.trains:
      (model, _), trained = stage.trained, True


def transfers(
    setup: Setup, sampling: jax.sharding.Mesh) -> list[transfer.Transfer]:
  """Lists the transfers of stages that learn from rollouts of other devices."""
  return [stage.transfer for stage, record in planned(setup, sampling)
          if record.schema.learns_from_rollouts]


def padding(
    setup: Setup, meshes: Mapping[str, sharding.MeshSizes],
) -> list[Padding]:
  """Measures the padding of every stage that has some, on its role's mesh."""
  found = []
  for stage, record in planned(setup):
    for what, measure in record.padding.items():
      try:
        if setup.tokenizer is None:
          raise ValueError("the tokenizer is not here")
        renderer = weights.make_renderer(setup.config, setup.tokenizer)
        share, text = measure(stage, renderer, meshes)
        found.append(Padding(stage.name, what, share, text))
      except (ValueError, OSError) as error:
        found.append(Padding(stage.name, what, None, f"unknown: {error}"))
  return found
