"""Stages follow each other once; a workdir belongs to one config."""

import json
import shutil

import jax
import pytest

from posttrain import config as config_lib
from posttrain import pipeline, workdir
from posttrain.stages import evaluate, grpo, sft
from posttrain.train import metrics
from tests import meshes, pipeline_run

SMALL = [
    *pipeline_run.ALL, "cold_start.num_steps=2",
    "reason.num_steps=2", "reason.loss.kl_coef=0.1", "reason.reference=init",
    "measure.num_waits=", "measure.max_thinking_tokens=2",
    "measure.problems.count=4"]


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """The pipeline takes all devices that there are: let there be one."""
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda: devices)
    yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  path = tmp_path_factory.mktemp("pipeline")
  pipeline_run.train(path, SMALL)
  return path


@pytest.fixture
def workdir_copy(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / "copy")


def forbid(monkeypatch, *modules):
  def must_not(*args, **kwargs):
    raise AssertionError("this stage has finished")
  for module in modules:
    monkeypatch.setattr(module, "run", must_not)
  monkeypatch.setattr(pipeline, "TRAINING", {"sft": must_not,
                                             "grpo": must_not})


def test_every_stage_leaves_its_files(trained):
  rows = metrics.read(trained / "metrics.jsonl")
  assert [(r["stage"], r["step"]) for r in rows] == [
      ("cold_start", 1), ("cold_start", 2), ("reason", 1), ("reason", 2),
      ("measure", 1), ("measure", 2), ("measure", 3)]
  for name in ("cold_start", "reason", "measure"):
    assert (trained / name / "done.json").exists()
  assert sorted(p.name for p in (trained / "measure/eval").iterdir()) == [
      "cold_start.json", "curve.png", "init.json", "reason.json"]
  assert (trained / "tokenizer").is_dir()


def test_each_stage_starts_from_the_one_before(trained):
  """The KL to "init" is that of the SFT weights, not zero; SFT's own is."""
  reason = [r for r in metrics.read(trained / "metrics.jsonl")
            if r["stage"] == "reason"]
  assert reason[0]["kl"] > 1e-3
  init, cold_start = (
      pipeline_run.parameters(trained, SMALL, stage)
      for stage in ("init", "cold_start"))
  assert any((init[name] != cold_start[name]).any() for name in init)


def test_a_finished_run_has_nothing_to_do(trained, monkeypatch, capsys):
  before = (trained / "metrics.jsonl").read_bytes()
  forbid(monkeypatch, sft, grpo, evaluate)
  pipeline_run.train(trained, SMALL)
  assert (trained / "metrics.jsonl").read_bytes() == before
  assert len(json.loads((trained / "environment.json").read_text())) >= 2
  text = capsys.readouterr()
  for name in ("cold_start", "reason", "measure"):
    assert f"{name}: finished, skipped" in text.out + text.err


def test_another_config_is_refused_with_the_difference(trained):
  with pytest.raises(
      workdir.WorkdirError, match=r"reason\.learning_rate: 0\.01 -> 0\.02"):
    pipeline_run.train(trained, [*SMALL, "reason.learning_rate=0.02"])


@pytest.mark.parametrize("change, message", [
    ("measure.reward=tests.stages.toy:pickey",
     r"has no function 'pickey'. Nearest: 'picky'"),
    ("measure.problems.args.cuont=4",
     r"measure\.problems\.args: tests\.stages\.toy:problems does not take "
     r".*'cuont'. It has the parameters split, count, thinks"),
    ("cold_start.data.sources.0.args.thinks=True",
     r"cold_start\.data\.sources\.0\.args: tests\.stages\.toy:demonstr"),
])
def test_what_a_later_stage_names_is_looked_for_first(
    tmp_path, change, message):
  with pytest.raises(config_lib.ConfigError, match=message):
    pipeline_run.train(tmp_path / "run", [*SMALL, change])
  assert not (tmp_path / "run").exists()


def test_a_half_finished_evaluation_goes_on(workdir_copy, monkeypatch):
  """Two of its three results are there; the weights come from checkpoints."""
  folder = workdir_copy / "measure/eval"
  whole = (folder / "reason.json").read_text()
  (workdir_copy / "measure/done.json").unlink()
  (folder / "reason.json").unlink()
  asked, of_stage = [], pipeline.weights.of_stage
  def counted(model, run, stage, *rest):
    asked.append(stage)
    return of_stage(model, run, stage, *rest)
  monkeypatch.setattr(pipeline.weights, "of_stage", counted)
  pipeline_run.train(workdir_copy, SMALL)
  assert asked == ["reason"]
  assert (folder / "reason.json").read_text() == whole
  rows = metrics.read(workdir_copy / "metrics.jsonl")
  assert [r["step"] for r in rows if r["stage"] == "measure"] == [1, 2, 3]


def test_eval_measures_something_else_on_the_same_weights(workdir_copy):
  """The config of the run stays; what is measured may be another."""
  config = config_lib.from_jsonable(
      workdir.read_json(workdir_copy / "config.json"),
      ["measure.max_thinking_tokens=3"])
  saved = (workdir_copy / "config.json").read_bytes()
  before = json.loads((workdir_copy / "measure/eval/init.json").read_text())
  pipeline.evaluate(config, str(workdir_copy))
  after = json.loads((workdir_copy / "measure/eval/init.json").read_text())
  assert [cell["name"] for cell in after["cells"]] == ["free", "max_3"]
  assert after["cells"][0] == before["cells"][0]
  assert max(r["think_length"] for r in after["records"]
             if r["cell"] == "max_3") == 3
  assert (workdir_copy / "config.json").read_bytes() == saved


def test_weights_of_a_stage_that_has_not_finished_are_an_error(workdir_copy):
  (workdir_copy / "reason/done.json").unlink()
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(workdir_copy, SMALL)
    with pytest.raises(workdir.WorkdirError, match="reason has not finished"):
      run.weights_of("reason")


def test_a_stage_starts_from_the_last_that_trains(tmp_path):
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(
        tmp_path, ["stages=measure,cold_start,reason"])
  assert [run.start_of(name) for name in run.config.stages] == [
      "init", "init", "cold_start"]
