"""Runs every entry of a config's sweep, one after the other.

  python -m launch.sweep --config=configs/tiny.py --workdir=runs/sweep
  python -m launch.sweep --config=configs/mine.py --workdir=/mnt/runs/sweep \\
      --dry-run --launcher='python -m launch.tpu_vm @pod.flags --name=s{number}'

`get_sweep()` of the config file yields dicts of overrides, as
{"reason.learning_rate": 1e-6}; all of their configs are checked before the
first starts. Each run has a workdir below --workdir that is named by its
overrides, so finished ones are skipped and the others go on, in any order and
after the sweep has grown. More --config.KEY=VALUE are for all runs. --dry-run
prints one line per run; with --launcher that line is a launcher's, and
{number} counts from 0. A table of the last figures ends it.

Status 0: all have finished; 1: some have not; 75: SIGTERM came, start again.
"""

import argparse
import dataclasses
import hashlib
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence

from launch import job as job_lib
from posttrain import config as config_lib
from posttrain import workdir as workdir_lib

HEADLINES = ("eval_loss", "loss", "reward")  # Of a training stage's last row.
LONGEST_NAME = 120


@dataclasses.dataclass(frozen=True)
class Run:
  """One entry of a sweep: overrides, workdir, and the command that runs it."""

  assignments: tuple[str, ...]
  workdir: pathlib.Path
  stages: tuple[str, ...]
  command: tuple[str, ...]

  def finished(self) -> bool:
    workdir = workdir_lib.Workdir(self.workdir, is_writer=False)
    return all(workdir.finished(stage) is not None for stage in self.stages)


def expand(
    spec: str, folder: str, common: Sequence[str], launcher: Sequence[str],
) -> list[Run]:
  """Lists the runs of a sweep, after checking all of their configs.

  Args:
    spec: the config, FILE[:ARG].
    folder: the folder of all workdirs.
    common: overrides for all runs.
    launcher: the words before `train ...`; {number} is the run's.

  Raises:
    ConfigError: a config is wrong, or there is no sweep.
  """
  runs = []
  for number, assignments in enumerate(config_lib.read_sweep(spec)):
    config = config_lib.load(spec, [*common, *assignments])
    path = pathlib.Path(folder, name(assignments))
    runs.append(Run(
        tuple(assignments), path, tuple(config.stages), (
            *(word.replace("{number}", str(number)) for word in launcher),
            "train", f"--config={spec}", f"--workdir={path}",
            *(f"--config.{change}" for change in [*common, *assignments]))))
  return runs


def name(assignments: Sequence[str]) -> str:
  """Names a run's folder by its overrides."""
  whole = ",".join(assignments) or "default"
  text = re.sub(r"[^\w.=,+-]", "_", whole)[:LONGEST_NAME]
  if text == whole:
    return text
  return f"{text}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def headline(run: Run) -> dict[str, str]:
  """Reads the last figures of each stage, by column."""
  from posttrain.telemetry import metrics
  file = run.workdir / "metrics.jsonl"
  last = {row["stage"]: row for row in (
      metrics.read(file) if file.exists() else ())}
  found = {f"{stage} {key}": f"{row[key]:.4g}"
           for stage, row in last.items() for key in HEADLINES
           if row.get(key) is not None}
  for stage in run.stages:
    for path in sorted((run.workdir / stage / "eval").glob("*.json")):
      free = workdir_lib.read_json(path)["cells"][0]
      error = free["standard_error"]  # None for a single problem.
      found[f"{stage} {path.stem}"] = f"{free['accuracy']:.3f}" + (
          "" if error is None else f" ± {error:.3f}")
  return found


def table(runs: Sequence[Run], states: Sequence[str]) -> str:
  """Formats one row per run: overrides, state and last figures."""
  figures = [headline(run) for run in runs]
  columns = list(dict.fromkeys(key for row in figures for key in row))
  rows = [["run", "state", *columns]] + [
      [" ".join(run.assignments), state,
       *(row.get(key, "-") for key in columns)]
      for run, state, row in zip(runs, states, figures, strict=True)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join("  ".join(
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)
  ).rstrip() for row in rows)


def run_all(runs: Sequence[Run]) -> list[str]:
  """Runs the entries that have not finished; returns the state of each."""
  stopped = False
  child: subprocess.Popen | None = None

  def stop(signum, unused_frame):
    nonlocal stopped
    stopped = True
    if child is not None:
      child.send_signal(signum)

  signal.signal(signal.SIGTERM, stop)
  states = []
  for number, run in enumerate(runs):
    print(f"== {number + 1} of {len(runs)}: {' '.join(run.assignments)}",
          flush=True)
    if run.finished():
      states.append("finished before")
    elif stopped:
      states.append("not started")
    else:
      child = subprocess.Popen(run.command)
      status = job_lib.exit_status(child.wait())
      stopped = stopped or status == job_lib.PREEMPTED
      states.append({0: "finished", job_lib.PREEMPTED: "preempted"}.get(
          status, f"failed ({status})"))
  return states


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Parses the flags, and the overrides for all runs."""
  parser = argparse.ArgumentParser(
      description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True, metavar="FILE[:ARG]")
  parser.add_argument("--workdir", required=True, help="of all runs")
  parser.add_argument("--launcher", default="", help="a command, as above")
  parser.add_argument("--dry-run", action="store_true")
  common = [word.removeprefix("--config.") for word in argv
            if word.startswith("--config.")]
  return parser.parse_args(
      [word for word in argv if not word.startswith("--config.")]), common


def run(argv: Sequence[str]) -> int:
  options, common = parse(argv)
  launcher = [*shlex.split(options.launcher), "--"] if options.launcher else [
      sys.executable, "-m", "posttrain"]
  runs = expand(options.config, options.workdir, common, launcher)
  if options.dry_run:
    for entry in runs:
      done = "# finished: " if entry.finished() else ""
      print(done + shlex.join(entry.command))
    return 0
  states = run_all(runs)
  print(table(runs, states))
  if "preempted" in states or "not started" in states:
    return job_lib.PREEMPTED
  return 0 if all(state.startswith("finished") for state in states) else 1


if __name__ == "__main__":
  job_lib.main(run)
