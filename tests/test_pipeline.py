"""Stages follow each other once; a workdir belongs to one config."""

import dataclasses
import json
import re
import shutil

import jax
import pytest

from posttrain import config as config_lib
from posttrain import pipeline, report, workdir
from posttrain.stages import evaluate, rl, sft
from posttrain.telemetry import metrics
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
    monkeypatch.setattr(module, "STAGE", dataclasses.replace(
        module.STAGE, run=must_not))


def test_every_stage_leaves_its_files(trained):
  rows = metrics.read(trained / "metrics.jsonl")
  assert [(r["stage"], r["step"]) for r in rows] == [
      ("cold_start", 1), ("cold_start", 2), ("reason", 1), ("reason", 2),
      ("measure", 1), ("measure", 2), ("measure", 3)]
  for name in ("cold_start", "reason", "measure"):
    assert (trained / name / "done.json").exists()
  assert sorted(p.name for p in (trained / "measure/eval").iterdir()) == [
      "cold_start.json", "curve.svg", "init.json", "reason.json"]
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
  forbid(monkeypatch, sft, rl, evaluate)
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
  config = workdir.read_config(
      workdir_copy, ["measure.max_thinking_tokens=3"])
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


# What the files of a run may have become.
DAMAGES = {
    "missing": None, "empty": lambda content: b"",
    "halved": lambda content: content[:len(content) // 2],
    "no UTF-8": lambda content: (
        content[:len(content) // 3] + b"\xff" + content[len(content) // 3:]),
    "a list": lambda content: b"[1, 2]",
    "an object": lambda content: b'{"a": {"b": 1}}'}
# Files that nothing goes on from: TensorBoard reads them, or a person.
ARE_NOT_READ = re.compile(
    r"tensorboard/|.*\.png|.*commit_success.txt|.*/_sharding")


def files_of(path):
  return [name for file in sorted(path.rglob("*")) if file.is_file()
          and not ARE_NOT_READ.match(name := str(file.relative_to(path)))]


def damage(path, name, how):
  file = path / name
  if how == "missing":
    file.unlink()
  else:
    file.write_bytes(DAMAGES[how](file.read_bytes()))


def results(path):
  """Rows and evaluations; times apart."""
  rows = [
      {name: value for name, value in row.items()
       if not name.startswith(("time/", "perf/"))}
      for row in metrics.read(path / "metrics.jsonl")]
  return sorted(rows, key=lambda row: (row["stage"], row["step"])), {
      file.name: json.loads(file.read_text())
      for file in (path / "measure/eval").glob("*.json")}


def told(act, path, capsys):
  """What a command says: an error, which is one that names a path, or more."""
  capsys.readouterr()
  try:
    act()
  except (ValueError, OSError) as error:
    assert isinstance(error, config_lib.ConfigError) or (
        "\n" not in str(error))
    assert str(path) in str(error)
    assert type(error).__module__.startswith("posttrain.") or (
        type(error) is ValueError)
    return str(error)
  return " ".join(capsys.readouterr().out.split())


def resume(path):
  """Resumes as `posttrain train --workdir=PATH` does."""
  workdir.open_existing(path)
  pipeline.train(workdir.read_config(path), str(path))


def check(trained, path, name, how, capsys):
  """A damaged file is mended, or named; nothing is lost without a word."""
  damage(path, name, how)
  said = told(lambda: resume(path), path, capsys)
  if not said.startswith(str(path)) and "All 3 stages" in said:
    here = lambda: results(path) == results(trained)
    assert name.split("/")[-1] in said or here(), (name, how, said)


def test_every_damaged_file_of_a_finished_run(
    trained, tmp_path, capsys):
  """`train` skips what has finished: it reads no checkpoint and no result."""
  for name in files_of(trained):
    for how in DAMAGES if "/checkpoints/" not in name else ():
      path = shutil.copytree(trained, tmp_path / "run")
      if not (name.startswith("measure/eval") and how != "missing"):
        check(trained, path, name, how, capsys)
      shutil.rmtree(path)


def test_a_report_of_every_damaged_file(trained, tmp_path, capsys):
  """An error with the path, or a page that has what is there."""
  for name in files_of(trained):
    for how in DAMAGES if "/checkpoints/" not in name else ():
      path = shutil.copytree(trained, tmp_path / "run")
      damage(path, name, how)
      page = path / "report.html"
      said = told(lambda: report.build([path]), path, capsys)
      assert page.exists() == (not said), (name, how, said)
      if name == "metrics.jsonl" and not said:
        assert "metrics.jsonl" in page.read_text() or (
            "has no metrics" in page.read_text())
      shutil.rmtree(path)


def interrupted(trained, path):
  """Before its second stage was known to be through; nothing is evaluated."""
  shutil.copytree(trained, path)
  (path / "reason/done.json").unlink()
  shutil.rmtree(path / "measure")
  return path


@pytest.mark.parametrize("name, how", [
    ("metrics.jsonl", "halved"), ("metrics.jsonl", "no UTF-8"),
    ("reason/goodput.json", "halved"), ("environment.json", "a list"),
    ("reason/checkpoints/2/_CHECKPOINT_METADATA", "a list")])
def test_a_damaged_file_of_an_interrupted_run(
    trained, tmp_path, capsys, name, how):
  path = interrupted(trained, tmp_path / "run")
  check(trained, path, name, how, capsys)


@pytest.mark.slow
def test_every_damaged_file_of_an_interrupted_run(trained, tmp_path, capsys):
  for name in files_of(interrupted(trained, tmp_path / "whole")):
    for how in DAMAGES if "cold_start/checkpoints/" not in name else ():
      path = interrupted(trained, tmp_path / "run")
      check(trained, path, name, how, capsys)
      shutil.rmtree(path)


def test_rows_that_are_missing_are_named(workdir_copy, capsys):
  """Those of a finished stage too; what is there stays."""
  file = workdir_copy / "metrics.jsonl"
  lines = file.read_text().splitlines(keepends=True)
  file.write_text("".join([lines[0], "[1]\n", *lines[3:]]))
  resume(workdir_copy)
  said = " ".join(capsys.readouterr().out.split())
  assert f"cold_start: {file} HAS NO ROWS of step 2," in said
  assert f"reason: {file} HAS NO ROWS of step 1," in said
  assert "measure: " + str(file) not in said
  assert "1 of 6 lines are no rows and are in metrics.jsonl.damaged" in said
  assert (workdir_copy / "metrics.jsonl.damaged").read_text() == "[1]\n"
  assert file.read_text() == "".join([lines[0], *lines[3:]])


def test_a_result_that_is_missing_is_made_again(workdir_copy, capsys):
  file = workdir_copy / "measure/eval/reason.json"
  whole = file.read_bytes()
  file.unlink()
  resume(workdir_copy)
  assert f"{file} is missing, and is made again" in " ".join(
      capsys.readouterr().out.split())
  assert file.read_bytes() == whole
