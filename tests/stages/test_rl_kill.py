"""SIGKILL and the same command again, against a run that nobody touched.

Checkpoints fall within batches of rollouts, which are then in flight.
"""

import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import pipeline_run
from tests.stages.test_rl import repeatable, rollouts_of
from tests.stages.test_sft_kill import (
  environment,
  finish,
  kill,
  last_step,
  wait_until,
)

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 20
CHANGES = [
    f"reason.num_steps={STEPS}", "reason.num_minibatches=2",
    "reason.checkpoint.every=3", "reason.rollout.chunk=5",
    "reason.loss.kl_coef=0.05"]


def start(path, changes=CHANGES, **env) -> subprocess.Popen:
  return subprocess.Popen(
      [sys.executable, "-m", "tests.pipeline_run", "train",
       "--config=tests/pipeline_run.py", f"--workdir={path}",
       *(f"--config.{change}" for change in changes)],
      cwd=ROOT, env=environment(1) | env, stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE, text=True)


def half_written(path: pathlib.Path) -> list[str]:
  folder = path / "reason" / "checkpoints"
  names = [p.name for p in folder.iterdir()] if folder.exists() else []
  return [name for name in names if not name.isdecimal()]


def test_kills_and_a_preemption_leave_no_trace(tmp_path):
  """Within a rollout, within a checkpoint's write, at some step; SIGTERM."""
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  finish(start(whole))
  rng = random.Random(time.time_ns())
  batch = rng.randrange(1, 4)  # Two updates and two chunks each.
  second, third, fourth = sorted(rng.sample(range(2 * batch + 1, 18), 3))
  print(f"killed in batch {batch}, at steps {second} (in a write) and {third};"
        f" SIGTERM at step {fourth}")

  process = start(killed, KILL_IN_CHUNK=str(2 * batch + 2))
  process.communicate(timeout=600)
  assert process.returncode == -signal.SIGKILL
  assert last_step(killed) == 2 * batch

  process = start(killed)
  wait_until(process, lambda: last_step(killed) >= second)
  wait_until(process, lambda: half_written(killed))
  kill(process)
  assert half_written(killed)

  process = start(killed)
  wait_until(process, lambda: last_step(killed) >= third)
  kill(process)

  process = start(killed)
  wait_until(process, lambda: last_step(killed) >= fourth)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=600)
  assert process.returncode == 75, err
  assert last_step(killed) < STEPS
  finish(start(killed))

  assert repeatable(killed) == repeatable(whole)
  assert [row["step"] for row in repeatable(killed)] == list(
      range(1, STEPS + 1))
  assert rollouts_of(killed) == rollouts_of(whole)
  assert len(rollouts_of(killed)) == STEPS // 2
  a, b = (pipeline_run.parameters(path, CHANGES) for path in (whole, killed))
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


LONG = ["reason.num_steps=4", "reason.rollout.chunk=1",
        "reason.checkpoint.every=0"]  # Ten chunks a batch, one update each.


def launch(path, changes, free_port, count, **env):
  """One process, or several that are joined."""
  if count > 1:
    env |= dict(POSTTRAIN_NUM_PROCESSES=str(count),
                POSTTRAIN_COORDINATOR=f"localhost:{free_port}")
  return [start(path, changes, **env, **(
      dict(POSTTRAIN_PROCESS_ID=str(index)) if count > 1 else {}))
          for index in range(count)]


def ended(processes, status):
  for process in processes:
    _, err = process.communicate(timeout=600)
    assert process.returncode == status, err[-8000:]


def assert_same(a, b, changes):
  assert repeatable(a) == repeatable(b)
  assert rollouts_of(a) == rollouts_of(b)
  a, b = (pipeline_run.parameters(path, changes) for path in (a, b))
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_within_a_long_rollout_is_not_waited_out(
    tmp_path, free_port, count):
  """One process, or two of which the second alone gets the signal.

  From the second rollout on a chunk takes four seconds.
  """
  whole, left = tmp_path / "whole", tmp_path / "left"
  ended(launch(whole, LONG, free_port, count), 0)
  processes = launch(left, LONG, free_port, count, SLOW_CHUNKS="11:4")
  wait_until(processes[0], lambda: last_step(left) >= 1)
  time.sleep(6)
  assert last_step(left) == 1
  sent = time.monotonic()
  processes[-1].send_signal(signal.SIGTERM)
  ended(processes, 75)
  took = time.monotonic() - sent
  print(f"{count} processes: left {took:.1f} s after SIGTERM, of a rollout of "
        "40 s")
  assert took < 20
  assert last_step(left) == 1
  ended(launch(left, LONG, free_port, count), 0)
  assert repeatable(whole)[1]["completions/max_length"] == 10
  assert_same(left, whole, LONG)
  assert len(rollouts_of(left)) == 4


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_while_a_reward_hangs(tmp_path, free_port, count):
  """For ten minutes; the second process alone gets the signal."""
  changes = ["reason.num_steps=3", "reason.rewards=tests.stages.toy:waits",
             "reason.workers.seconds=600"]
  whole, left, hang = (tmp_path / name for name in ("whole", "left", "hang"))
  ended(launch(whole, changes, free_port, count), 0)
  processes = launch(left, changes, free_port, count, HANG=str(hang))
  wait_until(processes[0], lambda: last_step(left) >= 1)
  hang.touch()
  wait_until(processes[0], hang.with_suffix(".waits").exists)
  time.sleep(1)
  step = last_step(left)
  sent = time.monotonic()
  processes[-1].send_signal(signal.SIGTERM)
  ended(processes, 75)
  took = time.monotonic() - sent
  print(f"{count} processes: left {took:.1f} s after SIGTERM, in a reward")
  assert took < 10
  assert last_step(left) == step < 3
  hang.unlink()
  ended(launch(left, changes, free_port, count), 0)
  assert_same(left, whole, changes)


def test_a_kill_in_a_call_of_two_processes(tmp_path, free_port):
  """Process 0 dies where it makes calls; process 1 is told them again, too."""
  changes = ["reason.num_steps=3", "reason.rollout.chunk=4",
             "reason.rewards=tests.stages.toy:deadly"]
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  ended(launch(whole, changes, free_port, 2), 0)
  processes = launch(killed, changes, free_port, 2,
                     KILL_IN_CALL=f"29:{tmp_path / 'count'}")
  for process, status in zip(processes, (-signal.SIGKILL, 69), strict=True):
    ended([process], status)
  told = (killed / "reason/journal/step_000001").read_text()
  assert len(told.splitlines()) >= 2  # With the header.
  ended(launch(killed, changes, free_port, 2), 0)
  assert_same(killed, whole, changes)
