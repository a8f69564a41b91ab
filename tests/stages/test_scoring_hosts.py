"""Two real processes whose rewards would disagree, or fail on one of them."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from posttrain.telemetry import metrics

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
TOY = "tests.stages.toy"


def launch(path, *changes, processes=2):
  return subprocess.run(
      [sys.executable, "launch/local.py", f"--processes={processes}",
       "--devices-per-process=1", "--", "train",
       "--config=tests/pipeline_run.py", f"--workdir={path}",
       *(f"--config.{change}" for change in changes)],
      cwd=ROOT, capture_output=True, text=True, timeout=300,
      env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"})


def test_rewards_golds_and_grades_are_process_0s_alone(tmp_path):
  """What is not called on process 1 cannot fail there, nor disagree."""
  result = launch(
      tmp_path, "stages=reason,measure", "reason.num_steps=2",
      f"reason.rewards={TOY}:of_process,{TOY}:reward",
      f"measure.reward={TOY}:of_process", f"measure.extract={TOY}:whole",
      "measure.num_waits=", "measure.max_thinking_tokens=",
      "measure.checkpoints=reason")
  assert result.returncode == 0, result.stderr
  rows = [row for row in metrics.read(tmp_path / "metrics.jsonl")
          if row["stage"] == "reason"]
  assert [row["rewards/of_process/mean"] for row in rows] == [1, 1]
  text = (tmp_path / "measure/eval/reason.json").read_text()
  records = json.loads(text)["records"]
  assert records and all(record["reward"] == 1 for record in records)


def assert_both_say(result, message):
  """Process 1 the same, unless process 0 has ended before it came to that."""
  assert result.returncode == 2, result.stderr
  lines = result.stderr.splitlines()
  mine = {line for line in lines
          if message in line and not line.startswith("[1] ")}
  its = {line.removeprefix("[1] ") for line in lines
         if line.startswith("[1] posttrain: ")}
  assert len(mine) == 1
  for line in its:  # None, if the launcher was quicker still.
    assert line in mine or re.search(
        r"process 0 \(.*\) failed with status 2, and says why", line)


@pytest.mark.parametrize("stage", ["reason", "measure"])
def test_a_failure_on_process_0_ends_both_with_a_line(tmp_path, stage):
  """The host that failed left the other in a collective."""
  key = "rewards" if stage == "reason" else "reward"
  result = launch(
      tmp_path, f"stages={stage}", f"{stage}.{key}={TOY}:fails",
      f"{stage}.problems.count=4" if stage == "measure" else "seed=0")
  assert_both_say(result, f"{TOY}:fails failed on problem" if (
      stage == "measure") else "The reward fails failed on problem")
  assert "the judge has hung up" in result.stderr


def test_a_gold_that_is_wrong_is_told_by_both(tmp_path):
  result = launch(tmp_path, f"reason.rewards={TOY}:refuses")
  assert_both_say(result, "refuses gives 0.0 to problem 3's own gold answer")


@pytest.mark.parametrize("stage", ["reason", "measure"])
def test_problems_that_differ_between_hosts_are_told_by_both(tmp_path, stage):
  """Each host would have asked its own, and scored the other's answers."""
  result = launch(tmp_path, f"stages={stage}",
                  f"{stage}.problems.task={TOY}:shuffled")
  assert_both_say(result, f"{stage}.problems.task: {TOY}:shuffled gives "
                  "another list of problems on another host")


def test_a_reward_that_leaves_does_not_finish_the_run(tmp_path):
  """With status 0, which a launcher takes for finished; it said nothing."""
  result = launch(tmp_path, f"reason.rewards={TOY}:leaves", processes=1)
  assert result.returncode not in (0, 75)
  assert "leaves failed on problem" in result.stderr
  assert "with os._exit(0)" in result.stderr
