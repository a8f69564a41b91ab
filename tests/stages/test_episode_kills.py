"""Kills within a batch of episodes, against a run that nobody touched.

Within a decode chunk, within a call, and within a write of the journal.
"""

import json
import signal

import numpy as np
import pytest

from posttrain.episodes import journal
from tests import forked, pipeline_run
from tests.stages.test_rl import repeatable, rollouts_of

pytestmark = pytest.mark.slow

TOY = "tests.stages.toy"
STEPS = 4
ONE = ["reason.rollout.chunk=4"]
TWO = [*ONE, "reason.episode=tests.stages.toy_episodes:two_turns",
       "reason.rollout.max_episode_tokens=20", "reason.rollout.max_tokens=8",
       "reason.sequence_length=32"]


class Runs:
  """The same run in several workdirs, of changes to the toy's config."""

  def __init__(self, folder, changes):
    self.folder, self.changes = folder, [
        f"reason.num_steps={STEPS}", "reason.checkpoint.every=2", *changes]
    self.counts = 0

  def start(self, name, **environment):
    return forked.start(
        ["train", "--config=tests/pipeline_run.py",
         f"--workdir={self.folder / name}",
         *(f"--config.{change}" for change in self.changes)],
        f"{self.folder / name}.log", self.folder / "compiled",
        PATIENT="1", **environment)

  def finish(self, name):
    forked.finish(self.start(name), f"{self.folder / name}.log")
    assert not (self.folder / name / "reason/journal").exists()

  def kill(self, name, kind, number):
    """Lets it kill itself at the nth chance of that kind."""
    if kind == "CALL":  # The counts of several workers.
      self.counts += 1
      number = f"{number}:{self.folder / f'count_{self.counts}'}"
    process = self.start(name, **{f"KILL_IN_{kind}": str(number)})
    process.join(600)
    log = (self.folder / f"{name}.log").read_text()
    assert process.exitcode == -signal.SIGKILL, log[-8000:]

  def assert_same(self, *names):
    a, b = (self.folder / name for name in names)
    assert repeatable(a) == repeatable(b)
    assert len(repeatable(a)) == STEPS
    assert rollouts_of(a) == rollouts_of(b)
    a, b = (pipeline_run.parameters(path, self.changes) for path in (a, b))
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def told(path):
  """Values of the rewards in each whole line of the journals, by batch."""
  return {
      file.name: [event[3][0] for _, line in list(journal._whole_lines(
          file.read_bytes()))[1:] for event in line["events"]]
      for file in sorted((path / "reason/journal").glob("*"))}


@pytest.mark.parametrize("changes", [ONE, TWO], ids=["one", "two"])
def test_kills_leave_no_trace(tmp_path, changes):
  runs = Runs(tmp_path, [*changes, f"reason.rewards={TOY}:deadly"])
  runs.finish("whole")
  for kind, number in (
      ("CHUNK", 3), ("CALL", 7), ("WRITE", 3), ("CALL", 25), ("WRITE", 1),
      ("CHUNK", 5), ("WRITE", 2)):
    runs.kill("killed", kind, number)
  runs.finish("killed")
  runs.assert_same("whole", "killed")
  log = (tmp_path / "killed.log").read_text()
  assert "calls of the batch had ended, and are not made again" in log


def test_rewards_of_chance_stay_what_they_were(tmp_path):
  """All batches since the last checkpoint are made again as they were."""
  runs = Runs(tmp_path, [
      *TWO, f"reason.rewards={TOY}:chance", "reason.checkpoint.every=0"])
  path = tmp_path / "run"
  made, before = {}, {}
  for kind, number in (("WRITE", 4), ("CHUNK", 11), ("WRITE", 3)):
    runs.kill("run", kind, number)
    for name, values in told(path).items():
      assert before.get(name, []) == values[:len(before.get(name, []))]
      before[name] = values
    made |= rollouts_of(path)
  assert len(before) > 1
  rows = repeatable(path)
  assert rows
  runs.finish("run")
  assert rollouts_of(path).items() >= made.items()
  assert repeatable(path)[:len(rows)] == rows
  for name, values in before.items():
    text = rollouts_of(path)[f"{name}.jsonl"]
    rewards = [json.loads(line)["rewards"]["chance"]
               for line in text.splitlines()]
    assert {float(np.float32(value)) for value in values
            if isinstance(value, float)} <= set(rewards)


def test_a_journal_of_another_reward_is_not_used(tmp_path):
  runs = Runs(tmp_path, [*ONE, f"reason.rewards={TOY}:chance"])
  runs.kill("run", "CHUNK", 3)
  [file] = (tmp_path / "run/reason/journal").iterdir()
  header, *lines = file.read_bytes().splitlines(keepends=True)
  other = json.loads(header.partition(b" ")[2]) | {"sources": {}}
  file.write_bytes(b"".join([journal._line(other), *lines]))
  runs.finish("run")
  log = (tmp_path / "run.log").read_text()
  assert "was made with other settings" in log
  assert "not made again" not in log


def test_a_cell_under_way_keeps_what_its_calls_gave(tmp_path):
  """Votes are taken of what a judge by chance has said, once."""
  runs = Runs(tmp_path, [
      "stages=measure", f"measure.reward={TOY}:chance",
      "measure.rollout.chunk=4", "measure.max_thinking_tokens=2",
      "measure.num_waits=", "measure.samples_per_problem=8"])
  path = tmp_path / "run"
  told = {}
  for number in (4, 4):
    runs.kill("run", "CHUNK", number)
    for file in (path / "measure/journal/init").iterdir():
      told[file.name] = [event[3][0] for line in list(journal._whole_lines(
          file.read_bytes()))[1:] for event in line[1]["events"]]
  runs.finish("run")
  assert not (path / "measure/journal").exists()
  records = json.loads((path / "measure/eval/init.json").read_text())["records"]
  assert told
  for name, values in told.items():
    rewards = {record["reward"] for record in records
               if record["cell"] == name}
    assert values and {float(np.float32(value)) for value in values
                       if isinstance(value, float)} <= rewards
