"""Reads workdirs for the page, and reports what is missing in them.

These files are read, and nothing else (all paths within a workdir):

  config.json, environment.json     as `posttrain.workdir` writes them
  metrics.jsonl                     {"stage", "step", name: number | null, ...}
  <stage>/done.json                 its presence: the stage has finished
  <stage>/data_report.json          nested dicts of numbers
  <stage>/goodput.json              where its wall time went, see `goodput`
  <stage>/rollouts/step_*.jsonl     one completion a line
  <stage>/eval/<checkpoint>.json    one evaluated checkpoint each
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from posttrain import workdir as workdir_lib
from posttrain.stages import stage as stage_lib
from posttrain.telemetry import goodput, metrics
from posttrain.telemetry.charts import Chart

# What the page takes from each cell of an evaluation, and from a completion.
CELL = ("name", "accuracy", "mean_thinking_tokens", "max_thinking_tokens",
        "num_waits")
COMPLETION = ("prompt", "completion", "segments", "prompt_id", "sample_id")


@dataclasses.dataclass
class Stage:
  """One stage of one run.

  Attributes:
    kind: as the config has it.
    has_steps: its rows are one for each step, and are drawn as curves.
    charts: the series that its kind draws together.
    finished: it wrote its done.json.
    rows: its rows of metrics.jsonl.
    data_report: of the training data, or None.
    goodput: the record of its wall time, or None.
    rollouts: step -> completions, as saved.
    evaluations: one dict per checkpoint, in the order of the config.
  """

  name: str
  kind: str
  has_steps: bool
  charts: Sequence[Chart]
  finished: bool
  rows: list[dict[str, Any]]
  data_report: dict[str, Any] | None
  goodput: dict[str, Any] | None
  rollouts: dict[int, list[dict[str, Any]]]
  evaluations: list[dict[str, Any]]


@dataclasses.dataclass
class Run:
  """One workdir.

  Attributes:
    label: what the page calls it.
    environments: one entry per start.
    missing: sentences about what was not found.
  """

  label: str
  path: pathlib.Path
  config: dict[str, Any]
  environments: list[dict[str, Any]]
  stages: list[Stage]
  missing: list[str]


def read_runs(paths: Sequence[str | os.PathLike]) -> list[Run]:
  """Reads each workdir once, labelled by its last distinct path part.

  Raises:
    WorkdirError: a directory holds no run, or a file in it is damaged.
  """
  found = list(dict.fromkeys(pathlib.Path(path).resolve() for path in paths))
  if not found:
    raise ValueError("A report needs at least one workdir.")
  names = [path.name for path in found]
  labels = [
      path.name if names.count(path.name) == 1 else str(path)
      for path in found]
  return [_run(path, label) for path, label in zip(found, labels, strict=True)]


def _run(path: pathlib.Path, label: str) -> Run:
  workdir = workdir_lib.open_existing(path, is_writer=False)
  config = _config(path / "config.json")
  missing: list[str] = []
  rows: list[dict[str, Any]] = []
  if workdir.metrics.exists():
    rows = metrics.read(workdir.metrics)
  else:
    missing.append("There is no metrics.jsonl, so there are no curves.")
  environments = workdir.environments()
  if not environments:
    missing.append("There is no environment.json.")
  stages = [
      _stage(workdir, name, config[name]["kind"],
             [row for row in rows if row["stage"] == name],
             ("init", *config["stages"]), missing)
      for name in config["stages"]]
  return Run(label, path, config, environments, stages, missing)


def _config(path: pathlib.Path) -> dict[str, Any]:
  """Reads a config as it was saved, by an older version too."""
  found = workdir_lib.read_object(path, "stages")
  stages = found["stages"]
  if not isinstance(stages, list) or not all(
      isinstance(name, str) and isinstance(found.get(name), dict)
      and isinstance(found[name].get("kind"), str) for name in stages):
    raise workdir_lib.damaged(path, "it has no sections of its stages")
  return found


def _stage(
    workdir: workdir_lib.Workdir, name: str, kind: str,
    rows: list[dict[str, Any]], order: Sequence[str], missing: list[str],
) -> Stage:
  directory, record = workdir.path / name, _record(name, kind, missing)
  either = lambda name, read: (
      read(directory / name) if (directory / name).exists() else None)
  leaves = record.leaves if record else ()
  done = workdir.finished(name, *(["step"] if "rows" in leaves else []))
  stage = Stage(
      name=name, kind=kind,
      has_steps="rows" in leaves if record and record.leaves else bool(rows),
      charts=record.charts if record else (), finished=done is not None,
      rows=sorted(rows, key=lambda row: row["step"]),
      data_report=either("data_report.json", workdir_lib.read_object),
      goodput=either("goodput.json", goodput.read),
      rollouts=_rollouts(directory / "rollouts"),
      evaluations=_evaluations(directory / "eval", order))
  if not directory.exists() and not rows:
    missing.append(f"Stage {name} has not started.")
  else:
    missing += _missing(stage, leaves, done)
  return stage


def _record(
    name: str, kind: str, missing: list[str]) -> stage_lib.Stage | None:
  """Finds the record of a kind; None where it is not known here any more."""
  try:
    return stage_lib.stage_of(kind)
  except Exception as error:  # A file of the user's own may raise anything.
    missing.append(
        f"The kind of stage {name}, {kind!r}, is not known here: "
        f"{str(error).rstrip('.')}. It is shown as far as its files allow.")
    return None


def _missing(
    stage: Stage, leaves: Sequence[str], done: dict[str, Any] | None,
) -> Iterator[str]:
  """Lists files that a stage that has started should have left."""
  name, rows = stage.name, stage.rows
  if not stage.finished:
    last = f" (step {rows[-1]['step']})" if rows else ""
    yield f"Stage {name} has not finished{last}."
  if "rows" in leaves and not rows:
    yield f"Stage {name} has no metrics."
  elif "rows" in leaves and (lost := metrics.missing(
      rows, name, (done or rows[-1])["step"])):
    yield f"metrics.jsonl has no rows of {name}, step {lost}."
  if "rollouts" in leaves and not stage.rollouts:
    yield f"Stage {name} has saved no rollouts."
  if "evaluations" in leaves and not stage.evaluations:
    yield f"Stage {name} has no results yet."
  elif "evaluations" in leaves and len(stage.evaluations) < len(done or ()):
    yield (f"Stage {name} has {len(stage.evaluations)} of {len(done or ())} "
           "results.")


def _rollouts(directory: pathlib.Path) -> dict[int, list[dict[str, Any]]]:
  return {
      int(file.stem.removeprefix("step_")): read_lines(file)
      for file in sorted(directory.glob("step_*.jsonl"))
      if file.stem.removeprefix("step_").isdecimal()}


def _evaluations(
    directory: pathlib.Path, order: Sequence[str],
) -> list[dict[str, Any]]:
  """Reads results: starting weights, then stages in order, then others."""
  results = [_evaluation(file) for file in sorted(directory.glob("*.json"))]
  place = lambda result: (
      order.index(result["checkpoint"]) if result["checkpoint"] in order
      else len(order))
  return sorted(results, key=place)


def _evaluation(path: pathlib.Path) -> dict[str, Any]:
  found = workdir_lib.read_object(path, "checkpoint", "cells")
  _check(path, found["cells"], CELL)
  _check(path, found.get("records", []), ("cell", "id", *COMPLETION))
  return found


def _check(path: pathlib.Path, rows: Any, needed: Sequence[str]) -> None:
  """Raises WorkdirError where rows are no objects with these keys."""
  if not isinstance(rows, list) or not all(
      isinstance(row, dict) and set(needed) <= set(row) for row in rows):
    raise workdir_lib.damaged(
        path, f"needed a list of objects with {', '.join(needed)}")


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the completions of a JSONL file.

  Raises:
    WorkdirError: a line holds none; names file and line.
  """
  rows = []
  # Not `splitlines`: a completion may hold U+2028 and the like unescaped.
  lines = workdir_lib.read_text(path).split("\n")
  for number, line in enumerate(lines, start=1):
    if not line:
      continue
    try:
      rows.append(json.loads(line))
    except (json.JSONDecodeError, RecursionError) as error:
      raise workdir_lib.damaged(path, f"line {number}, {error}") from error
  _check(path, rows, COMPLETION)
  return rows
