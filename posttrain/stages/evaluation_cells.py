"""Cells of an evaluate stage: programs and sizes, and those that are kept.

A cell has budgets, samples and batches of its own. Those that are finished are
kept until all of the evaluation is:

  <stage>/eval/cells/<checkpoint>/<cell>.json

A cell may take an hour. One that is finished is written at once, and a restart
takes its records as they are: figures are made from records alone. A file names
what it was made with (`facts`), and another run ignores it.
"""

import itertools
import shutil
from collections.abc import Iterator
from typing import Any

from ml_collections import config_dict

from posttrain import distributed
from posttrain import workdir as workdir_lib
from posttrain.evaluation import summary
from posttrain.model.config import ModelConfig
from posttrain.programs import engine as engine_programs
from posttrain.programs.program import Program
from posttrain.sampler import sampler as sampler_lib
from posttrain.stages import facts, memory_estimate
from posttrain.stages.run_context import RunContext
from posttrain.stages.stage import PlannedStage, Sizes

Records = list[dict[str, Any]]


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


def programs(stage: PlannedStage) -> Iterator[Program]:
  """Yields the programs of one cell for each shape.

  The shape depends on the samples, and on the waits where they count.
  """
  section, setup = stage.section, stage.setup
  rollout, count = section.rollout, section.problems.count
  found: dict[tuple[int, int], Any] = {}
  for cell in cells_of(section):
    found.setdefault((samples_of(section, cell), cell.num_waits), cell)
  several = [len(set(column)) > 1 for column in zip(*found, strict=True)]
  for (samples, _), cell in found.items():
    detail = itertools.compress(
        (f"G={samples}", f"waits={cell.num_waits}"), several)
    # The problems are not read: more than decode together stand for all.
    groups = count or rollout.max_num_seqs // samples + 1
    yield from engine_programs.of_rollout(
        stage.name, setup.sampler(rollout), stage.start, groups=groups,
        group_size=samples, limits=limits_of(section, cell),
        beside=stage.beside, detail=" ".join(detail), steps=False)


def memory(
    section: config_dict.ConfigDict, compute: config_dict.ConfigDict,
    model: ModelConfig,
) -> Sizes:
  """Weights, and the cache of the completions that are decoded together."""
  del compute
  samples = max(section.samples_per_problem, section.majority.max_samples)
  rows, count = section.rollout.max_num_seqs, section.problems.count
  rows = min(rows, count * samples) if count else rows
  return Sizes(
      model, memory_estimate.of_rollout(section.rollout, rows), smaller={
              "sampling": {"rollout.max_num_seqs": "fewer",
                           **memory_estimate.SMALLER_ROLLOUT}})


class KeptCells:
  """Kept cells of one evaluate stage; every host makes the same calls."""

  def __init__(self, context: RunContext):
    self._context = context
    self._folder = context.directory / "eval" / "cells"
    self._made_with = facts.of_results(context)

  def read(self, checkpoint: str, cell: summary.Cell) -> Records | None:
    """Reads a cell's records; None where there are none of these settings.

    Process 0 reads them, as a file may show up late on the other hosts. It
    sends them the values that figures are made from, and not the texts.
    """
    whole: Records | None = None

    def read() -> Records | None:
      nonlocal whole
      self._context.workdir.check_lease()  # Each cell; all hosts hear of it.
      whole = self._read(checkpoint, cell)
      return whole and [
          {name: record[name] for name in summary.SCORED_FROM}
          for record in whole]

    told = distributed.on_first_host(read)
    return told if whole is None else whole

  def _read(self, checkpoint: str, cell: summary.Cell) -> Records | None:
    file = self._file(checkpoint, cell)
    if not file.exists():
      return None
    try:
      found = workdir_lib.read_json(file)
      records, made_with = found["records"], found["made_with"]
    except (ValueError, KeyError, TypeError) as error:
      self._context.console.warning(
          f"{file} is damaged ({error}); the cell is evaluated again")
      return None
    if made_with != self._made_with:
      self._context.console.line(
          f"{file} was made with other settings; the cell is evaluated again")
      return None
    self._context.console.line(
        f"  {checkpoint} {cell.name}: kept from an earlier start")
    return records

  def write(
      self, checkpoint: str, cell: summary.Cell, records: Records) -> None:
    """Keeps a cell that is finished."""
    workdir = self._context.workdir
    workdir.write_json(
        self._file(checkpoint, cell).relative_to(workdir.path),
        {"made_with": self._made_with, "records": records})

  def clear(self) -> None:
    """Removes all kept cells, once the results hold their records."""
    if self._context.workdir.is_writer and self._folder.exists():
      shutil.rmtree(self._folder)

  def _file(self, checkpoint: str, cell: summary.Cell):
    return self._folder / checkpoint / f"{cell.name}.json"
