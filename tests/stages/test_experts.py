"""Identities of a model with experts in both training stages."""

import jax
import numpy as np
import pytest

from posttrain.telemetry import metrics
from tests import meshes, pipeline_run

EXPERTS = ["model_overrides.num_experts=4",
           "model_overrides.experts_per_token=2"]
AUX = ["cold_start.router_aux_coef=0.01", "reason.router_aux_coef=0.01"]


def equal_sets(a, b):
  return (np.sort(a, axis=-1) == np.sort(b, axis=-1)).all(-1)


@pytest.mark.slow
def test_sampler_and_trainer_choose_the_same_experts(tmp_path):
  """In float32 everywhere; and what they did not agree on would show."""
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(
        tmp_path, [*EXPERTS, *AUX, "reason.num_epochs=2"])
    learner.collect()
    experience = learner.experience
    record = experience["sampler_experts"]
    fed = record[..., 0] > 0
    # Of each completion all but the last token; of no prompt.
    in_completion = experience["loss_mask"] & (experience["segment_ids"] > 0)
    assert fed.all(-1).sum() == in_completion.sum() - len(
        np.unique(experience["completion_ids"][in_completion]))
    assert not np.any(fed & ~in_completion[..., None])
    changed = record.copy()
    changed[:, :, :, ::3] = np.where(
        fed[:, :, :, ::3, :, None], 1 + record[:, :, :, ::3] % 4, 0)
    differ = fed & ~equal_sets(record, changed)
    assert 0.1 < differ.sum() / fed.sum() < 0.5

    start = jax.tree.map(jax.numpy.copy, learner.state)
    row = learner.update()
    assert row["router/agreement"] == 1.0
    assert "router/agreement" not in learner.update()  # Other weights.

    learner.state, learner.step = start, 0
    learner.experience = experience | {"sampler_experts": changed}
    again = learner.update()
  assert again["router/agreement"] == pytest.approx(
      1 - differ.sum() / fed.sum())
  assert again["loss"] == row["loss"]
  assert row["router/aux_loss"] > 1.9 and 1 <= row["router/load_max"] <= 2
  assert 0 < row["router/entropy"] <= np.log(4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [
    dict(fsdp=2, tensor=2, expert=2),
    dict(fsdp=1, data=2, expert=2, context=2)],
    ids=lambda sizes: "x".join(sizes))
def test_a_pipeline_on_a_mesh(sizes, tmp_path):
  """All stages, from the config; the numbers are those of one device."""
  meshes.mesh(**(dict(tensor=1) | sizes))  # Skips without the devices.
  changes = [*EXPERTS, *AUX, "stages=cold_start,reason",
             "cold_start.num_steps=2", "reason.num_steps=2"]
  with_axis = [f"mesh.{name}={size}" for name, size in sizes.items()]
  rows = []
  for name, mesh in (("eight", with_axis), ("one", ["mesh.fsdp=1"])):
    with pytest.MonkeyPatch.context() as patch:
      if name == "one":
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *kind: first)
      pipeline_run.train(tmp_path / name, [*changes, *mesh])
    rows.append(metrics.read(tmp_path / name / "metrics.jsonl"))
  eight, one = rows
  assert len(eight) == len(one) == 4
  for a, b in zip(eight, one, strict=True):
    for key in ("loss", "grad_norm", "router/aux_loss", "router/load_max",
                "router/entropy"):
      assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
  assert all(row["router/agreement"] == 1.0 for row in eight[2:])
