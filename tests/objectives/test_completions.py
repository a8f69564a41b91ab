"""Oracle: a NumPy loop over the completions of packed rows."""

import jax
import jax.numpy as jnp
import numpy as np

from posttrain import sharding
from posttrain.objectives import completions
from tests import meshes

# Neighbours, one alone, padding; ids in no order; one without a token.
IDS = np.array([
    [7, 7, 7, 2, 2, 2, 2, -1], [-1, -1, 4, 4, 9, 9, 9, 9],
    [0, 1, 1, 3, 3, 5, -1, -1], [6] * 8])
RNG = np.random.default_rng(0)
MASK = (RNG.random(IDS.shape) < 0.6) & (IDS >= 0)
MASK[1, 2:4] = False
X = np.where(MASK, 1e3 * RNG.normal(size=IDS.shape), np.nan).astype("f")
COLUMNS = {"completion_ids": jnp.array(IDS), "loss_mask": jnp.array(MASK)}


def looped(mean):
  result = np.zeros(IDS.shape)
  for n in set(IDS.ravel()) - {-1}:
    inside = X[(n == IDS) & MASK].astype(np.float64)
    total = inside.sum()
    result[n == IDS] = total / max(len(inside), 1) if mean else total
  return result


def test_sums_and_means_are_those_of_a_loop():
  for mean, function in (
      (False, completions.sum_over_completion),
      (True, completions.mean_over_completion)):
    found = np.asarray(function(X, COLUMNS))
    np.testing.assert_allclose(found, looped(mean), rtol=1e-6, atol=1e-4)
    for n in set(IDS.ravel()):  # To the bit: a ratio is one per completion.
      assert len(set(found[n == IDS])) == 1


def test_the_gradient_of_a_mean_is_spread_over_its_tokens():
  weights = RNG.normal(size=IDS.shape)
  loss = lambda x: jnp.sum(
      weights * completions.mean_over_completion(x, COLUMNS))
  wanted = np.zeros(IDS.shape)
  for n in set(IDS.ravel()) - {-1}:
    at = (n == IDS) & MASK
    wanted[at] = weights[n == IDS].sum() / max(at.sum(), 1)
  np.testing.assert_allclose(
      jax.grad(loss)(jnp.nan_to_num(X)), wanted, rtol=1e-5, atol=1e-6)


def test_rows_may_be_spread_over_devices():
  with jax.set_mesh(meshes.mesh(4, 2)):
    put = lambda x: sharding.put(np.asarray(x), "batch", None)
    found = jax.jit(completions.mean_over_completion)(
        put(X), {name: put(x) for name, x in COLUMNS.items()})
    assert str(jax.typeof(found)) == "float32[4@fsdp,8]"
    np.testing.assert_array_equal(
        sharding.fetch(found), completions.mean_over_completion(X, COLUMNS))
