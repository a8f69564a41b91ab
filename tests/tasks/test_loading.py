"""Names that load, and what is said about those that do not."""

import hashlib
import inspect

import pytest

from posttrain.tasks import loading, signs


def test_a_module_and_a_file_give_the_same_source(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(inspect.getsource(signs))
  function = loading.load_function(f"{file}:reward")
  assert inspect.getsource(function) == inspect.getsource(signs.reward)
  assert (loading.load_function("posttrain.tasks.signs:reward")
          is signs.reward)
  digest = hashlib.sha256(file.read_bytes()).hexdigest()
  assert loading.source_hash(f"{file}:reward") == digest
  assert loading.source_hash("posttrain.tasks.signs:problems") == digest


def test_a_relative_file(tmp_path, monkeypatch):
  (tmp_path / "mine.py").write_text("def reward(): return 3\n")
  monkeypatch.chdir(tmp_path)
  assert loading.load_function("mine.py:reward")() == 3


def test_a_file_runs_once_and_two_of_one_name_are_apart(tmp_path):
  for folder, value in (("a", 1), ("b", 2)):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "mine.py").write_text(
        "import dataclasses\n"
        "@dataclasses.dataclass\nclass Row:\n  n: int\n"
        f"def reward(): return Row({value}).n\nother = reward\n")
  one = loading.load_function(f"{tmp_path}/a/mine.py:reward")
  assert one() == 1
  assert loading.load_function(f"{tmp_path}/a/mine.py:other") is one
  assert loading.load_function(f"{tmp_path}/b/mine.py:reward")() == 2


@pytest.mark.parametrize("name, message", [
    ("reward", "module:function"),
    ("posttrain.tasks.signs:", "module:function"),
    (":reward", "module:function"),
    ("posttrain.tasks.signs:rewrad", "Nearest: 'reward'"),
    ("posttrain.tasks.sings:reward", "Nearest: 'posttrain.tasks.signs'"),
    ("posttrian.tasks.signs:reward", "no module 'posttrian'"),
    ("posttrain.tasks.signs:LOW", "is a int"),
    ("nowhere/mine.py:reward", "no file .*nowhere/mine.py")])
def test_errors(name, message):
  with pytest.raises(ValueError, match=message):
    loading.load_function(name)


def test_a_fault_inside_the_module_is_its_own(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text("import no_such_dependency\n")
  for _ in range(2):  # A half-run module is not kept.
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
      loading.load_function(f"{file}:reward")
