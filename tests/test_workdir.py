"""One config per directory, and files that are whole or absent."""

import json
import os
import pathlib

import pytest

from posttrain import config as config_lib
from posttrain import workdir as workdir_lib

TINY = str(pathlib.Path(__file__).parents[1] / "configs/tiny.py")


@pytest.fixture(scope="module")
def config():
  return config_lib.load(TINY)


def create(path, config, devices=("cpu:0",), **kwargs):
  return workdir_lib.create(path, config, devices=devices, **kwargs)


def trained(workdir):
  """Leaves the files of a first checkpoint."""
  (workdir.path / "reason/checkpoints/4").mkdir(parents=True)


def test_a_new_workdir_records_what_made_it(tmp_path, config):
  workdir, changes = create(tmp_path / "a/b", config)
  assert changes == []
  saved = json.loads((tmp_path / "a/b/config.json").read_text())
  assert saved == config_lib.jsonable(config)
  assert config_lib.diff(workdir.config(), config) == []
  [start] = workdir.environments()
  assert start["devices"] == ["cpu:0"]
  assert start["versions"]["jax"]
  assert len(start["git"]["commit"] or "0" * 40) == 40
  assert set(start["sources"]) == set(config_lib.functions(config))
  assert all(len(digest) == 64 for digest in start["sources"].values())


def test_the_same_config_may_start_again(tmp_path, config):
  create(tmp_path, config)
  before = (tmp_path / "config.json").read_bytes()
  workdir, changes = create(tmp_path, config, devices=("cpu:0", "cpu:1"))
  assert changes == ["differs from the last start: devices: ('cpu:0',) -> "
                     "('cpu:0', 'cpu:1')"]
  assert len(workdir.environments()) == 2
  assert (tmp_path / "config.json").read_bytes() == before


def test_another_config_is_refused_with_the_difference(tmp_path, config):
  trained(create(tmp_path, config)[0])
  other = config_lib.load(TINY, ["reason.num_steps=4", "seed=1"])
  with pytest.raises(workdir_lib.WorkdirError) as error:
    create(tmp_path, other)
  assert "  reason.num_steps: 8 -> 4\n" in str(error.value)
  assert "  seed: 0 -> 1\n" in str(error.value)
  assert "learning_rate" not in str(error.value)
  assert len(workdir_lib.open_existing(tmp_path).environments()) == 1


@pytest.mark.parametrize("made", [
    "reason/checkpoints/4/state", "measure/eval/init.json", "reason/done.json",
    "reason/damaged/4/state"])
def test_what_counts_as_trained(tmp_path, config, made):
  create(tmp_path, config)
  (tmp_path / made).parent.mkdir(parents=True)
  (tmp_path / made).write_text("{}")
  with pytest.raises(workdir_lib.WorkdirError, match="seed: 0 -> 1"):
    create(tmp_path, config_lib.load(TINY, ["seed=1"]))


def test_rows_count_as_trained(tmp_path, config):
  create(tmp_path, config)
  (tmp_path / "metrics.jsonl").write_text('{"stage": "reason", "step": 1}\n')
  with pytest.raises(workdir_lib.WorkdirError, match="seed: 0 -> 1"):
    create(tmp_path, config_lib.load(TINY, ["seed=1"]))


