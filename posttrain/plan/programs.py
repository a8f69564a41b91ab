"""Programs that the stages of a config would run, on abstract arrays.

Nothing is copied from the stages: each makes the jitted functions and the
arrays that it runs, and is asked for shapes in place of arrays
(`sharding.abstract`).
"""

from collections.abc import Iterator

import jax

from posttrain.model.transformer import Transformer
from posttrain.programs import abstract, transfer
from posttrain.programs.program import Program
from posttrain.stages.planned_stage import PlannedStage, Setup
from posttrain.stages.stage import Stage, stage_of


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
  model: Transformer = abstract.model_of(setup.model)
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
          if record.learns_from_rollouts]
