"""Identity: to plain dicts and back."""

import functools

import jax
import numpy as np
import pytest

from posttrain import sharding
from posttrain.model import transformer
from posttrain.train import optimizer, state
from tests import meshes
from tests.model import build

CONFIG = build.make_config(**build.OPTIONS["everything"])


@functools.lru_cache
def make_state(mesh):
  with jax.set_mesh(mesh):
    return state.create(
        build.load(CONFIG, build.random_params(CONFIG)),
        optimizer.make_optimizer(
            beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            max_grad_norm=1.0))


def plain(tree):
  """Only dicts and arrays, with names that no library invented."""
  if isinstance(tree, dict):
    assert all(isinstance(key, str) for key in tree)
    return all(plain(value) for value in tree.values())
  return isinstance(tree, jax.Array)


def test_the_dict_form_is_plain_and_whole():
  made = make_state(meshes.eight())
  with jax.set_mesh(meshes.eight()):
    nested = state.to_checkpoint(made)
    assert plain(nested)
    assert len(jax.tree.leaves(nested)) == len(jax.tree.leaves(made))
    assert sorted(nested) == ["model", "opt_state", "step"]
    # As `transformer.to_dict`, so that weights load without the optimizer.
    jax.tree.map(np.testing.assert_array_equal, nested["model"],
                 transformer.to_dict(made.model))
    back = state.from_checkpoint(jax.eval_shape(lambda: made), nested)
    assert jax.tree.structure(back) == jax.tree.structure(made)
    jax.tree.map(
        np.testing.assert_array_equal, sharding.fetch(back),
        sharding.fetch(made))


def test_moments_have_the_layout_of_their_parameters():
  made = make_state(meshes.eight())
  with jax.set_mesh(meshes.eight()):
    shapes = [str(jax.typeof(w)) for w in jax.tree.leaves(made.model)]
    moments = [str(jax.typeof(w)) for w in jax.tree.leaves(made.opt_state)
               if w.ndim]
  assert moments == shapes * 2
  assert int(made.step) == 0


def test_a_skipped_step_moves_the_counter_only():
  made = make_state(meshes.eight())
  with jax.set_mesh(meshes.eight()):
    after = state.skip(made)
  assert int(after.step) == 1
  assert after.trained is made.trained
  assert after.opt_state is made.opt_state


def test_a_missing_leaf_is_an_error():
  made = make_state(meshes.eight())
  with jax.set_mesh(meshes.eight()):
    nested = state.to_checkpoint(made)
    del nested["model"]["blocks"]["q_norm"]
    with pytest.raises(KeyError, match="q_norm"):
      state.from_checkpoint(made, nested)
