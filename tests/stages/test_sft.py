"""Oracles: an uninterrupted run, an unpacked loss, the same run cut otherwise.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.data import batches
from posttrain.stages import sft
from posttrain.telemetry import metrics
from posttrain.train import health, preemption
from tests import meshes
from tests.stages import sft_run


def rows_of(path):
  return metrics.read(path / "metrics.jsonl")


def repeatable(rows):
  """Without what the machine had to say."""
  return [
      {name: value for name, value in row.items()
       if not name.startswith(("time/", "perf/"))} for row in rows]


def parameters(model):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run: its workdir and its trained model."""
  path = tmp_path_factory.mktemp("whole")
  with jax.set_mesh(meshes.one()):
    return path, sft_run.run(path)


def leave_at(monkeypatch, *calls):
  """As if SIGTERM came before these calls of `requested`, counted from 1."""
  count = iter(range(1, 1000))
  monkeypatch.setattr(preemption, "requested", lambda: next(count) in calls)


def test_every_step_has_a_row_and_the_loss_falls(whole):
  path, _ = whole
  rows = rows_of(path)
  assert [row["step"] for row in rows] == list(range(1, 13))
  assert [row["step"] for row in rows if "eval_loss" in row] == [5, 10, 12]
  assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
  assert rows[-1]["eval_loss"] < rows[4]["eval_loss"]
  assert rows[0]["learning_rate"] == 0
  assert {"grad_norm", "entropy", "num_tokens", "pad_frac", "target_frac",
          "time/step", "perf/tokens_per_sec"} <= set(rows[0])
  report = json.loads((path / "cold_start/data_report.json").read_text())
  assert report["data"]["examples"] == 200
  assert report["eval_data"]["examples"] == 20
  assert json.loads((path / "cold_start/done.json").read_text()) == {
      "step": 12}
  assert sorted(
      p.name for p in (path / "cold_start/checkpoints").iterdir()
  ) == ["12", "8"]


def test_the_first_example_is_shown_with_what_is_in_the_loss(
    tmp_path, capsys):
  with jax.set_mesh(meshes.one()):
    context = sft_run.make_context(tmp_path)
    batches, held_out = sft.read_data(
        context.section, context.renderer, seed=context.config.seed,
        stage=context.name)
    sft.describe(context, batches, held_out)
  tokens, mask = batches.first_example
  decode = context.renderer.tokenizer.decode
  learnt = decode(tokens[mask])
  assert learnt.endswith("</s>")
  assert f"{decode(tokens[~mask])}[in the loss: {learnt}]" in (
      capsys.readouterr().out)


def test_lost_words_and_keys_named_twice_are_warned_about(tmp_path, capsys):
  path = tmp_path / "a.jsonl"
  path.write_text(
      '{"prompt": "zebra", "completion": "yak", "completion": "gnu"}\n')
  with jax.set_mesh(meshes.one()):
    context = sft_run.make_context(tmp_path / "run")
    found = batches.make_batches(
        [dict(path=str(path))], context.renderer, sequence_length=8, rows=1,
        seed=0, stage=context.name)
    sft.describe(context, found, None)
  printed = " ".join(capsys.readouterr().out.split())
  assert f"warning: {path}: 2 of 3 tokens" in printed
  assert f"warning: {path}: 1 rows name a key twice" in printed
  report = json.loads(next(tmp_path.rglob("data_report.json")).read_text())
  assert (report["data"]["unknown_tokens"], report["data"]["repeated_keys"]
          ) == (2, 1)


def test_eval_loss_is_that_of_the_examples_one_by_one(whole):
  """No packing, no chunks, no masks as arrays: -log p of each target token."""
  path, model = whole
  with jax.set_mesh(meshes.one()):
    renderer = sft_run.make_context(path).renderer
    total, count = 0.0, 0
    positions = jnp.arange(sft_run.LENGTH)[None]
    forward = jax.jit(lambda model, tokens: jax.nn.log_softmax(model.logits(
        model(tokens, positions, jnp.ones_like(tokens)))))
    for row in sft_run.demonstrations("validation", 20):
      prompt = renderer.prompt_tokens(row)
      tokens, _ = renderer.example_tokens(row)
      padded = np.zeros((1, sft_run.LENGTH), np.int32)
      padded[0, :len(tokens)] = tokens
      logprobs = np.asarray(forward(model, padded))[0]
      for t in range(len(prompt), len(tokens)):
        total -= float(logprobs[t - 1, tokens[t]])
        count += 1
  assert rows_of(path)[-1]["eval_loss"] == pytest.approx(
      total / count, rel=1e-6)


def test_left_at_sigterm_and_resumed_is_bitwise_the_whole_run(
    whole, tmp_path, monkeypatch):
  """At step 6, between two checkpoints, and in the second attempt at 7."""
  path, model = whole
  with jax.set_mesh(meshes.one()):
    for call, step in ((6, 6), (1, 7)):
      leave_at(monkeypatch, call)
      with pytest.raises(preemption.Preempted, match=f"saved at step {step}"):
        sft_run.run(tmp_path)
    leave_at(monkeypatch)
    resumed = sft_run.run(tmp_path)
    # A finished stage that is run again has nothing to do.
    again = sft_run.run(tmp_path)
  assert repeatable(rows_of(tmp_path)) == repeatable(rows_of(path))
  for a, b, c in zip(parameters(model), parameters(resumed),
                     parameters(again), strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)


