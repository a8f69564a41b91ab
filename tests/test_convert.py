"""Weights in and out of a run. Oracle: the arrays, bit for bit."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from posttrain import config as config_lib
from posttrain import convert, pipeline, sharding, weights
from posttrain import workdir as workdir_lib
from posttrain.interop import hugging_face, released
from posttrain.model import transformer
from tests import meshes, pipeline_run, test_weights
from tests.interop import releases
from tests.text import build

PLAIN = pipeline_run.CONFIG | dict(tokenizer={}, model_overrides={})


@pytest.fixture
def release(tmp_path):
  """A directory as transformers saves it: a llama of another shape."""
  _, data, config, tensors = releases.released("llama", vocab_size=400)
  path = tmp_path / "release"
  releases.write(path, data | dict(model_type="llama"), tensors)
  build.byte_level(
      ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
      eos="<|im_end|>", chat_template=build.CHATML).save(path)
  return path, config, tensors


def started(kind: str, path, *assignments) -> config_lib.config_dict.ConfigDict:
  return config_lib.assign(
      PLAIN | dict(model="", init=dict(kind=kind, path=str(path)),
                   chat_template=""),
      ["stages=cold_start", *assignments], "test")


def exported(path) -> dict[str, np.ndarray]:
  found = {}
  for file in path.glob("*.safetensors"):
    found |= safetensors.numpy.load_file(file)
  return found


def same(found: dict, wanted: dict) -> None:
  assert found.keys() == wanted.keys()
  for name, want in wanted.items():
    assert found[name].tobytes() == np.ascontiguousarray(want).tobytes(), name


def test_a_run_starts_from_a_directory_of_transformers(release, tmp_path):
  """In its shape, with its tokenizer and template, and kept in the workdir."""
  path, config, tensors = release
  with jax.set_mesh(meshes.one()):
    run = pipeline.set_up(started("preset", path), str(tmp_path / "run"))
    assert run.model == config
    assert run.renderer.tokenizer.chat_template == build.CHATML
    same(releases.host_tensors(sharding.fetch(transformer.to_dict(
        run.weights_of("init"))), config), tensors)
    # Once something has been trained the release may be moved away.
    run.workdir.finish("reason", {"step": 0})
    path.rename(tmp_path / "moved")
    again = pipeline.set_up(started("preset", path), str(tmp_path / "run"))
    assert again.model == config
    other = pipeline.set_up(
        started("workdir", tmp_path / "run"), str(tmp_path / "other"))
    assert other.model == config


def test_import_and_export_give_back_every_bit(release, tmp_path, capsys):
  path, config, tensors = release
  convert.import_release(started("preset", path), str(tmp_path / "in"))
  assert "tensors 57/57" in capsys.readouterr().out
  names = {file.name for file in (tmp_path / "in").iterdir()}
  assert names == {"model.json", "tokenizer", "checkpoints"}
  for kind, start in (("preset", path), ("directory", tmp_path / "in"),
                      ("directory", tmp_path / "in/checkpoints/0")):
    output = tmp_path / f"out-{kind}-{start.name}"
    convert.export(started(kind, start), str(output))
    same(exported(output), tensors)
    assert hugging_face.model_config(hugging_face.read(output)) == config
    template = (output / "chat_template.jinja").read_text()
    assert template == build.CHATML
  assert "tensors 57/57" in capsys.readouterr().out
  assert not list(tmp_path.glob(".*"))


def test_an_imported_model_takes_any_template(release, tmp_path):
  """Nothing says what it was trained with; of a run's checkpoint it is said."""
  path, config, _ = release
  convert.import_release(started("preset", path), str(tmp_path / "in"))
  with jax.set_mesh(meshes.one()):
    for template in ("", "plain"):
      run = pipeline.set_up(
          started("directory", tmp_path / "in", f"chat_template={template}",
                  "stages=reason"), str(tmp_path / f"run{template}"))
      assert run.weights_of("init").config == config


