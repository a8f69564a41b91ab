"""Programs, sizes and work of supervised fine-tuning, for plans and estimates.

  M: microbatches  R: rows of one, over all devices  T: length
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from posttrain import sharding
from posttrain.data import batches
from posttrain.model.config import ModelConfig
from posttrain.programs import abstract
from posttrain.programs.program import SCORING, TRAINING, Program
from posttrain.stages import memory_estimate, training
from posttrain.stages.planned_stage import PlannedStage
from posttrain.stages.stage import Pass, Sizes
from posttrain.text import render
from posttrain.train import microbatches


def programs(
    make: Callable[..., Any], stage: PlannedStage) -> Iterator[Program]:
  """The update, and the held-out loss where there is held-out data.

  Args:
    make: `sft.make_programs`.
  """
  section, (model, paths) = stage.section, stage.trained
  optimizer, update, sums = make(
      section, loss_chunk=stage.compute.loss_chunk)
  state = abstract.state_of(
      model, optimizer, paths, training.spike_rule(section))
  count = section.num_microbatches
  batch = microbatches.stack(
      batches.empty(**training.pick(section, "rows sequence_length")), count,
      put=sharding.abstract)
  yield Program(
      stage.name, "update", functools.partial(
          update.lower, state, batch, count),
      (state, batch), calls=1, unknown_trips=count)
  if section.eval_data.sources:
    yield Program(
        stage.name, "held_out", functools.partial(
            sums.lower, state.model, batch), (state.model, batch), SCORING,
        {"optimizer": state.opt_state})


def memory(
    section: config_dict.ConfigDict, compute: config_dict.ConfigDict,
    model: ModelConfig,
) -> Sizes:
  """Weights, optimizer and one microbatch."""
  whole, arguments = memory_estimate.of_trained(section, compute, model)
  rows = {"rows": "fewer", "sequence_length": "shorter"}
  return Sizes(
      whole.config, arguments | dict(
          rows=_rows(section), sequence_length=section.sequence_length),
      batch_tokens=section.rows * section.sequence_length,
      smaller={
          "training": {"num_microbatches": "more parts, each with fewer rows",
                       **rows},
          "optimizer": memory_estimate.smaller_moments(section),
          "batch": rows})


def work(
    section: config_dict.ConfigDict, mesh: sharding.MeshSizes) -> list[Pass]:
  """The microbatches of one update."""
  del mesh
  return [Pass(_rows(section), section.sequence_length,
               times=section.num_microbatches, backward=True)]


def _rows(section: config_dict.ConfigDict) -> int:
  """Rows of one microbatch."""
  return -(-section.rows // section.num_microbatches)


def padding(
    read_data: Callable[..., Any], stage: PlannedStage,
    renderer: render.Renderer, meshes: Mapping[str, sharding.MeshSizes],
) -> tuple[float, str]:
  """Packs the real data, as the stage would.

  Args:
    read_data: `sft.read_data`.
  """
  section, parts = stage.section, meshes[TRAINING].batch
  packed, _ = read_data(
      section, renderer, seed=stage.setup.config.seed, stage=stage.name)
  share = packed.report["padding_share"]
  multiple = section.num_microbatches * parts
  rows = -(-section.rows // multiple) * multiple
  text = f"{share:.1%} in the {section.rows} rows of the config's data"
  if rows > section.rows:
    text += f", and {rows - section.rows} empty rows for a mesh of {parts}"
  return 1 - (1 - share) * section.rows / rows, text
