"""The lengths are what the benchmark says; both sides draw all of them."""

import jax
import pytest

from benchmarks import batching, ours
from tests import meshes
from tests.benchmarks.test_works import MINIATURE


@pytest.mark.parametrize("count, mean, tail", [(256, 48, 5), (512, 64, 8)])
def test_lengths_have_their_mean_and_their_tail(count, mean, tail):
  lengths = batching.lognormal_lengths(count, mean, tail)
  assert len(lengths) == count and lengths.min() >= 1
  assert lengths.mean() == pytest.approx(mean, rel=0.02)
  assert tail <= lengths.max() / lengths.mean() < 1.3 * tail


def test_a_tail_that_so_few_lengths_do_not_have_is_an_error():
  with pytest.raises(ValueError, match="3 lengths do not reach"):
    batching.lognormal_lengths(3, 10, 4)


def test_continuous_batching_takes_fewer_steps_for_the_same_tokens():
  with jax.set_mesh(meshes.one()):
    model = ours.random_model(ours.model_config(MINIATURE))
    line = batching.measure(model, batching.parse([
        "--requests=12", "--rows=3", "--prompt=4", "--mean=8", "--tail=2.5",
        "--repeats=1"]))
  assert line["continuous_steps"] < line["static_steps"]
  assert line["tokens"] == batching.lognormal_lengths(12, 8, 2.5).sum()
  assert line["occupancy"] > line["tokens"] / (3 * line["static_steps"])
