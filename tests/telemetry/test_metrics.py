"""Oracles: the file's bytes, rows written by hand, TensorBoard's own reader."""

import json
import math
import os

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from posttrain.telemetry import metrics


def write(tmp_path, stage, steps, restored_step=0, scale=1.0):
  with metrics.Writer(
      tmp_path / "metrics.jsonl", tmp_path / "tensorboard", stage,
      restored_step=restored_step) as writer:
    for step in steps:
      writer.write(step, {"loss": np.float32(scale * step) / 3})


def test_a_resumed_stage_leaves_the_file_of_an_uninterrupted_one(tmp_path):
  for name in ("whole", "killed"):
    (tmp_path / name).mkdir()
    write(tmp_path / name, "first", range(1, 4))
  write(tmp_path / "whole", "second", range(1, 10))
  write(tmp_path / "killed", "second", range(1, 8))
  path = tmp_path / "killed" / "metrics.jsonl"
  with path.open("a") as file:
    file.write('{"stage": "second", "st')  # Killed inside a write.
  write(tmp_path / "killed", "second", range(5, 10), restored_step=4)
  whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
  assert path.read_bytes() == whole


def test_floats_come_back_bit_for_bit(tmp_path):
  values = np.random.default_rng(0).normal(size=50).astype(np.float32)
  with metrics.Writer(
      tmp_path / "m.jsonl", tmp_path, "s", restored_step=0) as writer:
    for step, value in enumerate(values, start=1):
      writer.write(step, {"loss": value})
  rows = metrics.read(tmp_path / "m.jsonl")
  np.testing.assert_array_equal(
      np.array([row["loss"] for row in rows], np.float32), values)


def test_every_row_is_on_disk_when_write_returns(tmp_path):
  path = tmp_path / "m.jsonl"
  writer = metrics.Writer(path, tmp_path / "tb", "s", restored_step=0)
  for step in (1, 2):
    writer.write(step, {"loss": math.nan, "num_tokens": np.int64(3)})
    lines = path.read_text().splitlines()
    assert len(lines) == step
    assert json.loads(lines[-1]) == {
        "stage": "s", "step": step, "loss": None, "num_tokens": 3}
  writer.close()


def test_a_cut_is_one_move(tmp_path, monkeypatch):
  """Whatever a kill interrupts, the old file or the new one is there."""
  write(tmp_path, "s", range(1, 6))
  path = tmp_path / "metrics.jsonl"
  old = path.read_bytes()
  monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(
      KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    metrics.cut(path, "s", 2)
  assert path.read_bytes() == old
  monkeypatch.undo()
  assert metrics.cut(path, "s", 2) == 3
  assert [row["step"] for row in metrics.read(path)] == [1, 2]
  assert metrics.cut(path, "other", 0) == 0
  assert metrics.cut(tmp_path / "none.jsonl", "s", 0) == 0


def test_tensorboard_shows_each_step_once(tmp_path):
  write(tmp_path, "s", range(1, 8))
  write(tmp_path, "s", range(5, 10), restored_step=4, scale=2.0)
  reader = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard/s"))
  reader.Reload()
  events = {event.step: event.value for event in reader.Scalars("loss")}
  assert len(reader.Scalars("loss")) == 9
  assert events == pytest.approx(
      {step: step / 3 * (2 if step > 4 else 1) for step in range(1, 10)})


def test_errors(tmp_path):
  write(tmp_path, "s", [1])
  path = tmp_path / "metrics.jsonl"
  with metrics.Writer(
      path, tmp_path / "tb", "s", restored_step=1) as writer:
    with pytest.raises(ValueError, match="step 1 comes after step 1"):
      writer.write(1, {})
    with pytest.raises(ValueError, match="'loss' needs a scalar"):
      writer.write(2, {"loss": np.zeros(2)})
  path.write_text('{"stage": "s", "step": 1}\noops\n')
  with pytest.raises(ValueError, match="line 2: expected a JSON object"):
    metrics.read(path)
  path.write_text('{"step": 1}\n')
  with pytest.raises(ValueError, match="line 1"):
    metrics.read(path)


def test_window_means():
  window = metrics.Window()
  window.add({"loss": 1.0, "eval_loss": 5.0})
  window.add({"loss": np.float32(2.0)})
  assert window.means() == {"loss": 1.5, "eval_loss": 5.0}
  window.clear()
  assert window.means() == {}
