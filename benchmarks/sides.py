"""Sides of a comparison: variants of one program that take turns in a process.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks import shapes, turns
from posttrain.model.config import ModelConfig
from posttrain.sampler import budget_tables
from posttrain.text import thinking


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments that all comparisons have."""
  parser.add_argument("--size", choices=sorted(shapes.SIZES), default="10m")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--lock", action="append", default=[],
                      help="file to lock meanwhile; may be repeated")


def seconds(run: Callable[[], int], tokens: int) -> dict[str, float]:
  """Measures the seconds of a run, on the wall and of all cores.

  Raises:
    RuntimeError: the run made another number of tokens.
  """
  wall, cpu = time.perf_counter(), time.process_time()
  found = run()
  if found != tokens:
    raise RuntimeError(f"{found} tokens were drawn, and {tokens} asked for.")
  return {"wall": time.perf_counter() - wall,
          "cpu": time.process_time() - cpu}


def take(
    sides: dict[str, Callable[[], int]], tokens: int, *, repeats: int,
    locks: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
  """Measures each side in turns, after a warm-up; returns medians."""
  for run in sides.values():
    run()
  taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
  with turns.locked(locks):
    for number in range(repeats):
      order = list(sides) if number % 2 else list(sides)[::-1]
      for name in order:
        taken[name].append(seconds(sides[name], tokens))
  return {
      name: {clock: statistics.median(found[clock] for found in times)
             for clock in ("wall", "cpu")} for name, times in taken.items()}


def tables(
    config: ModelConfig, ids: thinking.ThinkingIds,
) -> budget_tables.BudgetTables:
  """Makes budget tables with which nothing but the budgets stops a row."""
  return budget_tables.BudgetTables.of_ids(
      ids, (), np.zeros(config.vocab_size, bool))
