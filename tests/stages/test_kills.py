"""SIGKILL at random points, against a run that nobody touched: bit for bit.

Two in the fast test, twenty in the slow one: at a random step, within the write
of a checkpoint, and (slow) a random time after the start.
"""

import json
import os
import pathlib
import random
import signal
import time

import numpy as np
import pytest

from tests import forked
from tests.stages import sft_run
from tests.stages.test_sft import repeatable, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


class Runs:
  """The same run in two workdirs."""

  def __init__(self, folder, steps, every):
    self.folder = folder
    self.steps = steps
    self._argv = [
        "train", "--config=tests/stages/sft_run.py",
        f"--config.cold_start.num_steps={steps}",
        "--config.cold_start.eval_every=0",
        f"--config.cold_start.checkpoint.every={every}"]

  def log(self, name):
    return self.folder / f"{name}.log"

  def start(self, name):
    return forked.start(
        [*self._argv, f"--workdir={self.folder / name}"], self.log(name),
        self.folder / "compiled")

  def finish(self, name):
    forked.finish(self.start(name), self.log(name))

  def kill(self, name, kind, step, seconds):
    """Starts it and kills it at a point of that kind; says where."""
    path, process = self.folder / name, self.start(name)
    before = forked.last_step(path)
    if kind == "time":
      time.sleep(seconds)
      forked.kill(process)
      return f"after {seconds:.2f} s at step {forked.last_step(path)}"
    forked.wait_until(
        process, self.log(name), lambda: forked.last_step(path) >= step)
    if kind == "write":
      forked.wait_until(
          process, self.log(name),
          lambda: forked.half_written(path, "cold_start"))
    forked.kill(process)
    half = forked.half_written(path, "cold_start")
    assert kind != "write" or half
    return (f"at step {forked.last_step(path)} (before: {before})"
            f"{' in a write' if half else ''}")


def check(folder, steps, every, kinds):
  """Kills one run of two once for each of `kinds`; compares them."""
  runs = Runs(folder, steps, every)
  runs.finish("whole")
  seed = time.time_ns()
  rng = random.Random(seed)
  at = sorted(rng.sample(range(1, steps - 2 * every), len(kinds)))
  rng.shuffle(kinds)
  for kind, step in zip(kinds, at, strict=True):
    print(f"seed {seed}: killed", runs.kill(
        "killed", kind, step, rng.uniform(0.1, 2.0)))
  assert forked.last_step(folder / "killed") < steps
  runs.finish("killed")
  whole, killed = folder / "whole", folder / "killed"
  assert repeatable(rows_of(killed)) == repeatable(rows_of(whole))
  assert [row["step"] for row in rows_of(killed)] == list(range(1, steps + 1))
  a, b = sft_run.saved_state(whole), sft_run.saved_state(killed)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)
  check_goodput(whole, killed, starts=1 + len(kinds))


def check_goodput(whole, killed, starts):
  """What was made twice counts once; what a kill cost is a restart's."""
  records = [json.loads((path / "cold_start/goodput.json").read_text())
             for path in (whole, killed)]
  assert records[0]["starts"] == 1
  assert 1 < records[1]["starts"] <= starts  # One may die before its record.
  restarts = [record["seconds"]["restart"] for record in records]
  assert restarts[0] == 0 < restarts[1]
  goodput = [record["seconds"]["train"] / sum(record["seconds"].values())
             for record in records]
  print(f"goodput {goodput[0]:.1%} whole, {goodput[1]:.1%} killed")
  assert 0 < goodput[1] < 1


@pytest.mark.slow
def test_an_evaluation_goes_on_behind_the_cells_that_are_kept(tmp_path):
  """SIGKILL once so many of its eight cells are there, and SIGTERM later."""
  whole, killed = tmp_path / "whole", tmp_path / "killed"

  def start(path):
    return forked.start(
        ["train", "--config=tests/pipeline_run.py", "--config.stages=measure",
         "--config.measure.wait_max_thinking_tokens=-1,5",
         "--config.measure.rollout.chunk=1",  # So that a cell takes a while.
         f"--workdir={path}"], f"{path}.log", tmp_path / "compiled")

  def cells():
    return len(list(killed.glob("measure/eval/cells/init/[!.]*")))

  forked.finish(start(whole), f"{whole}.log")
  kept = []
  for count, end in (
      (random.randint(1, 3), signal.SIGKILL),
      (random.randint(4, 6), signal.SIGTERM)):
    count = max(count, cells() + 1)  # One at least is of this start.
    process = start(killed)
    forked.wait_until(process, f"{killed}.log", lambda: cells() >= count)
    os.kill(process.pid, end)
    process.join()
    assert process.exitcode == (75 if end == signal.SIGTERM else -end)
    kept.append(cells())
    print(f"signal {end} with {count} cells there, {kept[-1]} kept")
  assert not (killed / "measure/eval/init.json").exists()
  forked.finish(start(killed), f"{killed}.log")
  log = pathlib.Path(f"{killed}.log").read_text()
  assert "SIGTERM; the cells that are finished are kept" in log
  assert log.count("kept from an earlier start") == sum(kept)
  assert (killed / "measure/eval/init.json").read_bytes() == (
      whole / "measure/eval/init.json").read_bytes()
  assert cells() == 0


@pytest.mark.slow
def test_two_kills_leave_no_trace(tmp_path):
  check(tmp_path, 12, 2, ["step", "write"])


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path):
  check(tmp_path, 60, 2, 10 * ["step"] + 6 * ["write"] + 4 * ["time"])
