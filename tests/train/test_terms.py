"""Terms with denominators of their own: oracle, each term over the whole batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.objectives.columns import Term, needs
from posttrain.objectives.masked import masked_sum
from posttrain.train import health, step
from tests import meshes
from tests.model import build
from tests.train import test_step

CONFIG = test_step.CONFIG
COEFFICIENT = 0.7


@needs("entropy")
def two_terms(columns):
  """Means over the tokens of the loss, and over the even ones, squared.

  A sum whose name ends in "max" is a maximum; a term is never one.
  """
  logprobs, mask = columns["logprobs"], columns["loss_mask"]
  even = mask & (columns["tokens"] % 2 == 0)
  ones = jnp.ones_like(logprobs)
  return {
      "plain": Term(
          masked_sum(-logprobs, mask), masked_sum(ones, mask)),
      "even_max": Term(masked_sum(logprobs**2, even), masked_sum(ones, even),
                   COEFFICIENT)}, {}


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def oracle(model, rows):
  """All logits at once, two means and their sum."""
  tokens, mask = rows["tokens"][0], rows["loss_mask"][0]
  logits = model.logits(model(
      tokens, rows["positions"][0], rows["segment_ids"][0]))
  hot = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1])
  logprobs = jnp.sum(jax.nn.log_softmax(logits)[:, :-1] * hot, -1)
  every, even = mask[:, 1:], mask[:, 1:] & (tokens[:, 1:] % 2 == 0)
  first = -jnp.sum(logprobs * every) / every.sum()
  second = jnp.sum(logprobs**2 * even) / even.sum()
  return first + COEFFICIENT * second, (first, second)


@jax.jit
def gradient(model, batch, count):
  grads, terms, _ = step.accumulate(functools.partial(
      step.evaluate, two_terms, chunk=4), model, batch, count)
  denominator = terms[min(terms)].denominator
  return jax.tree.map(
      lambda g: g / denominator, grads), step.metrics_of_terms(terms)


def model_and(microbatches):
  model = build.load(CONFIG, build.random_params(CONFIG))
  return model, test_step.put_batch(test_step.make_rows(), microbatches)


@pytest.mark.parametrize("mesh, microbatches", [
    (meshes.one, 1), (meshes.one, 4), (meshes.eight, 2),
    (meshes.with_context, 2)])
def test_each_term_is_over_its_own_denominator(mesh, microbatches):
  with jax.set_mesh(meshes.one()):
    (loss, parts), wanted = jax.device_get(oracle(*model_and(1)))
  with jax.set_mesh(mesh()):
    grads, metrics = sharding.fetch(gradient(
        *model_and(microbatches), np.int32(microbatches)))
  build.assert_same_leaves(grads, wanted)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(
      [metrics["loss/plain"], metrics["loss/even_max"]], parts, rtol=1e-5)


def flops(objective):
  """Of the compiled gradient of two microbatches, a loop's body once."""
  compiled = jax.jit(functools.partial(
      step.accumulate, functools.partial(
          step.evaluate, objective, chunk=4))).lower(
              *model_and(2), np.int32(2)).compile()
  return compiled.cost_analysis()["flops"]


def one_term(columns):
  terms, _ = two_terms(columns)
  return {"even_max": terms["even_max"]}, {}


def of_logprobs(columns):
  """A denominator that only a pass of the model tells."""
  terms, _ = two_terms(columns)
  even = terms["even_max"]
  return terms | {"even_max": Term(
      even.numerator, -jnp.sum(columns["logprobs"]), COEFFICIENT)}, {}


def test_denominators_are_found_without_the_model():
  """The pass before has no forward in it, unless a denominator needs one."""
  with jax.set_mesh(meshes.one()):
    one = flops(one_term)
    assert flops(two_terms) < 1.02 * one
    assert flops(of_logprobs) > 1.15 * one


def no_even(columns):
  terms, _ = two_terms(columns)
  even = terms["even_max"]
  return terms | {"even_max": Term(
      even.numerator, 0 * even.denominator, COEFFICIENT)}, {}


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_denominator_of_zero_is_told_with_its_term(tmp_path, microbatches):
  """The loss and the gradient are NaN, so that no update is made."""
  with jax.set_mesh(meshes.one()):
    grads, terms, _ = jax.jit(functools.partial(
        step.accumulate, functools.partial(step.evaluate, no_even, chunk=4)))(
            *model_and(microbatches), np.int32(microbatches))
    metrics = step.metrics_of_terms(terms)
  assert np.isnan(metrics["loss"])
  assert np.isnan(np.asarray(grads.final_norm[...])).all()
  with pytest.raises(health.HealthError, match=(
      r"term 'even_max' has a denominator of 0\.0, and a positive one is "
      "needed")):
    health.StepHealth(tmp_path).update(
        1, {name: float(x) for name, x in metrics.items()}, {})
