"""A first start that fails does not refuse the command that corrects it."""

import jax
import pytest

from posttrain.cli import main
from posttrain.stages import sft
from tests import pipeline_run
from tests.stages import toy


class Reached(Exception):
  """The corrected command has come as far as to compile its update."""


@pytest.fixture(autouse=True)
def up_to_the_first_step(monkeypatch):
  def stop(*unused, **options):
    raise Reached
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  monkeypatch.setattr(main, "_start", lambda config: None)
  monkeypatch.setattr(sft, "make_programs", stop)


def start(path, *changes):
  return main.main([
      "train", f"--config={pipeline_run.__file__}", f"--workdir={path}",
      "--config.stages=cold_start",
      *(f"--config.{change}" for change in changes)])


def fails(path, *changes):
  """By an error, or by the status and the line that it becomes."""
  try:
    return start(path, *changes) != 0
  except (ValueError, FileNotFoundError):
    return True


@pytest.mark.parametrize("wrong", [
    ("tokenizer.model_type=bpe", "tokenizer.vocab_size=3"),
    ("tokenizer.train=tests.test_first_start:nothing",),
    ("tokenizer.symbols=a b",),
    ("model_overrides.vocab_size=2",),
    ("cold_start.sequence_length=4",),
    ("init.kind=directory", "init.path=/nonexistent"),
])
def test_the_corrected_command_starts(tmp_path, wrong):
  """Tokenizer, shape, data and weights that were wrong leave nothing."""
  assert fails(tmp_path / "run", *wrong)
  assert (tmp_path / "run/config.json").exists()
  with pytest.raises(Reached):
    start(tmp_path / "run")
  with pytest.raises(Reached):
    start(tmp_path / "new")
  for name in ("config.json", "model.json", "tokenizer/tokenizer.model"):
    assert (tmp_path / "run" / name).read_bytes() == (
        tmp_path / "new" / name).read_bytes()


def test_what_a_tokenizer_was_made_of_is_corrected(tmp_path, monkeypatch):
  """The config is the same, and the corpus is another."""

  words = list(toy.corpus())
  monkeypatch.setattr(toy, "corpus", lambda: [*words, "more words"])
  with pytest.raises(Reached):
    start(tmp_path / "run")
  monkeypatch.setattr(toy, "corpus", lambda: words)
  for name in ("run", "new"):
    with pytest.raises(Reached):
      start(tmp_path / name)
  vocabulary = [
      (tmp_path / name / "tokenizer/tokenizer.model").read_bytes()
      for name in ("run", "new")]
  assert vocabulary[0] == vocabulary[1]


def test_a_mistake_in_a_function_leaves_no_directory(tmp_path):
  assert fails(tmp_path / "run", "cold_start.data.sources.0.task=no.module:f")
  assert not (tmp_path / "run").exists()


def nothing():
  return []
