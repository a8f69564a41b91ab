"""Oracles: the definition as a loop over tokens; limits of the load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.objectives import load_balancing

L, N, E, K = 3, 50, 8, 2


def routers(seed=0):
  """Probabilities [L, N, E] of tokens, and their k most probable experts."""
  logits = 2 * np.random.default_rng(seed).normal(size=(L, N, E))
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  return probs, np.argsort(-probs, axis=-1)[..., :K]


def sums_of(probs, choice):
  load = (choice[..., None] == np.arange(E)).sum((1, 2))
  return {
      "router_load": jnp.float32(load),
      "router_mass": jnp.float32(probs.sum(1)),
      "router_entropy": jnp.float32(-(probs * np.log(probs)).sum((1, 2))),
      "router_tokens": jnp.full(L, probs.shape[1], jnp.float32)}


def by_hand(probs, choice):
  """E * sum_e f_e P_e over the tokens of all layers, one after the other."""
  chosen, mean = np.zeros(E), np.zeros(E)
  for layer in range(L):
    for token in range(N):
      for expert in choice[layer, token]:
        chosen[expert] += 1 / (L * N)
      mean += probs[layer, token] / (L * N)
  return E * (chosen * mean).sum()


def loss_of(sums):
  return load_balancing.balance_loss(
      sums["router_load"], sums["router_mass"], sums["router_tokens"])


def test_the_loss_is_its_definition():
  probs, choice = routers()
  assert float(loss_of(sums_of(probs, choice))) == pytest.approx(
      by_hand(probs, choice), rel=1e-5)
  assert by_hand(probs, choice) > K  # Chosen is probable.


def test_parts_add_up_to_the_loss_of_the_whole():
  """Given the counts of the whole; the mean of their own losses is another."""
  probs, choice = routers()
  whole = sums_of(probs, choice)
  cuts = ((0, 10), (10, 12), (12, N))
  parts = [sums_of(probs[:, a:b], choice[:, a:b]) for a, b in cuts]
  total = sum(loss_of(
      whole | {"router_mass": part["router_mass"]}) for part in parts)
  np.testing.assert_allclose(total, loss_of(whole), rtol=1e-6)
  own = np.mean([loss_of(part) for part in parts])
  assert abs(own - loss_of(whole)) > 0.01


def test_the_counts_have_no_gradient():
  sums = sums_of(*routers())
  load, mass = jax.grad(
      lambda load, mass: load_balancing.balance_loss(
          load, mass, sums["router_tokens"]), argnums=(0, 1))(
              sums["router_load"], sums["router_mass"])
  np.testing.assert_array_equal(load, 0)
  share = sums["router_load"].sum(0) / (L * N)
  np.testing.assert_allclose(
      mass, np.tile(E * share / (L * N), (L, 1)), rtol=1e-5)


def test_an_even_load_has_the_least_of_each_figure():
  probs = np.full((L, E, E), 1 / E)
  choice = np.tile((np.arange(E)[:, None] + np.arange(K)) % E, (L, 1, 1))
  found = load_balancing.with_metrics(sums_of(probs, choice) | {"other": 3})
  assert found == pytest.approx({
      "other": 3, "router/aux_loss": K, "router/load_max": 1.0,
      "router/entropy": np.log(E)}, rel=1e-5)


def test_all_tokens_at_the_same_experts_is_the_other_end():
  probs = np.full((L, N, E), 1e-9)
  probs[..., :K] = 1 / K
  choice = np.tile(np.arange(K), (L, N, 1))
  found = load_balancing.with_metrics(sums_of(probs, choice))
  assert found == pytest.approx({
      "router/aux_loss": E, "router/load_max": E / K,
      "router/entropy": np.log(K)}, rel=1e-5)


def test_one_layer_that_is_uneven_shows():
  probs, choice = routers()
  choice[1] = np.arange(K)
  found = load_balancing.with_metrics(sums_of(probs, choice))
  assert float(found["router/load_max"]) == pytest.approx(E / K)


def test_no_token_and_no_router():
  nothing = {name: 0 * x for name, x in sums_of(*routers()).items()}
  assert all(
      value == 0 for value in load_balancing.with_metrics(nothing).values())
  assert load_balancing.with_metrics({"tokens": 3}) == {"tokens": 3}
