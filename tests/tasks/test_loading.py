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


@pytest.mark.parametrize("given, message", [
    (dict(count="9"), "takes count as int, and found '9', a str"),
    (dict(count=1.5), "takes count as int, and found 1.5, a float"),
    (dict(count=True), "takes count as int, and found True, a bool"),
    (dict(count=1, right="x"), "takes right as float"),
    (dict(count=1, nope="x" * 9999), r"does not take \('train', count=1, nope"),
])
def test_an_argument_is_of_its_annotations_type(given, message):
  name = "posttrain.tasks.signs:demonstrations"
  loading.check_call(name, "train", count=1, right=1, patience=[0.5, 1])
  with pytest.raises(ValueError, match=message) as caught:
    loading.check_call(name, "train", **given)
  assert len(str(caught.value)) < 500


@pytest.mark.parametrize("count", [-1, 2**63])
def test_demonstrations_without_number(count):
  function = loading.load_function("posttrain.tasks.signs:demonstrations")
  with pytest.raises(ValueError, match=f"found args.count={count}"):
    function("train", count)


def test_a_fault_inside_the_module_is_its_own(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text("import no_such_dependency\n")
  for _ in range(2):  # A half-run module is not kept.
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
      loading.load_function(f"{file}:reward")
