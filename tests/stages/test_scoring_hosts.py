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


def launch(path, *changes, **environment):
  return subprocess.run(
      [sys.executable, "launch/local.py", "--processes=2",
       "--devices-per-process=1", "--module=tests.pipeline_run", "--", "train",
       "--config=tests/pipeline_run.py", f"--workdir={path}",
       *(f"--config.{change}" for change in changes)],
      cwd=ROOT, capture_output=True, text=True, timeout=300,
      env=os.environ | environment
      | {"XLA_FLAGS": "--xla_backend_optimization_level=0"})


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


@pytest.mark.parametrize("slow", [0, 1])
def test_hosts_whose_rewards_disagree_learn_the_same(tmp_path, slow):
  """And whose calls do; one raises on one host only, or is slow there."""
  result = launch(
      tmp_path / "run", "reason.num_steps=3", "reason.rollout.chunk=4",
      "reason.episode=tests.stages.toy_episodes:two_turns",
      "reason.rollout.max_episode_tokens=20", "reason.rollout.max_tokens=8",
      "reason.sequence_length=32", "reason.health.max_unscored=1.0",
      f"reason.rewards={TOY}:disagrees", SEEN=str(tmp_path), SLOW=str(slow))
  assert result.returncode == 0, result.stderr
  mine, its = ((tmp_path / f"{n}.jsonl").read_text() for n in range(2))
  assert mine == its
  rows = [json.loads(line) for line in mine.splitlines()]
  assert len(rows) == 3
  assert sum(row["rewards/disagrees/errors"] for row in rows) > 0
  rewards = [record["rewards"]["disagrees"] for file in (
      tmp_path / "run/reason/rollouts").iterdir()
             for record in map(json.loads, file.read_text().splitlines())]
  assert all(row["frac_unscored"] < 1 for row in rows)
  scored = [reward for reward in rewards if reward is not None]
  assert len(scored) < len(rewards) and max(scored) < 1


def assert_both_say(result, message):
  """The same, but that the launcher may end the later one before it says it."""
  assert result.returncode == 2, result.stderr
  said = {line.removeprefix("[1] ") for line in result.stderr.splitlines()
          if "posttrain: " in line}
  assert len({line for line in said if message in line}) == 1, result.stderr
  for line in said:
    assert message in line or re.search(
        r"process 0 \(.*\) failed with status 2, and says why"
        r"|SIGTERM before the first step", line)


def test_a_judge_that_is_gone_ends_both(tmp_path):
  """Nothing is left to learn from, and process 1 knows it too."""
  result = launch(tmp_path, f"reason.rewards={TOY}:fails", "reason.num_steps=9")
  assert result.returncode == 1, result.stderr
  assert "health.max_unscored" in result.stderr
  assert "the judge has hung up" in result.stdout + result.stderr
  assert len(metrics.read(tmp_path / "metrics.jsonl")) == 2
  # The next start asks the judge again, which may have been mended.
  assert not (tmp_path / "reason/journal").exists()


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
