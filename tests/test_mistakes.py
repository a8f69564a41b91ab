"""A user's mistake after JAX is imported: one line, status 2.

A bug keeps its traceback. Which is which is told by who raised.
"""

import contextlib
import importlib
import pathlib
import subprocess
import sys

import pytest

from posttrain import mistakes
from posttrain.cli import main as main_lib

ROOT = pathlib.Path(__file__).parents[1]
TINY = f"--config={ROOT / 'configs/tiny.py'}:debug"
OUT = "--output=/nonexistent/x"


@pytest.fixture(autouse=True)
def joined(monkeypatch):
  """The devices of the test process are there already."""
  monkeypatch.setattr(main_lib, "_start", lambda config: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A workdir with one checkpoint, of step 1."""
  path = tmp_path_factory.mktemp("runs") / "trained"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(main_lib, "_start", lambda config: None)
    assert main_lib.main([
        "train", TINY, f"--workdir={path}", "--config.stages=cold_start",
        "--config.cold_start.num_steps=1", "--config.cold_start.rows=8"]) == 0
  return path


def said(capsys, *argv):
  """The one line of a mistake."""
  assert main_lib.main(argv) == main_lib.USAGE_ERROR
  error = capsys.readouterr().err
  assert error.startswith("posttrain: ") and "Traceback" not in error
  return error


@pytest.mark.parametrize("more, expected", [
    (["--config.mesh.tensor=3"],
     "mesh.fsdp=-1 and mesh.tensor=3 do not fit 8 devices: sizes beside -1"),
    (["--config.mesh.fsdp=2", "--config.mesh.tensor=1"],
     'they multiply to 2. Set mesh.fsdp=-1 for "all remaining devices"'),
    (["--config.init.kind=directory", "--config.init.path=/nonexistent/x"],
     "/nonexistent/x does not exist"),
    (["--config.init.kind=preset", "--config.init.path=/nonexistent/x",
      "--config.model="], "/nonexistent/x does not exist; a GGUF file or"),
    (["--config.chat_template={tmp}"],
     "is a directory. Set chat_template to a Jinja file"),
    (["--config.chat_template=/nonexistent/x"], "Set chat_template to"),
    (["--config.chat_template=" + "x" * 9999], "xxx does not exist. Set chat_"),
    (["--config.measure.reward=builtins:len"],
     "measure.reward: 'builtins:len': builtins has no source file"),
    (["--config.reason.rollout.budget_schedule=a:b"],
     "reason.rollout.budget_schedule: 'a:b': there is no module 'a'"),
    (["--config.measure.reward={tmp}/cut.py:reward"], "cut.py, line 2: "),
    (["--config.measure.reward={tmp}/needs.py:reward"],
     "the package no_such_package is not installed in this environment, and "),
    (["--config.measure.problems.args.no_such=1"], "measure.problems.args: "),
])
def test_of_a_config(more, expected, capsys, tmp_path):
  (tmp_path / "cut.py").write_text("def reward(\n  x = (\n")
  (tmp_path / "needs.py").write_text("import no_such_package.part\n")
  more = [word.format(tmp=tmp_path) for word in more]
  assert expected in said(
      capsys, "train", TINY, f"--workdir={tmp_path}/run", *more)


@pytest.mark.parametrize("argv, expected", [
    (["sample", "--prompt=a", "--stage=nope"],
     "holds no checkpoint of a stage 'nope'; it has those of cold_start."),
    (["export", OUT, "--stage=nope"], "a stage 'nope'; it has those of"),
    (["export", OUT, "--step=77"], "no checkpoint of step 77; it has [1]"),
    (["train", "--config.mesh.fsdp=3"], "do not fit 8 devices"),
])
def test_of_a_workdir(argv, expected, capsys, trained):
  assert expected in said(capsys, *argv, f"--workdir={trained}")


def test_a_workdir_that_is_a_file(capsys, tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  assert f"--workdir={file} is a file. Name a directory." in said(
      capsys, "train", TINY, f"--workdir={file}")


FUNCTIONS = '''
def within_a_context(context):
  with context:
    raise ValueError("told")

def of_another(context):
  try:
    return int("x")
  except ValueError as error:
    raise ValueError("told") from error

def through(function):
  function()

def bug(context):
  return int("x")

def unpacked(context):
  a, b = [context]

def wrong_type(context):
  raise TypeError("a bug")

def own_module(context):
  from posttrain import no_such_module
'''


def caught(file, name, argument=None):
  namespace = {}
  exec(compile(FUNCTIONS, str(file), "exec"), namespace)
  try:
    namespace[name](argument or contextlib.nullcontext())
  except Exception as error:
    # As in `main`: the traceback begins with our own frames.
    return error.with_traceback(error.__traceback__.tb_next)
  raise AssertionError("nothing was raised")


OURS = mistakes.PACKAGE / "some_module.py"


@pytest.mark.parametrize("name", ["within_a_context", "of_another"])
def test_what_our_own_code_raises_is_a_users(name):
  assert mistakes.line(caught(OURS, name)) == "told"
  assert mistakes.line(caught("/home/user/loss.py", name)) is None


@pytest.mark.parametrize("name", [
    "bug", "unpacked", "wrong_type", "own_module"])
def test_what_python_raises_is_a_bug(name):
  assert mistakes.line(caught(OURS, name)) is None


def test_what_our_code_raises_below_a_users_function_shows_that_function():
  """A user's loss calls us wrongly: the traceback says where."""
  def call():
    raise caught(OURS, "within_a_context")
  assert mistakes.line(caught(OURS, "through", call)) is None


def test_libraries_may_be_on_the_way():
  def read():
    importlib.import_module("no_such_package")
  assert "no_such_package is not installed" in mistakes.line(
      caught("/home/user/task.py", "through", read))
  missing = caught(OURS, "through", lambda: (
      pathlib.Path("/nonexistent/x").read_text()))
  assert mistakes.line(missing) == (
      "/nonexistent/x: No such file or directory.")


def test_a_bug_report_has_its_traceback(monkeypatch):
  monkeypatch.setenv(mistakes.TRACEBACK, "1")
  assert mistakes.line(caught(OURS, "of_another")) is None


@pytest.mark.parametrize("text, expected", [
    ("def get_config(:\n", "c.py, line 1: invalid syntax"),
    ("\nimport no_such\n", "c.py, line 2: ModuleNotFoundError: No module"),
    ("def get_config():\n  return 1 / 0\n",
     "c.py, line 2: ZeroDivisionError: division by zero"),
    ("def get_config(): pass\n", "get_config() returns None, needed an"),
    ("get_config = 3\n", "get_config of "),
    ("x = 3\n", "defines no get_config()"),
    ("x = '\0'\n", "null bytes"),
])
def test_a_config_file_that_gives_no_config(text, expected, capsys, tmp_path):
  file = tmp_path / "c.py"
  file.write_text(text)
  line = said(capsys, "train", f"--config={file}", f"--workdir={tmp_path}/run")
  assert expected in line and str(file) in line


def test_a_real_process_ends_with_status_2(tmp_path):
  done = subprocess.run(
      [sys.executable, "-m", "posttrain", "train", TINY,
       f"--workdir={tmp_path}", "--config.mesh.tensor=3"],
      cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2
  assert "Traceback" not in done.stderr
  assert "posttrain: mesh.fsdp=-1 and mesh.tensor=3 do not" in done.stderr