SKIPS = [
    "cold_start.health.on_bad_step=skip", "cold_start.health.max_skips=12",
    "cold_start.health.spike_mads=0.2", "cold_start.health.spike_window=4",
    "cold_start.learning_rate=1e-4", "profile.steps=5,6"]


def test_spikes_are_skipped_alike_after_a_resume(
    tmp_path, monkeypatch):
  """A low threshold makes spikes of noise. The resume is past the trace."""
  with jax.set_mesh(meshes.one()):
    model = sft_run.run(tmp_path / "whole", SKIPS)
    leave_at(monkeypatch, 7)
    with pytest.raises(preemption.Preempted, match="saved at step 7"):
      sft_run.run(tmp_path / "left", SKIPS)
    leave_at(monkeypatch)
    resumed = sft_run.run(tmp_path / "left", SKIPS)
  rows = rows_of(tmp_path / "whole")
  assert repeatable(rows_of(tmp_path / "left")) == repeatable(rows)
  for a, b in zip(parameters(model), parameters(resumed), strict=True):
    np.testing.assert_array_equal(a, b)
  skipped = [row["step"] for row in rows if row["skipped_updates"]]
  print("skipped:", skipped)
  assert skipped and skipped[0] > 4 and max(skipped) > 7
  rates = {row["learning_rate"] for row in rows[2:]}
  assert len(rates) == 10  # A skipped step counts.
  for name in ("whole", "left"):
    folder = tmp_path / name / "cold_start/profile/plugins/profile"
    [trace] = folder.iterdir()
    assert list(trace.glob("*.xplane.pb"))


def test_times_add_up_and_goodput_is_theirs(whole):
  path, _ = whole
  rows = rows_of(path)
  for row in rows:
    parts = [row[f"time/{name}"] for name in (
        "input_wait", "dispatch", "device_wait", "compile")]
    assert min(parts) >= 0
    assert sum(parts) <= row["time/step"] * (1 + 1e-6)
    assert row["perf/tokens_per_sec_per_chip"] * jax.device_count() == (
        pytest.approx(row["perf/tokens_per_sec"]))
    assert "perf/mfu" not in row  # Of a CPU the peak is not known.
  assert rows[0]["time/compile"] > 0.5 * rows[0]["time/step"]
  record = json.loads((path / "cold_start/goodput.json").read_text())
  seconds = record["seconds"]
  assert record["starts"] == 1
  assert all(seconds[name] > 0 for name in (
      "train", "compile", "input_wait", "checkpoint", "evaluation", "setup"))
  assert seconds["restart"] == 0
  assert rows[-1]["perf/goodput"] == pytest.approx(
      seconds["train"] / sum(seconds.values()), abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("layout, changes", [
    ((1, 1), ["cold_start.num_microbatches=2"]),
    ((4, 2), ["cold_start.num_microbatches=4"]),  # Of 2 rows, padded to 4.
])
def test_mesh_and_microbatches_change_only_rounding(
    whole, tmp_path, monkeypatch, layout, changes):
  path, _ = whole
  leave_at(monkeypatch, 4)
  with jax.set_mesh(meshes.mesh(*layout)), pytest.raises(preemption.Preempted):
    sft_run.run(tmp_path, changes)
  for a, b in zip(rows_of(tmp_path), rows_of(path)[:4], strict=True):
    for name in ("loss", "grad_norm", "entropy", "num_tokens"):
      assert a[name] == pytest.approx(b[name], rel=2e-5), name


def test_a_loss_that_is_not_finite_stops_with_its_batch(tmp_path):
  with jax.set_mesh(meshes.one()):
    context = sft_run.make_context(tmp_path)
    model = jax.tree.map(lambda w: w * jnp.inf, sft_run.start(context))
    with pytest.raises(health.HealthError, match=r"loss=nan") as caught:
      sft.run(context, model)
  path = tmp_path / "cold_start" / "bad_batch_step_000001.npz"
  assert str(path) in str(caught.value)
  with np.load(path) as batch:
    assert batch["tokens"].shape == (8, sft_run.LENGTH)
  assert not rows_of(tmp_path)
  assert not list((tmp_path / "cold_start" / "checkpoints").iterdir())


def test_so_many_losses_that_are_not_finite_are_skipped(tmp_path):
  with jax.set_mesh(meshes.one()):
    context = sft_run.make_context(tmp_path, [
        "cold_start.health.on_bad_step=skip", "cold_start.health.max_skips=3"])
    model = jax.tree.map(lambda w: w * jnp.inf, sft_run.start(context))
    with pytest.raises(health.HealthError, match=r"Step 4 .* the 3 before"):
      sft.run(context, model)
  rows = rows_of(tmp_path)
  assert [row["skipped_updates"] for row in rows] == [1, 1, 1]
  assert [row["loss"] for row in rows] == [None] * 3


def test_another_seed_does_not_go_on_from_a_checkpoint(whole, tmp_path):
  """Were the config not compared already, the checkpoint itself would be."""
  path, _ = whole
  with jax.set_mesh(meshes.one()):
    context = sft_run.make_context(tmp_path, ["seed=1"])
    (tmp_path / "cold_start").mkdir()
    (tmp_path / "cold_start/checkpoints").symlink_to(
        path / "cold_start/checkpoints")
    with pytest.raises(ValueError, match="made with seed=0, and this run has"):
      sft.run(context, sft_run.start(context))
