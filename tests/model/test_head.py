"""Oracles: float64, and the product at the highest precision."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.model import head, token_logprobs
from tests import meshes
from tests.model import build

NORMAL = st.floats(2.0**-90, 2.0**90, width=32)


@hypothesis.settings(deadline=None)  # One of them waits for a compilation.
@hypothesis.given(st.lists(NORMAL, min_size=16, max_size=16), st.booleans())
def test_the_parts_are_the_table(values, negative):
  table = np.array(values, np.float32) * (-1 if negative else 1)
  parts = jax.jit(head.parts_of)(table)  # Compiled: XLA must not undo it.
  assert {part.dtype for part in parts} == {jnp.dtype("bfloat16")}
  total = sum(np.asarray(part, np.float64) for part in parts)
  np.testing.assert_array_equal(total, table.astype(np.float64))


def draw(*shape, seed, dtype):
  values = np.random.default_rng(seed).standard_normal(shape, np.float32)
  return jnp.asarray(values, dtype)


def test_the_product_is_of_float32():
  """It is as near to float64 as `product`; two parts are a hundred times off.
  """
  x = draw(3, 8, 256, seed=0, dtype="bfloat16")
  table = draw(256, 384, seed=1, dtype="float32")
  exact = np.asarray(x, np.float64) @ np.asarray(table, np.float64)
  error = lambda y: np.abs(np.asarray(y, np.float64) - exact).max()
  parts = head.parts_of(table)
  assert error(head.product_of_parts(x, table, parts)) < 4e-5
  assert error(head.product(x, table)) < 4e-5
  assert error(head.product_of_parts(x, table, parts[:2])) > 1e-4


def test_a_table_in_bfloat16_is_its_only_part():
  table = draw(8, 16, seed=1, dtype="bfloat16")
  (part,) = head.parts_of(table)
  np.testing.assert_array_equal(part, table)


def test_gradients_are_those_of_the_product():
  x = draw(2, 8, 64, seed=0, dtype="bfloat16")
  table = draw(64, 128, seed=1, dtype="float32")
  weights = draw(2, 8, 128, seed=2, dtype="float32")
  plain = jax.grad(
      lambda x, table: jnp.sum(weights * head.product(x, table)), (0, 1))
  ours = jax.grad(
      lambda x, table: jnp.sum(weights * head.product_of_parts(
          x, table, head.parts_of(table))), (0, 1))
  with jax.set_mesh(meshes.one()):
    found = ours(x, table)
  for a, b in zip(plain(x, table), found, strict=True):
    assert a.dtype == b.dtype
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) < 2.0**-7 * np.linalg.norm(a)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mesh", [meshes.one, meshes.eight])
def test_a_model_in_bfloat16_trains_with_the_samplers_logprobs(tied, mesh):
  """Hidden states that are equal have equal logprobs, on any mesh."""
  config = build.make_config(dtype="bfloat16", tied_embeddings=tied)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.vocab_size, (4, 16))
  order = np.broadcast_to(np.arange(16), tokens.shape)
  with jax.set_mesh(mesh()):
    model = build.load(config, build.random_params(config))
    rows = build.put_rows(tokens, order, np.ones_like(tokens))
    batch = dict(zip(("tokens", "positions", "segment_ids"), rows, strict=True))

    @jax.jit
    def both(model):
      hidden, _ = model.routed(*rows)
      return token_logprobs.token_logprobs(model, batch, chunk=8)[0], (
          token_logprobs.of_hidden(model.logits, hidden, rows[0], chunk=8)[0])

    ours, plain = both(model)
    grads = jax.jit(jax.grad(lambda model: jnp.sum(
        token_logprobs.token_logprobs(model, batch, chunk=8)[0])))(model)
  np.testing.assert_allclose(ours, plain, rtol=0, atol=2e-6)
  for found, weight in zip(
      jax.tree.leaves(grads), jax.tree.leaves(model), strict=True):
    assert jax.typeof(found).sharding.spec == jax.typeof(weight).sharding.spec