def test_any_checkpoint_of_any_stage(tmp_path):
  path = tmp_path / "run"
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(path, test_weights.STAGE)
    test_weights.save(run, 7, 8)
    wanted = {
        seed: sharding.fetch(transformer.to_dict(
            transformer.init(run.model, seed))) for seed in (0, 7, 8)}
  config = workdir_lib.open_existing(path).config()
  for number, (flags, seed) in enumerate([
      ({}, 8), (dict(stage="cold_start"), 8), (dict(step=1), 7),
      (dict(stage="cold_start", step=2), 8), (dict(stage="init"), 0)]):
    output = tmp_path / f"out{number}"
    convert.export(config, str(output), workdir=str(path), **flags)
    same(exported(output), releases.host_tensors(wanted[seed], run.model))
  for flags, error, message in (
      (dict(step=5), FileNotFoundError, r"no checkpoint of step 5.*\[1, 2\]"),
      (dict(stage="reason"), ValueError, "no checkpoint of a stage 'reason'")):
    with pytest.raises(error, match=message):
      convert.export(
          config, str(tmp_path / "new"), workdir=str(path), **flags)
  with pytest.raises(ValueError, match="exists, and is not overwritten"):
    convert.export(config, str(tmp_path / "out0"), workdir=str(path))


def test_a_shape_that_nothing_tells(tmp_path):
  (tmp_path / "tokenizer").mkdir()
  build.byte_level(["<|e|>"], eos="<|e|>").save(tmp_path / "tokenizer")
  with pytest.raises(ValueError, match=r"there is no model\.json in or above"):
    weights.model_config(started("directory", tmp_path), 300)
  (tmp_path / "model.json").write_text(json.dumps(dict(vocab_size=3)))
  with pytest.raises(ValueError, match="the shape of a model is damaged"):
    weights.model_config(started("directory", tmp_path), 300)


def test_tokens_that_the_model_has_no_embedding_for(release, tmp_path):
  """Gemma 3's smallest have one; the rest of the ids stay as they are."""
  path, config, _ = release
  file = path / "tokenizer.json"
  tokenizer = tokenizers.Tokenizer.from_file(str(file))
  filler = [f"<filler {i}>" for i in range(
      tokenizer.get_vocab_size(), config.vocab_size)]
  tokenizer.add_tokens([*filler, "<image>"])
  assert tokenizer.token_to_id("<image>") == config.vocab_size
  tokenizer.save(str(file))
  found = released.tokenizer(released.read(path))
  assert found.vocab_size == config.vocab_size
  text = f"hello world {filler[-1]}"
  assert found.encode(text) == tokenizer.encode(text).ids
  assert config.vocab_size not in found.encode("<image>", special=True)
  weights.model_config(started("preset", path), found.vocab_size)


def test_a_preset_of_another_shape_is_refused(release, tmp_path):
  path, _, _ = release
  config = started("preset", path, "model=smollm2-135m")
  with jax.set_mesh(meshes.one()):
    run = pipeline.set_up(config, str(tmp_path / "run"))
    with pytest.raises(ValueError, match='or set model to "" for the file'):
      run.weights_of("init")


@pytest.mark.slow
def test_two_hosts_import_and_export_together(release, tmp_path):
  """Each reads its part; one writes. The files are those of one host."""
  path, _, tensors = release
  root = pathlib.Path(__file__).parents[1]
  for verb, model, output in (("import", path, tmp_path / "in"),
                              ("export", tmp_path / "in", tmp_path / "out"),
                              ("export", path, tmp_path / "copy")):
    done = subprocess.run(
        [sys.executable, "launch/local.py", "--processes=2",
         "--devices-per-process=2", "--", verb, f"--model={model}",
         f"--output={output}", "--config.mesh.tensor=2"],
        cwd=root, text=True, capture_output=True, check=False, timeout=600,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)})
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
  same(exported(tmp_path / "out"), tensors)
  same(exported(tmp_path / "copy"), tensors)
  assert not list(tmp_path.glob(".*"))