def test_a_config_that_has_trained_nothing_gives_way(tmp_path, config):
  """With all that it made, and nothing else."""
  create(tmp_path, config)
  left = ["model.json", "tokenizer/tokenizer.model", "metrics.jsonl",
          "tokenizer/SHA256SUMS",
          "tensorboard/reason/events.out.tfevents.1.a.from_step_0",
          "reason/data_report.json", "reason/goodput.json",
          "reason/rollouts/step_000000.jsonl",
          "tokenizer.partial/chat_template.jinja",
          "reason/eval/.init.json.7.partial"]
  kept = ["reason/checkpoints/4.orbax-checkpoint-tmp-1/state", ".notes",
          "reason/bad_batch_step_000003.npz", "frozen/ab/0/state",
          "reason/profile/plugins/x"]
  for name in (*left, *kept):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{")
  other = config_lib.load(TINY, ["reason.num_steps=4"])
  workdir, news = create(tmp_path, other)
  assert config_lib.diff(workdir.config(), other) == []
  assert news == [
      "differs from the last start (nothing had been trained, so it replaces "
      "that config): reason.num_steps: 8 -> 4"]
  assert not any((tmp_path / name).exists() for name in left)
  assert not (tmp_path / "tokenizer").exists()
  assert all((tmp_path / name).exists() for name in kept)
  assert len(workdir.environments()) == 2


def contents(path):
  return {file.relative_to(path): file.read_bytes()
          for file in path.rglob("*") if file.is_file()}


RELEASE = {
    "model.json": "{}", "metrics.jsonl": "{}", "weights.safetensors": "w",
    "tokenizer/tokenizer.json": "{}", "reason/data_report.json": "{}"}


@pytest.mark.parametrize("environment", [None, "[]", '[{"a": 1}]'])
@pytest.mark.parametrize("found", [
    {"model_type": "llama"}, {"stages": ["a"]}, {"stages": 3}, {"stages": []}])
def test_what_is_not_ours_is_refused_and_stays(
    tmp_path, config, found, environment):
  """A release of a model has a config.json too."""
  files = RELEASE | {"config.json": json.dumps(found)}
  if environment is not None:
    files["environment.json"] = environment
  for name, content in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
  before = contents(tmp_path)
  with pytest.raises(workdir_lib.WorkdirError, match=(
      "belongs to a run of another config" if "stages" in found
      else "holds files, but no run .its config.json has no stages")):
    create(tmp_path, config)
  assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [
    "notes.txt", "tokenizer/notes.txt", "tokenizer/tokenizer.json",
    "tensorboard/reason/mine", "reason/rollouts/best.jsonl",
    "other/data_report.json", "tokenizer.partial/a/tokenizer.json"])
def test_a_file_that_no_run_wrote_keeps_a_directory_as_it_is(
    tmp_path, config, name):
  """The same command goes on; another config is refused."""
  create(tmp_path, config)
  for file in ("model.json", "reason/data_report.json", name):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("mine")
  before = contents(tmp_path)
  with pytest.raises(workdir_lib.WorkdirError, match="seed: 0 -> 1"):
    create(tmp_path, config_lib.load(TINY, ["seed=1"]))
  assert contents(tmp_path) == before
  create(tmp_path, config)
  after = contents(tmp_path)
  assert all(after[file] == content for file, content in before.items()
             if file.name != "environment.json")


def test_to_evaluate_begins_nothing_anew(tmp_path, config):
  create(tmp_path, config)
  (tmp_path / "tokenizer").mkdir()
  with pytest.raises(workdir_lib.WorkdirError, match="seed: 0 -> 1"):
    create(tmp_path, config_lib.load(TINY, ["seed=1"]), anew=False)
  create(tmp_path, config, anew=False)
  assert (tmp_path / "tokenizer").exists()


def test_named_sections_may_differ_and_the_record_stays(tmp_path, config):
  trained(create(tmp_path, config)[0])
  other = config_lib.load(TINY, ["measure.num_waits=0,1,2", "seed=0"])
  workdir, _ = create(tmp_path, other, may_differ=("measure",))
  assert config_lib.diff(workdir.config(), config) == []
  with pytest.raises(workdir_lib.WorkdirError, match="seed: 0 -> 1"):
    create(tmp_path, config_lib.load(TINY, ["seed=1"]),
           may_differ=("measure",))


def test_a_directory_with_other_files_is_refused(tmp_path, config):
  (tmp_path / ".config.json.1.partial").write_text("{")
  create(tmp_path, config)  # What a killed first write leaves is no file.
  (tmp_path / "other").mkdir()
  (tmp_path / "other/thesis.tex").write_text("...")
  with pytest.raises(workdir_lib.WorkdirError, match="holds files, but no run"):
    create(tmp_path / "other", config)
  with pytest.raises(workdir_lib.WorkdirError, match="holds no run"):
    workdir_lib.open_existing(tmp_path / "other")


