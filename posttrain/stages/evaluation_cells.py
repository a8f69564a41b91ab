"""Cells of an evaluate stage: budgets, samples and batches of each."""

from ml_collections import config_dict

from posttrain.evaluation import summary
from posttrain.sampler import sampler as sampler_lib


def cells_of(section: config_dict.ConfigDict) -> list[summary.Cell]:
  """The free cell first."""
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


def samples_of_cells(section: config_dict.ConfigDict) -> dict[str, int]:
  """Completions per problem in each cell, by its name."""
  samples = section.samples_per_problem
  return {
      cell.name: max(samples, section.majority.max_samples)
      if cell == summary.Cell() else samples
      for cell in cells_of(section)}


def batch_size(section: config_dict.ConfigDict, samples: int) -> int:
  """Problems that are asked together."""
  return max(1, section.rollout.max_num_seqs // samples)
