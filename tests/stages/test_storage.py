"""Disks that are full or read-only, and files that are damaged."""

import contextlib
import errno
import functools
import pathlib
import resource
import shutil

import jax
import numpy as np
import pytest

from posttrain import config as config_lib
from posttrain import pipeline, workdir
from posttrain.cli import main
from posttrain.train import checkpoints
from posttrain.train.checkpoint_integrity import DamagedError
from tests import meshes
from tests.stages import sft_run
from tests.stages.test_sft import leave_at, repeatable, rows_of

# Tensorstore drops its reads when an error is raised in the middle of them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
    "ignore:Sharding info not provided")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  path = tmp_path_factory.mktemp("whole")
  run(path)
  return path


def run(path, changes=()):
  with jax.set_mesh(meshes.one()):
    sft_run.run(path, changes)


def assert_same(path, whole):
  assert repeatable(rows_of(path)) == repeatable(rows_of(whole))
  a, b = sft_run.saved_state(path), sft_run.saved_state(whole)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@contextlib.contextmanager
def no_file_above(size):
  """As a full disk: the kernel refuses to write on."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_the_run_which_then_goes_on(
    whole, tmp_path, monkeypatch, caplog):
  """The arrays of a step do not fit; those before are as they were.

  The error is one line, and no thread of Orbax's logs a traceback beside it.
  """
  path = tmp_path / "run"
  leave_at(monkeypatch, 4)
  with pytest.raises(SystemExit):
    run(path)
  monkeypatch.undo()
  with no_file_above(12_000), pytest.raises(
      workdir.StorageError,
      match=f"{path}.* could not be written: .*Is the disk full") as error:
    run(path)
  assert not isinstance(error.value, DamagedError)
  assert "\n" not in str(error.value)
  assert [record for record in caplog.records if record.exc_info] == []
  folder = path / "cold_start/checkpoints"
  # How arrays share files varies, but one of 16 KiB is in none below the limit.
  assert checkpoints.find_step(folder) == 4
  run(path)
  assert_same(path, whole)


def damage(path, step, how):
  for file in (path / f"cold_start/checkpoints/{step}/state").rglob("*"):
    if file.is_file() and how == "missing":
      file.unlink()
    elif file.is_file():
      file.write_bytes(file.read_bytes()[:-20])


@pytest.fixture
def interrupted(whole, tmp_path):
  """The run before it had finished: at step 12, with step 8 behind it."""
  path = shutil.copytree(whole, tmp_path / "run")
  (path / "cold_start/done.json").unlink()
  return path


@pytest.mark.parametrize("how", ["cut", "missing"])
def test_a_damaged_checkpoint(whole, interrupted, how, capsys):
  """An error; the one before it only where the config says so, and loudly."""
  path = interrupted
  damage(path, 12, how)
  with pytest.raises(
      DamagedError, match=r"checkpoints/12 could not be read.*"
      "on_damaged=previous"):
    run(path)
  run(path, ["cold_start.checkpoint.on_damaged=previous"])
  shown = " ".join(capsys.readouterr().out.split())
  assert "GOING BACK from step 12 to step 8" in shown
  assert "resumed from step 8" in shown
  assert_same(path, whole)
  assert (path / "cold_start/damaged/12").is_dir()


def test_nothing_good_is_left(interrupted):
  for step in (8, 12):
    damage(interrupted, step, "cut")
  with pytest.raises(DamagedError, match="checkpoints/8 could not"):
    run(interrupted, ["cold_start.checkpoint.on_damaged=previous"])
  assert not (interrupted / "cold_start/done.json").exists()


def test_a_workdir_that_cannot_be_written_is_refused_at_the_start():
  """Of a real file system where nobody makes directories, root included."""
  if not pathlib.Path("/sys/kernel").is_dir():
    pytest.skip("there is no /sys")
  with pytest.raises(
      workdir.WorkdirError, match=r"--workdir=/sys/kernel/posttrain cannot be "
      r"written: .* Name one on a disk that is writable"):
    sft_run.make_context("/sys/kernel/posttrain")


@pytest.mark.parametrize("error, message", [
    (OSError(errno.ENOSPC, "x", "runs/a/metrics.jsonl"),
     "runs/a/metrics.jsonl could not be written or read: No space left on"),
    (OSError(errno.EROFS, "x"), "A file of the run could not be written or"),
    (workdir.StorageError("Checkpoint 4 is damaged."), "Checkpoint 4 is dam"),
])
def test_the_command_line_names_the_file_and_fails(
    tmp_path, monkeypatch, capsys, error, message):
  def train(*unused, **options):
    raise error
  monkeypatch.setattr(pipeline, "train", train)
  monkeypatch.setattr(main, "_start", lambda config: None)
  assert main.main([
      "train", "--config=configs/tiny.py", f"--workdir={tmp_path}"]) == 1
  assert capsys.readouterr().err.startswith(f"posttrain: {message}")


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
  def train(*unused, **options):
    raise ConnectionResetError(errno.ECONNRESET, "x", "y")
  monkeypatch.setattr(pipeline, "train", train)
  monkeypatch.setattr(main, "_start", lambda config: None)
  with pytest.raises(ConnectionResetError):
    main.main(["train", "--config=configs/tiny.py", f"--workdir={tmp_path}"])


@pytest.mark.parametrize("change, allowed", [
    ("mesh.tensor=2", True),
    ("cold_start.checkpoint.on_damaged=previous", True),
    ("cold_start.checkpoint.every=3", False), ("seed=1", False),
])
def test_what_a_run_may_go_on_with_changed(tmp_path, change, allowed):
  sft_run.make_context(tmp_path)
  (tmp_path / "cold_start/checkpoints/4").mkdir(parents=True)
  if allowed:
    saved = (tmp_path / "config.json").read_bytes()
    _, changes = workdir.create(
        tmp_path, sft_run.make_context(tmp_path, [change]).config, devices=[])
    assert any(change.partition("=")[0] in line for line in changes)
    assert (tmp_path / "config.json").read_bytes() == saved
  else:
    with pytest.raises(workdir.WorkdirError, match="run of another config"):
      sft_run.make_context(tmp_path, [change])


def test_a_run_may_go_on_with_more_time_for_rewards():
  """More time-outs than health.max_unscored have stopped it."""
  changes = lambda *path: config_lib.diff(*(
      functools.reduce(lambda inner, key: {key: inner}, reversed(path), value)
      for value in (10.0, 60.0)))
  [line] = changes("reason", "workers", "seconds")
  assert workdir.MAY_CHANGE.match(line)
  for path in (("reason", "seconds"), ("workers", "seconds"),
               ("reason", "loss", "workers", "seconds")):
    [line] = changes(*path)
    assert not workdir.MAY_CHANGE.match(line)