def test_a_reward_that_does_not_exist_is_found_at_the_start(tmp_path):
  config = config_lib.load(TINY, ["reason.rewards=no.such.module:reward"])
  with pytest.raises(ValueError, match="no module"):
    create(tmp_path / "run", config)
  assert not (tmp_path / "run").exists()


def test_finished_stages(tmp_path, config):
  workdir, _ = create(tmp_path, config)
  assert workdir.finished("reason") is None
  workdir.finish("reason", {"step": 8})
  assert workdir.finished("reason") == {"step": 8}
  assert workdir.checkpoints("reason") == tmp_path / "reason/checkpoints"


def test_a_process_that_is_not_the_writer_writes_nothing(tmp_path):
  workdir = workdir_lib.Workdir(tmp_path / "run", is_writer=False)
  workdir.finish("reason", {})
  workdir.write_text("a.txt", "a")
  workdir.stage("reason")
  assert not (tmp_path / "run").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  file = tmp_path / "a.json"
  workdir_lib.replace_file(file, b"old")
  def fail(descriptor):
    raise OSError("disk full")
  monkeypatch.setattr(workdir_lib.os, "fsync", fail)
  with pytest.raises(OSError, match="disk full"):
    workdir_lib.replace_file(file, b"new")
  assert file.read_bytes() == b"old"


def test_numbers_that_json_has_not_are_refused(tmp_path):
  workdir = workdir_lib.Workdir(tmp_path)
  with pytest.raises(ValueError):
    workdir.write_json("a.json", {"loss": float("nan")})
  assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("content", [
    b"", b"{", b'{"a": "\xff"}', b"[]", b"3", b"null", b"[" * 100_000])
def test_a_damaged_config_is_named(tmp_path, config, content):
  file = tmp_path / "config.json"
  file.write_bytes(content)
  damaged = pytest.raises(
      workdir_lib.WorkdirError,
      match=f"^{file} is damaged: .* Put a copy back.$")
  with damaged:
    workdir_lib.open_existing(tmp_path).config()
  with damaged:
    create(tmp_path, config)
  assert file.read_bytes() == content


def test_a_config_of_another_shape_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"stages": 3, "sed": 1}')
  with pytest.raises(config_lib.ConfigError, match=(
      f"^{tmp_path}/config.json: ")):
    workdir_lib.open_existing(tmp_path).config()


@pytest.mark.parametrize("content", [b"[{}", b"\xff", b"{}", b"[1]", b""])
def test_a_damaged_record_of_starts_is_begun_anew(tmp_path, config, content):
  create(tmp_path, config)
  (tmp_path / "environment.json").write_bytes(content)
  workdir, news = create(tmp_path, config)
  [line] = news
  assert line.startswith(f"{tmp_path}/environment.json ")
  assert line.endswith(
      "It is environment.json.damaged now, and is begun anew.")
  assert (tmp_path / "environment.json.damaged").read_bytes() == content
  assert len(workdir.environments()) == 1


def test_what_killed_processes_had_begun_is_removed(tmp_path, config):
  workdir = create(tmp_path, config)[0]
  trained(workdir)
  dead, alive = 2**22 + 1, os.getpid()  # No process has the first number.
  gone = [f".config.json.{alive}.partial", f"reason/.done.json.{dead}.partial",
          f"reason/rollouts/.step_000001.jsonl.{dead}.partial",
          f"measure/eval/.init.json.{alive}.partial",
          f".report.html.{dead}.partial", f".lease.{'0a' * 16}.partial"]
  stays = [f".report.html.{alive}.partial", ".mine.partial",
           "reason/checkpoints/4/.x.1.partial"]
  for name in (*gone, *stays):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{")
  create(tmp_path, config)
  assert [name for name in gone if (tmp_path / name).exists()] == []
  assert [name for name in stays if not (tmp_path / name).exists()] == []


def test_a_bucket_is_no_directory():
  with pytest.raises(workdir_lib.WorkdirError, match="Mount the bucket"):
    workdir_lib.Workdir("gs://bucket/run")
