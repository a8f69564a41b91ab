"""SIGKILL and the same command again, against a run that nobody touched."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from posttrain.train import metrics
from tests.stages import sft_run
from tests.stages.test_sft import repeatable, rows_of

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


def start(path, **env) -> subprocess.Popen:
  return subprocess.Popen(
      [*COMMAND, f"--workdir={path}"], cwd=ROOT,
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


def half_written(path: pathlib.Path) -> list[str]:
  folder = path / "cold_start" / "checkpoints"
  names = [p.name for p in folder.iterdir()] if folder.exists() else []
  return [name for name in names if not name.isdecimal()]


def kill(process: subprocess.Popen) -> None:
  os.kill(process.pid, signal.SIGKILL)
  process.wait()


def test_three_kills_leave_no_trace(tmp_path):
  """At a random step, inside a checkpoint's write, at another random step."""
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  finish(start(whole))
  rng = random.Random(time.time_ns())
  first, second, third = sorted(rng.sample(range(1, 27), 3))
  print(f"killed at steps {first}, {second} (in a write) and {third}")

  process = start(killed)
  wait_until(process, lambda: last_step(killed) >= first)
  kill(process)

  process = start(killed)
  wait_until(process, lambda: last_step(killed) >= second)
  wait_until(process, lambda: half_written(killed))
  kill(process)
  assert half_written(killed)

  process = start(killed)
  wait_until(process, lambda: last_step(killed) >= third)
  kill(process)
  assert last_step(killed) < 30
  finish(start(killed))

  assert repeatable(rows_of(killed)) == repeatable(rows_of(whole))
  assert [row["step"] for row in rows_of(killed)] == list(range(1, 31))
  a, b = sft_run.saved_state(whole), sft_run.saved_state(killed)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_two_processes_of_four_devices(tmp_path, free_port):
  """The same numbers as one process of eight, up to rounding; and a resume.
  """
  alone, together = tmp_path / "alone", tmp_path / "together"
  finish(start(alone, **environment(8)))

  def hosts():
    return [
        start(together, **environment(4), POSTTRAIN_NUM_PROCESSES="2",
              POSTTRAIN_COORDINATOR=f"localhost:{free_port}",
              POSTTRAIN_PROCESS_ID=str(index)) for index in range(2)]

  first, second = hosts()
  wait_until(first, lambda: last_step(together) >= 7)
  second.send_signal(signal.SIGTERM)  # One host is told; both must leave.
  for host in (first, second):
    _, err = host.communicate(timeout=600)
    assert host.returncode == 75, err
  for host in hosts():
    finish(host)
  for a, b in zip(rows_of(alone), rows_of(together), strict=True):
    assert a["step"] == b["step"]
    for name in ("loss", "grad_norm", "num_tokens"):
      assert a[name] == pytest.approx(b[name], rel=1e-4), (name, a["step"])
