"""Preempted, and started again on other devices, against an undisturbed run."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from posttrain.telemetry import metrics
from tests.stages.test_sft import rows_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Sharding info not provided")]

COMMAND = [
    sys.executable, "-m", "posttrain", "train",
    "--config=tests/stages/sft_run.py", "--config.cold_start.num_steps=30",
    "--config.cold_start.checkpoint.every=3"]
ROOT = pathlib.Path(__file__).parents[2]


def environment(devices: int) -> dict[str, str]:
  """CPU devices; little optimisation, as compiling is most of the time."""
  return os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_backend_optimization_level=0 "
      f"--xla_force_host_platform_device_count={devices}"}


def start(path, *changes, **env) -> subprocess.Popen:
  return subprocess.Popen(
      [*COMMAND, f"--workdir={path}", *changes], cwd=ROOT,
      env=environment(1) | env, stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
  _, err = process.communicate(timeout=600)
  assert process.returncode == 0, err


def wait_until(process: subprocess.Popen, holds) -> None:
  deadline = time.time() + 600
  while not holds():
    assert process.poll() is None, process.stderr.read()
    assert time.time() < deadline
    time.sleep(0.0002)


def last_step(path: pathlib.Path) -> int:
  file = path / "metrics.jsonl"
  rows = metrics.read(file) if file.exists() else []
  return rows[-1]["step"] if rows else 0


def kill(process: subprocess.Popen) -> None:
  os.kill(process.pid, signal.SIGKILL)
  process.wait()


def agree(path, other):
  """The same rows, up to rounding."""
  for a, b in zip(rows_of(path), rows_of(other), strict=True):
    assert a["step"] == b["step"]
    for name in ("loss", "grad_norm", "num_tokens"):
      assert a[name] == pytest.approx(b[name], rel=1e-4), (name, a["step"])


def test_other_processes_and_meshes_go_on(tmp_path, free_port):
  """Eight devices as 8x1; two hosts of four as 4x2, one of which is told to
  leave; one device to the end. As one device alone, up to rounding."""
  alone, moved = tmp_path / "alone", tmp_path / "moved"
  finish(start(alone))

  def preempt(processes, step):
    wait_until(processes[0], lambda: last_step(moved) >= step)
    processes[-1].send_signal(signal.SIGTERM)  # The last alone is told.
    for process in processes:
      _, err = process.communicate(timeout=600)
      assert process.returncode == 75, err

  preempt([start(moved, **environment(8))], 5)
  first = last_step(moved)
  preempt([
      start(moved, "--config.mesh.tensor=2", **environment(4),
            POSTTRAIN_NUM_PROCESSES="2", POSTTRAIN_PROCESS_ID=str(index),
            POSTTRAIN_COORDINATOR=f"localhost:{free_port}")
      for index in range(2)], first + 4)
  second = last_step(moved)
  assert 5 <= first < second < 30
  finish(start(moved))
  agree(alone, moved)
