"""Cells of an evaluate stage, and the programs and sizes that they take.

A cell has budgets, samples and batches of its own.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from ml_collections import config_dict

from posttrain.evaluation import summary
from posttrain.model.config import ModelConfig
from posttrain.programs import sampling as sampling_programs
from posttrain.programs.program import Program
from posttrain.sampler import sampler as sampler_lib
from posttrain.stages import memory_estimate
from posttrain.stages.stage import PlannedStage, Sizes


def cells_of(section: config_dict.ConfigDict) -> list[summary.Cell]:
  """Lists the cells; the one without a budget is first."""
  asked = section.instructions
  return summary.cells(
      section.max_thinking_tokens, section.num_waits,
      section.wait_max_thinking_tokens) + summary.asking_cells(
          asked.tokens, asked.steps, asked.classes, forced=asked.forced)


def limits_of(
    section: config_dict.ConfigDict, cell: summary.Cell) -> sampler_lib.Limits:
  """The budgets of a cell's completions."""
  rollout = section.rollout
  return sampler_lib.Limits(
      max_tokens=rollout.max_tokens,
      max_thinking_tokens=cell.max_thinking_tokens,
      max_thinking_steps=cell.max_thinking_steps, num_waits=cell.num_waits,
      truncate=rollout.truncate)


def samples_of(section: config_dict.ConfigDict, cell: summary.Cell) -> int:
  """Completions per problem; majority votes take more without a budget."""
  samples = section.samples_per_problem
  if cell == summary.Cell():
    return max(samples, section.majority.max_samples)
  return samples


def batch_size(section: config_dict.ConfigDict, samples: int) -> int:
  """Problems that are asked together."""
  return max(1, section.rollout.max_num_seqs // samples)


def programs(stage: PlannedStage) -> Iterator[Program]:
  """Yields the programs of one cell for each shape.

  The shape depends on the samples, and on the waits where they count.
  """
  section, setup = stage.section, stage.setup
  rollout, count = section.rollout, section.problems.count
  waits = rollout.continuous_batching or rollout.wait_order == "draw"
  found: dict[tuple[int, int], Any] = {}
  for cell in cells_of(section):
    found.setdefault(
        (samples_of(section, cell), cell.num_waits if waits else 0), cell)
  several = [len(set(column)) > 1 for column in zip(*found, strict=True)]
  for (samples, _), cell in found.items():
    groups = batch_size(section, samples)
    if rollout.continuous_batching:  # All; enough for the engine's rows.
      groups = count or groups + 1
    detail = itertools.compress(
        (f"G={samples}", f"waits={cell.num_waits}"), several)
    yield from sampling_programs.of_rollout(
        stage.name, setup.sampler(rollout), stage.start,
        groups=min(groups, count) if count else groups, group_size=samples,
        limits=limits_of(section, cell),
        beside=stage.beside, detail=" ".join(detail), steps=False)


def memory(
    section: config_dict.ConfigDict, compute: config_dict.ConfigDict,
    model: ModelConfig,
) -> Sizes:
  """Weights, and the cache of the completions that are decoded together."""
  del compute
  samples = max(section.samples_per_problem, section.majority.max_samples)
  rows, count = section.rollout.max_num_seqs, section.problems.count
  if not section.rollout.continuous_batching:  # An engine has all its slots.
    rows = max(rows, samples)
    rows = min(rows, count * samples) if count else rows
  return Sizes(
      model, memory_estimate.of_rollout(section.rollout, rows), smaller={
          "sampling": {"rollout.max_num_seqs": "fewer",
                       "samples_per_problem": "fewer",
                       **memory_estimate.SMALLER_ROLLOUT}})
