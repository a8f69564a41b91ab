"""Two real processes of which one stands still, or is killed."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from posttrain.telemetry import metrics

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
SECOND = f"process 1 ({socket.gethostname()})"


def arguments(path):
  return ["train", "--config=tests/stages/sft_run.py", f"--workdir={path}",
          "--config.cold_start.log_every=4",
          "--config.cold_start.eval_every=0"]


def launch(path, **environment):
  return subprocess.run(
      [sys.executable, "launch/local.py", "--processes=2",
       "--devices-per-process=1", "--module=tests.stages.hosts_run", "--",
       *arguments(path)],
      cwd=ROOT, capture_output=True, text=True, timeout=600,
      env=os.environ | {
          "XLA_FLAGS": "--xla_backend_optimization_level=0"} | environment)


def test_a_host_that_stands_still_is_named(tmp_path):
  """For longer than it may be silent; the run goes on when it is back."""
  result = launch(tmp_path, STOP="7:6")
  assert result.returncode == 0, result.stderr
  said = result.stdout
  print(said)
  assert f"{SECOND} has not been heard of for 3 s" in said
  assert f"{SECOND} is back" in said
  assert f"{SECOND} holds the others up: " in said
  assert "process 0 (" not in said
  rows = metrics.read(tmp_path / "metrics.jsonl")
  times = {row["step"]: row["time/host_slowest"] for row in rows
           if "time/host_slowest" in row}
  assert set(times) == set(range(1, 13))
  assert times[8] >= 5 > times[12]


def test_a_host_that_hangs_is_named(tmp_path):
  """Its process lives; the other one waits for it, and says so."""
  result = launch(tmp_path, HANG="7:6")
  assert result.returncode == 0, result.stderr
  assert f"all others have waited for {SECOND} for 3 s" in result.stdout
  assert "has not been heard of" not in result.stdout
  assert f"{SECOND} holds the others up: " in result.stdout


def test_the_launcher_names_a_host_that_is_killed(tmp_path):
  result = launch(tmp_path, KILL="7")
  assert result.returncode == 137, result.stderr
  assert "process 1 was ended by SIGKILL" in result.stderr


def start(path, port, number, **environment):
  """One of two processes as a pod starts them, with no launcher around."""
  return subprocess.Popen(
      [sys.executable, "-m", "tests.stages.hosts_run", *arguments(path)],
      cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
      env=os.environ | {
          "JAX_PLATFORMS": "cpu",
          "XLA_FLAGS": "--xla_backend_optimization_level=0 "
          "--xla_force_host_platform_device_count=1",
          "POSTTRAIN_COORDINATOR": f"127.0.0.1:{port}",
          "POSTTRAIN_NUM_PROCESSES": "2",
          "POSTTRAIN_PROCESS_ID": str(number)} | environment)


@pytest.mark.parametrize("which", [0, 1])
def test_after_a_kill_the_same_command_goes_on(tmp_path, free_port, which):
  """No number differs from those of a run that nobody touched."""
  left, whole = tmp_path / "left", tmp_path / "whole"
  killed, other = (
      start(left, free_port, number, KILL="7", WHICH=str(which))
      for number in (which, 1 - which))
  assert killed.wait(300) == -signal.SIGKILL
  before = time.monotonic()
  _, err = other.communicate(timeout=300)
  assert time.monotonic() - before < 15
  assert other.returncode == 69, err
  said = err.splitlines()[-1]
  assert said.startswith(f"posttrain: process {which} ({socket.gethostname()})")
  assert "is lost" in said and "disk" not in err and "Traceback" not in err
  for path in (left, whole):
    result = launch(path)
    assert result.returncode == 0, result.stderr
  rows, wanted = ([
      {name: value for name, value in row.items()
       if not name.startswith(("time/", "perf/"))}
      for row in metrics.read(path / "metrics.jsonl")]
      for path in (left, whole))
  assert len(rows) == 12 and rows == wanted
