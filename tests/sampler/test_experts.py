"""Oracle: NumPy chooses the experts of a whole row, token by token."""

import jax
import numpy as np
import pytest

from posttrain.sampler import budget_state, rollouts
from tests.model import numpy_transformer
from tests.sampler import test_sampler


@pytest.mark.parametrize("option,shape,strings", [
    ("experts", (1, 1), test_sampler.REPLACED),
    ("experts", (1, 1), test_sampler.KEPT),
    pytest.param("experts_grouped", (4, 2), test_sampler.REPLACED,
                 marks=pytest.mark.slow)],
    ids=["replaced", "fed-again", "mesh"])
def test_the_record_has_the_experts_of_every_token_that_was_fed(
    option, shape, strings):
  """Tokens that were taken back leave no trace, and the last is not fed."""
  mesh, model, config, params = test_sampler.scene(option, shape)
  limits = test_sampler.random_limits(4)
  with jax.set_mesh(mesh):
    found = test_sampler.generate(
        model, strings, limits, test_sampler.make_prompts(4))
  assert (found.raw >= 0).sum() > found.loss_mask.sum()  # Some were.
  assert found.experts.shape == (
      *found.tokens.shape, config.layers, config.experts_per_token)
  assert found.experts.dtype == np.uint8
  for row, prompt in enumerate(found.prompts):
    routes = []
    numpy_transformer.logits(
        params, config, prompt + found.completion(row), routes=routes)
    want = 1 + np.sort(np.stack(routes, 1)[len(prompt):-1])  # [T - 1, L, k]
    fed = found.lengths[row] - 1
    np.testing.assert_array_equal(np.sort(found.experts[row, :fed]), want)
    np.testing.assert_array_equal(found.experts[row, fed:], 0)


def test_the_record_follows_what_is_kept():
  """Two chunks; the second takes back the last token of the first."""
  def chunk(tokens, dropped):
    tokens = np.array(tokens)
    return {
        "token": tokens, "raw": tokens, "dropped": np.array(dropped),
        "provenance": np.full(tokens.shape, budget_state.SAMPLED),
        "logprob": np.zeros(tokens.shape, np.float32),
        "experts": (10 * tokens[:, None, None]).astype(np.uint8)}

  row = rollouts.Row()
  row.add(chunk([1, 2, 3], [0, 0, 0]))
  row.add(chunk([4, 5], [1, 0]))
  assert row.tokens == [1, 2, 4, 5]
  assert np.ravel(row.columns["experts"]).tolist() == [10, 20, 40, 50]


def test_without_experts_there_is_no_record():
  mesh, model, _, _ = test_sampler.scene("tied", (1, 1))
  with jax.set_mesh(mesh):
    found = test_sampler.generate(
        model, test_sampler.UNUSED, test_sampler.Limits(max_tokens=3))
  assert found.experts is None
