"""Weights come from where `init` says, and only if they fit the config."""

import jax
import numpy as np
import pytest

from posttrain import config as config_lib
from posttrain import pipeline, weights, workdir
from posttrain.cli import sample
from posttrain.sampler import sampler, token_sampling
from posttrain.stages import loop, training
from posttrain.train import state
from posttrain.train import step as step_lib
from tests import meshes, pipeline_run

STAGE = ["stages=cold_start"]


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(meshes.one()):
    yield


def save(run: pipeline.Pipeline, *seeds: int) -> None:
  """Saves a checkpoint per seed, as if "cold_start" had been trained."""
  context = run.context("cold_start")
  adamw, _ = training.make_update(context.section, step_lib.Loss)
  with loop.open_checkpoints(context) as saver:
    for number, seed in enumerate(seeds, 1):
      model = weights.transformer.init(run.model, seed)
      loop.save(
          context, saver, state.create(model, adamw), number, {})
  run.workdir.finish("cold_start", {"step": len(seeds)})


@pytest.fixture(scope="module")
def other(tmp_path_factory):
  """The workdir of another run with two checkpoints, of seeds 7 and 8."""
  path = tmp_path_factory.mktemp("other")
  with jax.set_mesh(meshes.one()):
    save(pipeline_run.make_pipeline(path, STAGE), 7, 8)
  return path


def continued(path, *init, stages="reason", template="plain"):
  """A run whose tokenizer and weights come from another."""
  config = config_lib.assign(
      pipeline_run.CONFIG | {"tokenizer": {}},
      [f"stages={stages}", f"chat_template={template}", *init], "test")
  return pipeline.set_up(config, str(path))


def assert_seed(model, run, seed):
  wanted = weights.transformer.init(run.model, seed)
  for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(wanted),
                  strict=True):
    assert a.sharding == b.sharding
    np.testing.assert_array_equal(a, b)


def test_random_weights_are_the_seeds(tmp_path):
  run = pipeline_run.make_pipeline(tmp_path, ["seed=7"])
  assert_seed(run.weights_of("init"), run, 7)


@pytest.mark.parametrize("init, seed", [
    (["init.kind=workdir", "init.path={}"], 8),
    (["init.kind=workdir", "init.path={}", "init.stage=cold_start"], 8),
    (["init.kind=directory", "init.path={}/cold_start/checkpoints"], 8),
    (["init.kind=directory", "init.path={}/cold_start/checkpoints/1"], 7),
])
def test_another_runs_weights_and_tokenizer(other, tmp_path, init, seed):
  run = continued(tmp_path, *(part.format(other) for part in init))
  assert_seed(run.weights_of("init"), run, seed)
  assert run.renderer.tokenizer.fingerprint() == (
      pipeline_run.make_pipeline(other, STAGE).renderer.tokenizer.fingerprint())
  # Kept here too: the other run may be moved away.
  assert (tmp_path / "tokenizer").is_dir()


def test_a_checkpoints_directory_may_be_named_anywhere(other, tmp_path):
  run = pipeline_run.make_pipeline(tmp_path)
  assert_seed(
      run.weights_of(f"{other}/cold_start/checkpoints/1"), run, 7)


@pytest.mark.parametrize("init, error, message", [
    (["init.kind=workdir", "init.path=/nonexistent"],
     ValueError, "names no tokenizer"),
    (["init.kind=workdir", "init.path={}", "init.stage=reason"],
     ValueError, "init.stage='reason' has not finished"),
    (["init.kind=directory", "init.path={}/cold_start/checkpoints/5"],
     FileNotFoundError, "no checkpoint of step 5; it has \\[1, 2\\]"),
    (["init.kind=directory", "init.path={}/reason/checkpoints"],
     FileNotFoundError, "does not exist"),
    (["init.kind=workdir", "init.path={}", "model_overrides.embed=16"],
     ValueError, "in this run. Use the model config"),
])
def test_what_is_not_there_or_does_not_fit(
    other, tmp_path, init, error, message):
  with pytest.raises(error, match=message):
    continued(tmp_path, *(part.format(other) for part in init)).weights_of(
        "init")


TEMPLATE = """{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"""


def test_another_template_is_refused_unless_it_is_trained_first(
    other, tmp_path):
  """Sampling with a template that the weights never saw is a mistake."""
  file = tmp_path / "template.jinja"
  file.write_text(TEMPLATE)
  init = ["init.kind=workdir", f"init.path={other}"]
  run = continued(tmp_path / "a", *init, template=file)
  with pytest.raises(ValueError, match="another tokenizer or chat template"):
    run.weights_of("init")
  with pytest.raises(ValueError, match="another tokenizer or chat template"):
    run.weights_of(f"{other}/cold_start/checkpoints")
  run = continued(
      tmp_path / "b", *init, template=file, stages="cold_start,reason")
  assert_seed(run.weights_of("init"), run, 8)


@pytest.mark.parametrize("flags", [
    {}, {"workdir": "{}"}, {"workdir": "{}", "stage": "cold_start"},
    {"workdir": "{}", "stage": "init"}])
def test_another_template_is_not_sampled_with(
    other, tmp_path, monkeypatch, flags):
  """Whichever way the weights are named: by `init`, or in a workdir."""
  mesh = meshes.one()
  monkeypatch.setattr(sample.sharding, "make_mesh", lambda *_, **unused: mesh)
  file = tmp_path / "template.jinja"
  file.write_text(TEMPLATE)
  config = config_lib.assign(
      pipeline_run.CONFIG | {"tokenizer": {}},
      ["stages=cold_start", f"chat_template={file}", "init.kind=workdir",
       f"init.path={other}"], "test")
  flags = {name: value.format(other) for name, value in flags.items()}
  with pytest.raises(ValueError, match="another tokenizer or chat template"):
    sample.run(
        config, [{"prompt": "one"}], params=token_sampling.SamplingParams(),
        limits=sampler.Limits(max_tokens=1), **flags)


def test_a_model_too_small_for_its_tokenizer_is_an_error(tmp_path):
  config = config_lib.assign(
      pipeline_run.CONFIG, ["model_overrides.vocab_size=5"], "test")
  with pytest.raises(ValueError, match=r"The tokenizer has .* ids and the mod"):
    pipeline.set_up(config, str(tmp_path))
  padded = config_lib.assign(
      pipeline_run.CONFIG, ["model_overrides.vocab_size=99"], "test")
  assert weights.model_config(padded, 20).vocab_size == 99


def test_a_tokenizer_that_was_half_written_is_made_again(tmp_path):
  (tmp_path / "run").mkdir()
  config = config_lib.assign(pipeline_run.CONFIG, [], "test")
  run, _ = workdir.create(tmp_path / "run", config, devices=[])
  partial = tmp_path / "run/tokenizer.partial"
  partial.mkdir()
  (partial / "tokenizer.model").write_bytes(b"half")
  first = weights.tokenizer(config, run)
  assert not partial.exists()
  assert weights.tokenizer(config, run).fingerprint() == first.fingerprint()
