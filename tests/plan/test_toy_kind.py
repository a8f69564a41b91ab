"""A user's kind of stage is planned, estimated and reported by its record."""

import ast
import dataclasses
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from posttrain import config as config_lib
from posttrain import pipeline, report, sharding
from posttrain.config import stages
from posttrain.plan import estimate, plan, programs, topology
from posttrain.stages import memory_estimate
from posttrain.telemetry import memory
from tests import meshes
from tests.plan import toy_run

ROOT = pathlib.Path(__file__).parents[2]
FILE = "tests/plan/toy_run.py"


def load(*changes):
  return config_lib.load(FILE, changes)


def make_pipeline(path, *changes):
  return pipeline.set_up(load(*changes), str(path))


def test_its_programs_are_planned_and_lacking_ones_are_named():
  with jax.set_mesh(meshes.one()):
    found = programs.set_up(load())
    [program] = programs.of_config(found)
    text = program.lower().as_text()
  assert program.name == "drill/update" and "8x32xi32" in text
  assert [note.partition(", so")[0] for note in found.notes] == [
      f"look: the kind {toy_run.__file__}:BARE gives no `{field}`"
      for field in ("programs", "memory", "work")]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_command_plans_it(tmp_path):
  """Compiled for a slice; a stage of a kind without programs is named."""
  found = subprocess.run(
      [sys.executable, "-m", "posttrain", "plan", f"--config={FILE}",
       "--topology=v5e:1x1", f"--json={tmp_path}/plan.json"],
      cwd=ROOT, capture_output=True, text=True)
  assert found.returncode == 0, found.stdout + found.stderr
  [program] = json.loads((tmp_path / "plan.json").read_text())["programs"]
  assert program["name"] == "drill/update" and program["dot_flops"] > 0
  output = " ".join(found.stdout.split())
  assert "drill: one update takes at least" in output
  assert "gives no `programs`, so no program of it is compiled" in output


def test_nothing_to_compile_is_an_error_that_says_why(monkeypatch):
  monkeypatch.setattr(topology, "devices", lambda where: jax.devices()[:1])
  with pytest.raises(plan.PlanError, match="BARE gives no `programs`"):
    plan.make(load("stages=look"), topology.parse("v5e:1x1"))


def test_its_memory_is_estimated_by_its_sizes(tmp_path):
  with jax.set_mesh(meshes.one()):
    run = make_pipeline(tmp_path)
    drill, look = (memory_estimate.of_stage(run.context(name), run.model)[""]
                   for name in ("drill", "look"))
  weights = 4 * memory.parameters(run.model)
  assert drill.persistent["parameters"] == weights
  assert 2 * weights <= drill.persistent["optimizer"] < 2.1 * weights
  assert drill.training["activations"] > 0 and not drill.note
  assert look.persistent == {"parameters": weights} and look.peak == weights
  assert "the parameters alone, as" in look.line()


def test_the_keys_to_change_are_its_own(tmp_path):
  with jax.set_mesh(meshes.one()):
    run = make_pipeline(tmp_path, "drill.rows=2147483647")
    [line] = memory_estimate.problems(run.context("drill"), run.model)
  assert "Change drill.rows=2147483647 (fewer); or go on" in line


def test_a_step_takes_as_long_as_the_same_work_of_another_kind():
  """SFT on as many rows of the same length."""
  config = load()
  model = programs.set_up(config).model
  where = topology.parse("v5e:2x2")
  seconds = lambda config: estimate.step_seconds(
      config, model, where, sharding.MeshSizes(fsdp=4))
  other = config_lib.load("tests/plan/golden_config.py", [
      "stages=cold_start", "cold_start.rows=8", "cold_start.num_microbatches=1",
      "cold_start.sequence_length=32"])
  assert seconds(config) == seconds(other) > 0


def test_a_training_kind_without_the_keys_of_its_weights_is_refused():
  with pytest.raises(ValueError, match="no key lora and trained"):
    dataclasses.replace(toy_run.BARE, schema=dataclasses.replace(
        toy_run.BARE.schema, trains=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run of the toy stage alone."""
  path = tmp_path_factory.mktemp("toy") / "run"
  with jax.set_mesh(meshes.one()):
    run = make_pipeline(path)
    pipeline.run_stage(run, "drill", None)
  return path


@pytest.fixture
def workdir(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / "run")


def page(workdir):
  return report.build([workdir]).read_text()


def test_the_report_has_its_charts_and_its_other_metrics(workdir):
  text = page(workdir)
  assert "<figcaption>Entropy</figcaption>" in text
  assert "<figcaption>loss<" in text
  assert "finished, step 2" in text
  assert "Stage look has not started." in text
  assert "is not known here" not in text


def rename(workdir, kind):
  file = workdir / "config.json"
  config = json.loads(file.read_text())
  config["drill"]["kind"] = kind
  file.write_text(json.dumps(config))


@pytest.mark.parametrize("kind, reason", [
    ("grpo", "which is called &#x27;rl&#x27; now"),
    ("drill", "is no kind of stage"),
    ("nowhere/toy_kind.py:STAGE", "there is no file"),
    ("{}/broken.py:STAGE", "ZeroDivisionError"),
    ("posttrain.tasks.signs:reward", "needed a Stage")])
def test_a_kind_that_is_not_known_any_more_is_shown_by_its_files(
    workdir, kind, reason):
  (workdir / "broken.py").write_text("1 / 0\n")
  rename(workdir, kind.format(workdir))
  text = page(workdir)
  assert "is not known here" in text and reason in text
  assert "more metrics" in text and "<figcaption>entropy<" in text


def test_plans_reports_and_estimates_name_no_kind():
  """As a string: they ask the record."""
  files = [*(ROOT / "posttrain/stages").glob("memory_*.py"), *(
      file for unit in ("plan", "programs", "report", "evaluation")
      for file in (ROOT / "posttrain" / unit).glob("*.py"))]
  wrong = [
      f"{file.name}:{node.lineno}" for file in files
      for node in ast.walk(ast.parse(file.read_text()))
      if isinstance(node, ast.Constant) and node.value in stages.KINDS]
  assert len(files) > 30 and not wrong, wrong
