"""Programs and padding of a config's stages, on abstract arrays.

Nothing is copied from the stages: each makes the jitted functions and the
arrays that it runs, and is asked for shapes in place of arrays
(`sharding.abstract`).
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax

from posttrain import sharding
from posttrain.model.transformer import Transformer
from posttrain.programs import transfer
from posttrain.programs.program import Program, model_of
from posttrain.stages.stage import PlannedStage, Setup, Stage, stage_of
from posttrain.text import render


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
          if record.learns_from_rollouts]


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
        renderer = render.make_renderer(
            setup.tokenizer, setup.config.chat_template)
        share, text = measure(stage, renderer, meshes)
        found.append(Padding(stage.name, what, share, text))
      except (ValueError, OSError) as error:
        found.append(Padding(stage.name, what, None, f"unknown: {error}"))
  return found
