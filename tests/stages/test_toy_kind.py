"""A kind of stage of one's own, from the command line.

  posttrain train --config=tests/stages/test_toy_kind.py --workdir=DIR
"""

import jax
import ml_collections
import numpy as np
import pytest

from posttrain import config as config_lib
from posttrain import pipeline
from posttrain.stages import loop
from posttrain.tasks import loading
from posttrain.telemetry import metrics
from posttrain.train import preemption
from posttrain.train import state as state_lib
from tests import forked, meshes
from tests.stages.test_sft import leave_at, repeatable

HERE = "tests/stages/test_toy_kind.py"
CONFIG = dict(
    model_overrides=dict(
        layers=2, embed=16, mlp=32, heads=4, kv_heads=2, head_dim=4),
    tokenizer=dict(train="tests.stages.toy:corpus", model_type="word"),
    chat_template="plain", thinking=dict(end=""), stages=("drill",),
    drill=dict(
        kind="tests/stages/toy_kind.py:STAGE", base=7, entropy_coef=0.1,
        num_steps=30, rows=4, sequence_length=8, learning_rate=1e-2,
        log_every=3, checkpoint=dict(every=4)))


def get_config():
  return ml_collections.ConfigDict(CONFIG)


def resolved(*assignments):
  return config_lib.assign(CONFIG, assignments, "test")


def check_same(whole, cut):
  """The same rows and weights; they are those of a model that counts."""
  rows, again = (repeatable(metrics.read(path / "metrics.jsonl"))
                 for path in (whole, cut))
  assert again == rows
  assert [row["step"] for row in rows] == list(range(1, 31))
  assert rows[-1]["loss"] < rows[0]["loss"] / 4
  with jax.set_mesh(meshes.one()):
    models = [pipeline.set_up(resolved(), str(path)).weights_of("drill")
              for path in (whole, cut)]
    for a, b in zip(*map(jax.tree.leaves, models), strict=True):
      np.testing.assert_array_equal(a, b)
    tokens = (np.arange(7)[:, None] + np.arange(8)) % 7
    logits = models[0].logits(models[0](
        tokens, np.arange(8) + 0 * tokens, np.ones_like(tokens)))
  np.testing.assert_array_equal(np.argmax(logits, -1), (tokens + 1) % 7)


def test_it_is_preempted_and_goes_on_to_the_same_numbers(
    tmp_path, monkeypatch):
  whole, left = tmp_path / "whole", tmp_path / "left"
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda: one)
  pipeline.train(resolved(), str(whole))
  with monkeypatch.context() as patch:
    leave_at(patch, 7)
    with pytest.raises(preemption.Preempted, match="saved at step 7"):
      pipeline.train(resolved(), str(left))
  pipeline.train(resolved(), str(left))
  check_same(whole, left)


def test_steps_may_be_dropped_or_have_nothing_to_learn_from(
    tmp_path, monkeypatch):
  """SIGTERM within step 6, with rows of earlier steps still on the devices."""
  whole, left = tmp_path / "whole", tmp_path / "left"
  body = loading.load(CONFIG["drill"]["kind"]).run.args[0]
  train_step, leaving = body.train_step, []

  def odd(self, number, span):
    if number in leaving:
      raise preemption.Preempted("within the step")
    if number % 5:
      return train_step(self, number, span)
    self.state = state_lib.skip(self.state)
    return loop.Update({}, {}, lambda found, skipped: {})

  one = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda: one)
  monkeypatch.setattr(body, "train_step", odd)
  config = resolved("drill.num_steps=8", "drill.health.on_bad_step=skip")
  pipeline.train(config, str(whole))
  leaving.append(6)
  with pytest.raises(preemption.Preempted, match="saved at step 5; the step"):
    pipeline.train(config, str(left))
  leaving.clear()
  pipeline.train(config, str(left))
  rows, again = (repeatable(metrics.read(path / "metrics.jsonl"))
                 for path in (whole, left))
  assert again == rows
  assert [row["skipped_updates"] for row in rows] == [
      0, 0, 0, 0, 1, 0, 0, 0]


@pytest.mark.slow
def test_it_is_killed_and_goes_on_to_the_same_numbers(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"

  def start(path):
    return forked.start(
        ["train", f"--config={HERE}", f"--workdir={path}"], f"{path}.log",
        tmp_path / "compiled")

  forked.finish(start(whole), f"{whole}.log")
  process = start(killed)
  forked.wait_until(
      process, f"{killed}.log", lambda: forked.last_step(killed) >= 5)
  forked.kill(process)
  assert 5 <= forked.last_step(killed) < 30
  forked.finish(start(killed), f"{killed}.log")
  check_same(whole, killed)


def test_its_keys_are_checked(tmp_path):
  with pytest.raises(config_lib.ConfigError, match=r"drill\.entropy_coef: .*2"):
    resolved("drill.entropy_coef=2.0")
  with pytest.raises(config_lib.ConfigError, match="warmup_steps: 40 is more"):
    resolved("drill.warmup_steps=40")
  with pytest.raises(config_lib.ConfigError, match="has no Stage 'STAGES'"):
    resolved("drill.kind=tests/stages/toy_kind.py:STAGES")


def test_another_stage_starts_from_it(tmp_path):
  two = config_lib.assign(CONFIG | dict(
      stages=("drill", "again"), again=CONFIG["drill"]), (), "test")
  with jax.set_mesh(meshes.one()):
    assert pipeline.set_up(two, str(tmp_path)).start_of("again") == "drill"
