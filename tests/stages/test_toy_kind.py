"""A kind of stage of one's own, from the command line.

  posttrain train --config=tests/stages/test_toy_kind.py --workdir=DIR
"""

import jax
import ml_collections
import numpy as np
import pytest

from posttrain import config as config_lib
from posttrain import pipeline, sharding
from posttrain.telemetry import metrics
from tests import forked, meshes
from tests.stages.test_sft import repeatable

HERE = "tests/stages/test_toy_kind.py"
CONFIG = dict(
    model_overrides=dict(
        layers=2, embed=16, mlp=32, heads=4, kv_heads=2, head_dim=4),
    tokenizer=dict(train="tests.stages.toy:corpus", model_type="word"),
    chat_template="plain", thinking=dict(end=""), stages=("drill",),
    drill=dict(
        kind="tests/stages/toy_kind.py:STAGE", word=5, z_coef=0.1,
        num_steps=30, rows=4, sequence_length=8, learning_rate=1e-2,
        log_every=3, checkpoint=dict(every=4)))


def get_config():
  return ml_collections.ConfigDict(CONFIG)


def resolved(*assignments):
  return config_lib.assign(CONFIG, assignments, "test")


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
  rows, again = (repeatable(metrics.read(path / "metrics.jsonl"))
                 for path in (whole, killed))
  assert again == rows
  assert [row["step"] for row in rows] == list(range(1, 31))
  with jax.set_mesh(meshes.one()):
    models = [pipeline.set_up(resolved(), str(path)).weights_of("drill")
              for path in (whole, killed)]
    for a, b in zip(*map(jax.tree.leaves, models), strict=True):
      np.testing.assert_array_equal(a, b)
    # It says the word, and the z-loss keeps the normaliser small.
    tokens = np.arange(8)[None]
    logits = models[0].logits(models[0](
        tokens, tokens, np.ones_like(tokens)))
  assert (np.argmax(logits, -1) == 5).all()
  assert rows[-1]["loss"] < rows[0]["loss"] / 2


def test_its_keys_are_checked(tmp_path):
  with pytest.raises(config_lib.ConfigError, match=r"drill\.z_coef: .*2"):
    resolved("drill.z_coef=2.0")
  with pytest.raises(config_lib.ConfigError, match="warmup_steps: 40 is more"):
    resolved("drill.warmup_steps=40")
  with pytest.raises(config_lib.ConfigError, match="has no Stage 'STAGES'"):
    resolved("drill.kind=tests/stages/toy_kind.py:STAGES")


def test_another_stage_starts_from_it_and_names_it(tmp_path):
  config = resolved()
  with jax.set_mesh(sharding.mesh_of(config.mesh)):
    run = pipeline.set_up(config, str(tmp_path))
  assert run.start_of("drill") == "init"
  assert run.stage("drill").schema.trains
