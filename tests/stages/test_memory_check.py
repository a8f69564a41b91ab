"""What can never fit is refused at the start, and its keys are named."""

import jax
import pytest

from posttrain import config as config_lib
from posttrain import pipeline
from posttrain.stages import memory_estimate
from tests import meshes, pipeline_run


def problems(tmp_path, *changes):
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path, [*pipeline_run.ALL, *changes])
    return [
        problem for name in run.config.stages
        for problem in memory_estimate.problems(run.context(name), run.model)]


@pytest.mark.parametrize("changes, stages, named", [
    (["model_overrides.layers=2147483647"], "cold_start reason measure",
     "the model (model, model_overrides)"),
    (["model_overrides.embed=2147483646"], "cold_start reason measure",
     "the model (model, model_overrides)"),
    (["cold_start.sequence_length=1000000"], "cold_start",
     "cold_start.num_microbatches=1 (more parts, each with fewer rows), "
     "cold_start.rows=8 (fewer), cold_start.sequence_length=1000000 (shorter)"),
    (["reason.rows_per_microbatch=2147483647"], "reason",
     "reason.rows_per_microbatch=2147483647 (fewer), reason.sequence_length="),
    (["measure.rollout.max_num_seqs=2147483647", "measure.problems.count=0"],
     "measure",
     "measure.rollout.max_num_seqs=2147483647 (fewer), "
     "measure.rollout.max_tokens="),
    (["reason.num_groups=1000000000"], "reason reason",
     "reason.num_groups=1000000000 (fewer), reason.group_size=4 (fewer), "
     "reason."),
    (["measure.rollout.max_tokens=2147483647"], "measure",
     "measure.rollout.max_tokens=2147483647 (fewer)"),
    (["cold_start.rows=2147483647", "cold_start.num_microbatches=2147483647"],
     "cold_start", "cold_start.rows=2147483647 (fewer), "
     "cold_start.sequence_length="),
])
def test_what_cannot_fit_names_its_stage_and_keys(
    tmp_path, changes, stages, named):
  found = problems(tmp_path, *changes)
  assert [line.partition(":")[0] for line in found] == stages.split()
  for line in found:
    assert named in line
    assert "cannot fit" in line
    assert "compute.on_too_large='warn'" in line


def test_what_fits_is_not_refused(tmp_path):
  assert not problems(tmp_path)
  assert not problems(tmp_path, "measure.rollout.max_num_seqs=2147483647")


def test_an_estimate_a_little_above_is_let_through(tmp_path, monkeypatch):
  """It is within a third of the truth: only what is far above is refused."""
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path, pipeline_run.ALL)
    estimate = memory_estimate.of_stage(run.context("measure"), run.model)[""]
  for share, refused in ((0.7, False), (0.6, True)):
    monkeypatch.setattr(
        memory_estimate, "device_bytes",
        lambda share=share: int(share * estimate.peak))
    monkeypatch.setattr(memory_estimate, "_everywhere", int)  # Not to the MiB.
    found = [line for line in problems(tmp_path) if "measure:" in line]
    assert bool(found) == refused, share


def test_a_cpu_device_has_its_share_of_the_hosts_memory():
  with open("/proc/meminfo") as file:
    [kib] = [int(line.split()[1]) for line in file
             if line.startswith("MemTotal:")]
  found = memory_estimate.device_bytes() * jax.local_device_count()
  assert found <= kib * 1024
  limit = memory_estimate.CGROUP
  if not limit.exists() or limit.read_text().strip() == "max":
    assert found == pytest.approx(kib * 1024, rel=1e-3)


@pytest.mark.parametrize("written, expected", [
    ("max\n", None), ("1073741824\n", 2**30), (str(2**60), None)])
def test_a_container_may_have_less_than_its_host(
    written, expected, tmp_path, monkeypatch):
  whole = memory_estimate.host_bytes()
  limit = tmp_path / "memory.max"
  limit.write_text(written)
  monkeypatch.setattr(memory_estimate, "CGROUP", limit)
  assert memory_estimate.host_bytes() == (expected or whole)


def test_no_stage_begins_where_a_later_one_cannot_fit(
    tmp_path, monkeypatch, capsys):
  started = []
  monkeypatch.setattr(pipeline, "run_stage", lambda run, name, *rest, **more: (
      started.append(name)))
  changes = ["measure.rollout.max_num_seqs=2147483647",
             "measure.problems.count=0"]
  with pytest.raises(config_lib.ConfigError, match="measure: memory per dev"):
    pipeline_run.train(tmp_path, [*pipeline_run.ALL, *changes])
  assert not started
  # The same workdir, on the user's own risk.
  pipeline_run.train(tmp_path, [
      *pipeline_run.ALL, *changes, "compute.on_too_large=warn"])
  assert started == ["cold_start", "reason", "measure"]
  assert "warning: measure: memory per device" in " ".join(
      capsys.readouterr().out.split())
