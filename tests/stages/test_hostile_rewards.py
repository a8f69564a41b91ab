"""Hostile rewards through the real stages: the right count of each status."""

import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from posttrain.telemetry import metrics
from tests import meshes, pipeline_run
from tests.stages import hostile_rewards

HOSTILE = "tests.stages.hostile_rewards"
STATUSES = hostile_rewards.STATUSES
KINDS = list(STATUSES)
SECONDS = 2.0
CHANGES = [
    f"tokenizer.train={HOSTILE}:corpus",
    "reason.num_steps=1", f"reason.num_groups={len(KINDS)}",
    "reason.group_size=2", "reason.health.max_unscored=1.0",
    f"reason.rewards={HOSTILE}:reward,{HOSTILE}:varied",
    f"measure.reward={HOSTILE}:reward",
    f"measure.extract={HOSTILE}:extract",
    f"measure.problems.count={len(KINDS)}", "measure.samples_per_problem=1",
    "measure.pass_at=1", "measure.majority.max_samples=0",
    "measure.max_thinking_tokens=", "measure.num_waits=",
    "measure.problems.args={}", *(
        f"{stage}.{change}" for stage in ("reason", "measure") for change in (
            f"problems.task={HOSTILE}:problems", "workers.memory_gb=1.0",
            f"workers.seconds={SECONDS}"))]


def assert_all_ended(folder, least):
  """Some processes of rewards have left their ids, and none still runs."""
  pids = [path.name for path in folder.iterdir()]
  assert len(pids) >= least
  alive = lambda: [pid for pid in pids if pathlib.Path("/proc", pid).exists()]
  deadline = time.monotonic() + 5
  while alive() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not alive()


def descriptors():
  return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("stage", [
    pytest.param("reason", marks=pytest.mark.slow), "measure"])
def test_each_has_its_status_and_nothing_is_left(tmp_path, monkeypatch, stage):
  folder = tmp_path / "pids"
  folder.mkdir()
  monkeypatch.setenv("HOSTILE_PIDS", str(folder))
  before = descriptors()
  with jax.set_mesh(meshes.one()):
    pipeline_run.train(tmp_path / "run", [f"stages={stage}", *CHANGES])
  found = collections.defaultdict(set)
  for row in records(tmp_path / "run", stage):
    kind = KINDS[row["prompt_id"]]
    if stage == "measure":
      assert row["answer"] is None
      assert row["extract_reason"].startswith("LookupError: no answer in")
    found[kind].add(row["statuses"]["reward"] if stage == "reason"
                    else row["status"])
  assert found == {kind: {status} for kind, status in STATUSES.items()}
  [row] = metrics.read(tmp_path / "run/metrics.jsonl")
  count = collections.Counter(STATUSES.values())
  if stage == "reason":
    assert row["rewards/reward/errors"] == 2 * count["error"]
    assert row["rewards/reward/timeouts"] == 2 * count["timeout"]
    assert row["rewards/reward/mean"] == 1
    assert row["frac_unscored"] == pytest.approx(
        (count["error"] + count["timeout"]) / len(KINDS))
  else:
    assert row["eval/init/free/unscored"] == count["error"] + count["timeout"]
    assert row["eval/init/free/accuracy"] == pytest.approx(
        count["ok"] / len(KINDS))
  assert_all_ended(folder, 10)  # A child that is killed at once leaves no id.
  assert descriptors() <= before + 5  # JAX and the workdir's own.


@pytest.mark.slow
def test_sigterm_while_the_check_of_gold_answers_hangs(tmp_path):
  folder = tmp_path / "pids"
  folder.mkdir()
  process = subprocess.Popen(
      [sys.executable, "-m", "posttrain", "train",
       "--config=tests/pipeline_run.py", f"--workdir={tmp_path / 'run'}",
       "--config.reason.workers.seconds=1000",
       f"--config.reason.rewards={HOSTILE}:never"],
      env=os.environ | {"HOSTILE_PIDS": str(folder)},
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
  try:
    deadline = time.monotonic() + 120
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
      time.sleep(0.05)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75, process.stderr.read()
    assert time.monotonic() - started < 10
  finally:
    process.kill()
    process.stderr.close()
  assert_all_ended(folder, 2)


def records(path, stage):
  if stage == "measure":
    return json.loads((path / "measure/eval/init.json").read_text())["records"]
  lines = (path / "reason/rollouts/step_000000.jsonl").read_text()
  return list(map(json.loads, lines.splitlines()))
