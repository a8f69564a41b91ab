"""Oracles: the worked values, and exact expectations over three tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.objectives import kl
from tests.objectives import oracles

POLICY = np.array([0.5, 0.3, 0.2])
REFERENCE = np.array([0.2, 0.5, 0.3])
VALUE = oracles.VALUES["KL grad check q=[.5,.3,.2] ref=[.2,.5,.3]"]


# The names round ln .5 and ln .25 to four decimals; the values do not.
EXACT = {-0.6931: np.log(0.5), -1.3863: np.log(0.25)}


@pytest.mark.parametrize("name,value", oracles.named("kl logp="))
def test_worked_values(name, value):
  logprobs, ref_logprobs = (
      EXACT.get(float(x), float(x)) for x in name.split(" logref="))
  for estimator in ("k1", "k2", "k3"):
    np.testing.assert_allclose(
        kl.ESTIMATORS[estimator](jnp.float32(logprobs), jnp.float32(
            ref_logprobs)), value[estimator], atol=2e-7)


def as_loss(estimator, logits):
  """Mean over tokens of the policy; the sampling is not differentiated."""
  return jnp.sum(POLICY * kl.ESTIMATORS[estimator](
      jax.nn.log_softmax(logits), jnp.log(REFERENCE)))


def as_reward(estimator, logits):
  """The policy gradient's surrogate, with the estimate as a cost."""
  logprobs = jax.nn.log_softmax(logits)
  cost = kl.ESTIMATORS[estimator](logprobs, jnp.log(REFERENCE))
  return jnp.sum(POLICY * jax.lax.stop_gradient(cost) * logprobs)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expectations_and_gradients(estimator):
  logits = jnp.log(POLICY)
  np.testing.assert_allclose(
      as_loss(estimator, logits), VALUE[f"E_{estimator}"], atol=1e-6)
  np.testing.assert_allclose(
      jax.grad(as_loss, 1)(estimator, logits),
      VALUE[f"{estimator}_as_loss"], atol=1e-6)
  if f"{estimator}_in_reward" in VALUE:
    np.testing.assert_allclose(
        jax.grad(as_reward, 1)(estimator, logits),
        VALUE[f"{estimator}_in_reward"], atol=1e-6)


def test_k2_as_a_loss_has_the_true_gradient_and_k3_the_forward_one():
  softmax, reference = jax.nn.softmax, REFERENCE
  reverse = lambda x: jnp.sum(softmax(x) * jnp.log(softmax(x) / reference))
  forward = lambda x: jnp.sum(reference * jnp.log(reference / softmax(x)))
  logits = jnp.log(POLICY)
  for estimator, truth in (("k2", reverse), ("k3", forward)):
    np.testing.assert_allclose(
        jax.grad(as_loss, 1)(estimator, logits), jax.grad(truth)(logits),
        atol=1e-6)


def test_k3_stays_finite_far_from_the_reference():
  value, grad = jax.value_and_grad(kl.k3)(jnp.float32(-500), jnp.float32(0))
  assert np.isfinite(value) and np.isfinite(grad)
