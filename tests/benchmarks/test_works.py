"""Each work does all of what it is counted as, again and again."""

import jax
import numpy as np
import pytest

from benchmarks import machine, ours, shapes
from benchmarks.limits import Product
from tests import meshes

MINIATURE = shapes.Size(
    layers=1, embed=32, mlp=32, heads=4, kv_heads=2, head_dim=8, vocab_size=64)
SMALL = {
    "generate": shapes.Shape(prompts=4, prompt=4, samples=1, new=4),
    "sft": shapes.Shape(rows=2, length=16),
    "grpo": shapes.Shape(prompts=2, prompt=4, samples=2, new=4)}


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(meshes.one()):
    yield


@pytest.mark.parametrize("work, again", [
    ("generate", 2), pytest.param("sft", 2, marks=pytest.mark.slow),
    pytest.param("grpo", 2, marks=pytest.mark.slow)])
def test_a_run_makes_all_tokens(work, again):
  """None ends early, all are in the loss; donated buffers are replaced."""
  config = ours.model_config(MINIATURE)
  run = ours.WORKS[work](config, SMALL[work])
  for number in range(again):
    assert run(number) == SMALL[work].tokens


def test_the_weights_are_those_of_the_peers():
  model = ours.random_model(ours.model_config(MINIATURE))
  assert (model.final_norm[...] == 1).all()
  table = np.asarray(model.embedding[...])
  assert table.std() == pytest.approx(shapes.INIT_STD, rel=0.05)


def test_the_shapes_are_counted_and_named():
  assert shapes.shape_of("sft").tokens == 8 * 512
  assert shapes.shape_of("sft", rows=2).tokens == 2 * 512
  assert shapes.shape_of("generate").tokens == 32 * 128
  assert shapes.shape_of("grpo").tokens == 8 * 8 * 128
  assert str(shapes.shape_of("sft")) == "8 x 512"
  assert str(shapes.shape_of("grpo")) == "8 of 64 x 8, 128 new"


def test_text_is_tokens_and_back():
  ids = shapes.tokens(1, 9, 4096)[0]
  assert shapes.ids(shapes.text(ids)) == ids
  assert shapes.rule_reward([2, 4, 5, 7]) == 0.5


def test_a_product_is_as_fast_as_its_time_says(monkeypatch):
  """Given times: a second for each call, whatever the copies."""
  monkeypatch.setattr(machine, "seconds_of", lambda run, repeats: 1.0)
  one, many = Product(1, 4, 8, 16), Product(3, 4, 8, 16)
  found = machine.Products([one, many], "float32")
  assert found.rates(repeats=1) == {
      p: machine.copies(p) * p.flops for p in (one, many)}
  for product, run in found._runs.items():
    results = run()
    assert len(results) == machine.copies(product)
    assert results[0].shape == (3, 4, 16)[product.batch == 1:]


def test_runs_are_warmed_up_and_the_median_counts():
  calls = []
  machine.seconds_of(lambda: calls.append(1), repeats=4)
  assert len(calls) == 5
