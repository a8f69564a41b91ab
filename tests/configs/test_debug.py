"""The `:debug` variant of every shipped config, run as a user runs it."""

import pathlib
import resource
import subprocess
import sys

import pytest

from posttrain import config as config_lib
from posttrain.telemetry import metrics

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def posttrain(*arguments):
  return subprocess.run(
      [sys.executable, "-m", "posttrain", *arguments], cwd=ROOT, check=True,
      capture_output=True, text=True).stdout


def cpu_seconds() -> float:
  """CPU seconds of all children that have ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_debug_variant_runs_every_program(path, tmp_path):
  spec = f"{path}:debug"
  before = cpu_seconds()
  posttrain("train", f"--config={spec}", f"--workdir={tmp_path}")
  # Under a minute of two cores. Of the clock, other tests take their share.
  assert cpu_seconds() - before < 2 * 60
  config = config_lib.load(spec)
  rows = metrics.read(tmp_path / "metrics.jsonl")
  for stage in config.stages:
    assert (tmp_path / stage / "done.json").exists()
    own = [row for row in rows if row["stage"] == stage]
    if config[stage].kind != "evaluate":
      # A stage without a signal would not have compiled its update.
      assert len(own) == config[stage].num_steps
      assert all(row["grad_norm"] > 0 for row in own)
  posttrain("report", f"--workdir={tmp_path}")
  assert (tmp_path / "report.html").stat().st_size > 10_000
