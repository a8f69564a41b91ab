"""docs/changing.md is run: its files, its commands, and what they change.

Oracles: completions scored again from the saved texts, a NumPy sum over a
rollout drawn once more, and the on-policy gradient, which CISPO and the
clipped loss share.
"""

import json
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest

from posttrain import config as config_lib
from posttrain import pipeline, sharding
from posttrain import workdir as workdir_lib
from posttrain.cli import main
from posttrain.data.problem_cursor import ProblemCursor
from posttrain.objectives.advantages import group_advantages
from posttrain.stages import rl
from posttrain.tasks import loading, signs
from posttrain.telemetry import metrics
from tests import meshes, pipeline_run

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs/changing.md").read_text()
FILES = dict(re.findall(r"`(my_\w+\.py)`[^`]*?```python\n(.*?)```", PAGE, re.S))
COMMANDS = {
    re.search(r"--workdir=runs/(\w+)", text)[1]:
    shlex.split(text.replace("\\\n", ""))
    for text in re.findall(r"```sh\n(.*?)```", PAGE, re.S)}

# Shapes of the rollouts, so that the evaluation compiles nothing of its own.
EXTRA = {"my_task": (
    "--config.measure.problems.count=4",
    "--config.measure.samples_per_problem=4")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A directory to start from: the page's files beside the configs."""
  path = tmp_path_factory.mktemp("checkout")
  (path / "configs").symlink_to(ROOT / "configs")
  for name, text in FILES.items():
    (path / name).write_text(text)
  one = meshes.one()
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(path)
    patch.setattr(sharding, "make_mesh", lambda *sizes, **more: one)
    # No signal handler, and no devices of the config, in a test process.
    patch.setattr(main, "_start", lambda config: None)
    yield path


@pytest.fixture(scope="module")
def run(folder):
  """Runs a command of the page, once; gives its workdir."""
  done = {}
  def command(name):
    if name not in done:
      program, *arguments = COMMANDS[name]
      assert program == "posttrain"
      assert main.main([*arguments, *EXTRA.get(name, ())]) == 0
      done[name] = workdir_lib.open_existing(f"runs/{name}")
    return done[name]

  return command


def rollouts_of(workdir, step):
  path = workdir.path / f"reason/rollouts/step_{step:06d}.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def first_row(workdir):
  return next(row for row in metrics.read(workdir.metrics)
              if row["stage"] == "reason")


def test_the_page_keeps_its_promise():
  assert list(FILES) == [
      "my_reward.py", "my_loss.py", "my_gspo.py", "my_task.py"]
  assert set(COMMANDS) == {"my_reward", "my_loss", "my_gspo", "my_task"}
  assert all(len(text.splitlines()) <= 20 for text in FILES.values())


@pytest.mark.parametrize("name, changed", [
    ("my_reward", {"reason.rewards", "reason.reward_weights"}),
    ("my_loss", {"reason.rewards", "reason.reward_weights",
                 "reason.loss.function"}),
    ("my_gspo", {"reason.rewards", "reason.reward_weights",
                 "reason.loss.function", "reason.loss.aggregation",
                 "reason.loss.args", "reason.loss.args.clip_low",
                 "reason.loss.args.clip_high"}),
    ("my_task", {
        "tokenizer.train", "cold_start.data.sources.0.task",
        "reason.problems.task", "reason.rewards", "measure.problems.task",
        "measure.reward", "measure.extract"})])
def test_a_command_changes_what_it_says(folder, name, changed):
  assignments = [
      word.removeprefix("--config.") for word in COMMANDS[name]
      if word.startswith("--config.")]
  stages = [word for word in assignments if word.startswith("stages")]
  difference = config_lib.diff(
      config_lib.load("configs/tiny.py:debug", stages),
      config_lib.load("configs/tiny.py:debug", assignments))
  assert {line.partition(":")[0] for line in difference} == changed


def test_the_reward_is_added_with_its_weight(run):
  workdir = run("my_reward")
  numbers = {row["id"]: row["numbers"] for row in signs.problems("train")}
  rows = rollouts_of(workdir, 0)
  credit = []
  for row in rows:
    used = set(row["completion"].split())
    wanted = [str(number) for number in numbers[row["prompt_id"]]]
    credit.append(np.mean([number in used for number in wanted]))
    assert row["rewards"]["uses_numbers"] == pytest.approx(credit[-1])
    assert row["reward"] == pytest.approx(
        row["rewards"]["reward"] + 0.2 * credit[-1])
  assert np.std(credit) > 0
  assert first_row(workdir)["rewards/uses_numbers/mean"] == pytest.approx(
      np.mean(credit))
  [start] = workdir.environments()
  assert start["sources"]["my_reward.py:uses_numbers"] == (
      loading.source_hash("my_reward.py:uses_numbers"))


def first_rollouts(workdir):
  """Drawn again, which gives the same: advantages and logprobs in the loss."""
  with jax.set_mesh(sharding.make_mesh()):
    again = pipeline.set_up(workdir.config(), str(workdir.path))
    context = again.context("reason")
    worker = rl.make_rollout_worker(context, pipeline_run.calls())
    indices, _ = ProblemCursor(
        len(worker.problems), context.config.seed, context.name).take(
            context.section.num_groups)
    collected = worker.collect(again.weights_of("init"), indices, step=0)
  advantages = group_advantages(collected.rewards, collected.group_ids)
  mask = collected.rollouts.loss_mask
  return (np.broadcast_to(advantages[:, None], mask.shape)[mask],
          collected.rollouts.logprobs[mask].astype(np.float64))


def test_the_loss_is_the_users(run):
  clipped, changed = run("my_reward"), run("my_loss")
  assert config_lib.diff(clipped.config(), changed.config()) == [
      "reason.loss.function: 'posttrain.objectives.policy:policy_loss' -> "
      "'my_loss.py:loss'"]
  assert rollouts_of(clipped, 0) == rollouts_of(changed, 0)
  advantages, logprobs = first_rollouts(changed)
  before, after = first_row(clipped), first_row(changed)
  assert before["loss"] == pytest.approx(-advantages.mean(), abs=1e-5)
  assert after["loss"] == pytest.approx(
      -(advantages * logprobs).mean(), abs=5e-5)
  assert abs(after["loss"] - before["loss"]) > 1e-3
  assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
  assert after["grad_norm"] > 0
  assert after["clip_ratio/high_mean"] == 0  # The loss's own sum.
  assert "clip_ratio/low_mean" not in after


def test_the_command_runs_gspo_with_its_args(run):
  """On policy its loss is the mean over completions, and the ratio is 1."""
  workdir = run("my_gspo")
  assert workdir.config().reason.loss.args.to_dict() == {
      "clip_low": 3e-4, "clip_high": 4e-4}
  row = first_row(workdir)
  assert row["ratio"] == 1 and row["loss"] == pytest.approx(0, abs=1e-6)
  assert row["grad_norm"] > 0


def test_the_task_is_learnt_from_and_measured(run):
  workdir = run("my_task")
  report = workdir_lib.read_json(workdir.path / "cold_start/data_report.json")
  assert report["data"]["examples"] == 2000
  problems = loading.load_function("my_task.py:problems")
  splits = [{row["prompt"] for row in problems(split)}
            for split in ("train", "validation", "test")]
  assert [len(split) for split in splits] == [100, 100, 100]
  assert not set.intersection(*splits)
  known = {row["id"]: row for row in problems("test")}
  for name in ("init", "cold_start", "reason"):
    result = workdir_lib.read_json(workdir.path / f"measure/eval/{name}.json")
    for record in result["records"]:
      row = known[record["id"]]
      assert record["prompt"] == row["prompt"]
      answer = record["completion"].split("</think>", 1)[1:]
      right = [str(max(map(int, row["prompt"].split()[:3])))]
      assert record["correct"] == ([a.strip() for a in answer] == right)
