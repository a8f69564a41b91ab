"""A workdir that version 0.1.0 wrote: refused in one line, or usable.

The archive is a run of that version's three kinds of stages on the toy task,
without the checkpoint of its first stage. Its own evaluation of its last
checkpoint is the oracle for weights that are read here.
"""

import json
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
import safetensors.numpy

import posttrain
from posttrain import config as config_lib
from posttrain import workdir as workdir_lib
from posttrain.cli import main
from tests import pipeline_run

ARCHIVE = pathlib.Path(__file__).parent / "data/workdir_0.1.0.tar.xz"
CONFIG = "--config=tests/pipeline_run.py"
TEMPLATE = ("--config.chat_template=plain", "--config.thinking.newline=",
            "--config.thinking.wait_text=wait")


@pytest.fixture
def old(tmp_path):
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(tmp_path / "old", filter="data")
  return tmp_path / "old"


def files_of(path):
  return {file: file.read_bytes() for file in sorted(path.rglob("*"))
          if file.is_file()}


@pytest.mark.parametrize("command", [
    ("train",), ("train", CONFIG), ("eval",),
    ("eval", CONFIG, "--config.stages=reason,measure"),
    ("sample", "--prompt=one"), ("chat",), ("export", "--output=nowhere")])
def test_it_is_refused_in_a_line_that_names_its_version(old, command, capsys):
  before = files_of(old)
  assert main.main([*command, f"--workdir={old}"]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith(
      f"posttrain: {old} was written by posttrain 0.1.0 (commit 6b410aa98339)"
      f", and posttrain {posttrain.__version__} resumes runs of 0.3.0 or")
  assert f"--model={old}/STAGE/checkpoints" in line
  assert files_of(old) == before


def measured_from(tmp_path, **init):
  """A command that evaluates these weights as the archive's config has it."""
  file = tmp_path / "measure.py"
  file.write_text(f"""
import ml_collections
from tests import pipeline_run

def get_config():
  config = ml_collections.ConfigDict(pipeline_run.CONFIG)
  del config.tokenizer, config.model_overrides
  config.model = ""
  config.init, config.stages = {init!r}, ("measure",)
  config.measure.update(
      max_thinking_tokens=(0, 2), num_waits=(), samples_per_problem=1,
      pass_at=(1,), majority=dict(max_samples=0))
  return config
""")
  return ["train", f"--config={file}", f"--workdir={tmp_path / 'new'}"]


def test_a_run_cannot_start_from_its_last_stage_by_name(old, tmp_path, capsys):
  """Which stage is the last is in a config that is not read any more."""
  assert main.main(
      measured_from(tmp_path, kind="workdir", path=str(old))) == 2
  assert "written by posttrain 0.1.0" in capsys.readouterr().err


def test_a_report_shows_its_figures(old, capsys):
  assert main.main(["report", f"--workdir={old}"]) == 0
  assert "reason, at most 0 thinking tokens: 50.0%" in capsys.readouterr().out
  page = (old / "report.html").read_text()
  for name in ("cold_start", "reason", "measure", "learning_rate"):
    assert name in page


def test_its_weights_are_evaluated_as_it_did_itself(old, tmp_path):
  """Token for token: the same weights, seed, stage and problems."""
  assert main.main(measured_from(
      tmp_path, kind="directory", path=f"{old}/reason/checkpoints")) == 0
  ours, theirs = (json.loads(file.read_text())["records"] for file in (
      tmp_path / "new/measure/eval/init.json",
      old / "measure/eval/reason.json"))
  assert len(ours) == len(theirs) == 18
  for a, b in zip(ours, theirs, strict=True):
    for name in ("id", "prompt", "completion", "finish_reason", "reward"):
      assert a[name] == b[name]


def test_its_weights_are_sampled_and_exported(old, tmp_path, capsys):
  weights = f"--model={old}/reason/checkpoints"
  assert main.main(["sample", weights, "--prompt=one two", *TEMPLATE,
                    "--max-tokens=4"]) == 0
  assert "length 4 " in capsys.readouterr().out
  assert main.main(["export", weights, *TEMPLATE,
                    f"--output={tmp_path / 'exported'}"]) == 0
  tensors = safetensors.numpy.load_file(
      tmp_path / "exported/model.safetensors")
  assert sum(x.size for x in tensors.values()) == 1888
  assert all(np.isfinite(x).all() for x in tensors.values())


def start_by(old, **versions):
  (old / "environment.json").write_text(json.dumps([
      {"versions": {"posttrain": "0.1.0"}}, {"versions": versions}]))
  return workdir_lib.Workdir(old)


def test_the_last_start_says_the_version(old):
  """An untrained run of an old version is begun anew, with its record."""
  for version in ("0.3.0", "0.3.0.dev3", "0.10.0", "1.0.0"):
    workdir_lib.check_version(start_by(old, posttrain=version))
  run_from_sources: dict[str, str] = {}
  for versions in (
      {"posttrain": "0.2.9"}, {"posttrain": "0.1.9"}, run_from_sources):
    with pytest.raises(workdir_lib.WorkdirError, match=r"posttrain 0\.[12]\."):
      workdir_lib.check_version(start_by(old, **versions))


def test_an_old_run_that_trained_nothing_is_begun_anew(old):
  for stage in ("cold_start", "reason", "measure"):
    shutil.rmtree(old / stage)
  (old / "metrics.jsonl").unlink()
  new = start_by(old)
  config = config_lib.assign(pipeline_run.CONFIG, (), "test")
  workdir_lib.create(old, config, devices=["cpu"])
  assert new.environments()[-1]["versions"]["posttrain"] == (
      posttrain.__version__)
  workdir_lib.check_version(new)
