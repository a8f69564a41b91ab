"""Oracles: NumPy loops from the papers, worked values, limits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.objectives import columns as columns_lib
from posttrain.objectives import kl, policy, supervised
from tests.objectives import oracles


def batch(seed=0, rows=4, length=6):
  rng = np.random.default_rng(seed)
  logprobs = rng.normal(-1, 0.5, (rows, length)).astype(np.float32)
  old = (logprobs + rng.normal(0, 0.3, (rows, length))).astype(np.float32)
  ref = (logprobs + rng.normal(0, 0.3, (rows, length))).astype(np.float32)
  advantages = rng.normal(size=rows).astype(np.float32)
  return logprobs, old, ref, advantages, rng.random((rows, length)) < 0.7


def run(logprobs, old, advantages, mask, *, ref=None, coef=0.0, low=0.2,
        high=0.2, **more):
  """The loss's numerator, denominator and sums, with a KL or without.

  Both terms have one denominator here, as in the papers.
  """
  ones = jnp.ones(mask.shape)
  columns = {
      "logprobs": logprobs, "old_logprobs": old, "loss_mask": mask,
      "advantages": jnp.broadcast_to(
          advantages if np.ndim(advantages) > 1
          else jnp.asarray(advantages)[:, None], mask.shape),
      "token_weights": ones, "denominator_shares": ones,
      "importance_weights": ones} | more
  terms, sums = columns_lib.call(
      policy.policy_loss, columns, dict(clip_low=low, clip_high=high))
  [term] = terms.values()
  if ref is None:
    return term.numerator, term.denominator, sums
  kl_terms, kl_sums = columns_lib.call(
      kl.kl_loss, columns | {"ref_logprobs": ref},
      dict(coefficient=coef, estimator="k3"))
  kl_term = kl_terms["kl"]
  assert kl_term.denominator == term.denominator
  return (term.numerator + kl_term.coefficient * kl_term.numerator,
          term.denominator, sums | kl_sums)


def aggregated(aggregation, mask, max_tokens):
  """The columns of a loss over all rows of the mask."""
  lengths = mask.sum(1)
  weights = policy.aggregation_weights(aggregation, lengths)
  denominator = policy.aggregation_denominator(
      aggregation, lengths, max_tokens=max_tokens)
  return dict(
      token_weights=jnp.broadcast_to(weights[:, None], mask.shape),
      denominator_shares=jnp.full(mask.shape, denominator / lengths.sum()))


def loop(logprobs, old, ref, advantages, mask, low, high, coef, aggregation,
         max_tokens):
  """DeepSeekMath eq. 3, with k3; the means as each paper takes them."""
  total, tokens, rows = 0.0, 0, 0
  for i in range(len(logprobs)):
    inside = []
    for t in range(logprobs.shape[1]):
      if not mask[i, t]:
        continue
      ratio = np.exp(np.float64(logprobs[i, t]) - old[i, t])
      bounded = min(max(ratio, 1 - low), 1 + high)
      d = np.float64(ref[i, t]) - logprobs[i, t]
      inside.append(-min(ratio * advantages[i], bounded * advantages[i])
                    + coef * (np.exp(d) - d - 1))
    tokens += len(inside)
    rows += 1
    total += sum(inside) / (
        len(inside) if aggregation == "sequence_mean" else 1)
  return total / {"token_mean": tokens, "sequence_mean": rows,
                  "constant": rows * max_tokens}[aggregation]


@pytest.mark.parametrize("aggregation", policy.AGGREGATIONS)
def test_loss_matches_a_loop_from_the_papers(aggregation):
  logprobs, old, ref, advantages, mask = batch()
  num, den, _ = run(
      logprobs, old, advantages, mask, high=0.28, ref=ref, coef=0.05,
      **aggregated(aggregation, mask, 10))
  want = loop(logprobs, old, ref, advantages, mask, 0.2, 0.28, 0.05,
              aggregation, 10)
  np.testing.assert_allclose(num / den, want, rtol=1e-5)


CLIPS = [
    (*map(float, re.match(r"r=(\S+) A=(\S+)", name).groups()), column, value)
    for name, row in oracles.named("clip ") for column, value in row.items()
    if column in ("ppo .2/.2", "dapo .2/.28")]


@pytest.mark.parametrize("ratio,advantage,column,value", CLIPS)
def test_clip_worked_values(ratio, advantage, column, value):
  high = 0.2 if column.startswith("ppo") else 0.28
  one = lambda x: jnp.full((1, 1), x, jnp.float32)

  def objective(logprobs):
    num, _, sums = run(
        logprobs, one(0), one(advantage), one(1) > 0, high=high)
    return -num, sums

  (got, sums), grad = jax.value_and_grad(objective, has_aux=True)(
      one(np.log(ratio)))
  np.testing.assert_allclose(got, value["obj"], rtol=1e-6)
  if ratio in (0.8, 1.2):
    return  # At the boundary the subgradient is a convention.
  clipped = value["grad"] == "0"
  np.testing.assert_allclose(
      grad[0, 0], 0 if clipped else advantage * ratio, rtol=1e-6)
  assert sums["clip_ratio/low"] == (clipped and ratio < 1)
  assert sums["clip_ratio/high"] == (clipped and ratio > 1)


@pytest.mark.parametrize("aggregation,loss,weight", [
    ("sequence_mean", "grpo_seq_mean", "grpo"),
    ("token_mean", "dapo_token", "dapo"), ("constant", "dr_grpo", "dr_grpo")])
def test_aggregation_worked_values(aggregation, loss, weight):
  lengths = np.array([2, 4])
  mask = np.arange(4) < lengths[:, None]
  columns = aggregated(aggregation, mask, 8)
  zeros = jnp.zeros(mask.shape)
  num, den, _ = run(zeros, zeros, jnp.array([1.0, -1.0]), mask, **columns)
  np.testing.assert_allclose(
      num / den,
      oracles.VALUES["loss agg lens [2,4] adv [+1,-1] ratio 1, Lmax=8"][loss],
      atol=1e-7)
  np.testing.assert_allclose(
      columns["token_weights"][:, 0] / den,
      oracles.VALUES["per-token weights same case"][weight], rtol=1e-6)


def test_on_policy_gradient_is_reinforce():
  """At ratio one nothing is clipped and the gradient is REINFORCE's."""
  logprobs, _, _, advantages, mask = batch()
  clipped = lambda x: run(
      x, jax.lax.stop_gradient(x), advantages, mask, high=0.28)[0]
  reinforce = lambda x: -jnp.sum(x * mask * advantages[:, None])
  np.testing.assert_allclose(
      jax.grad(clipped)(logprobs), jax.grad(reinforce)(logprobs), rtol=1e-6)
  sums = run(logprobs, logprobs, advantages, mask)[2]
  assert sums["ratio"] == mask.sum()  # Exactly one, each.


@pytest.mark.parametrize("aggregation", policy.AGGREGATIONS)
def test_microbatches_add_up(aggregation):
  logprobs, old, ref, advantages, mask = batch()
  columns = aggregated(aggregation, mask, 10)
  part = lambda rows: jax.tree.leaves(run(
      logprobs[rows], old[rows], advantages[rows], mask[rows], ref=ref[rows],
      coef=0.1, **{name: x[rows] for name, x in columns.items()}))
  whole = part(slice(0, 4))
  for one, two, both in zip(
      part(slice(0, 1)), part(slice(1, 4)), whole, strict=True):
    # The loss cancels to a tenth of its terms: rounding is relative to them.
    np.testing.assert_allclose(one + two, both, rtol=2e-6, atol=1e-6)


def test_advantages_are_per_token():
  """Each token's own, such as a turn's: a loop over tokens."""
  logprobs, old, _, _, mask = batch()
  advantages = np.random.default_rng(2).normal(size=mask.shape)
  wanted = 0.0
  for at in zip(*np.nonzero(mask), strict=True):
    ratio = np.exp(np.float64(logprobs[at]) - old[at])
    wanted -= min(ratio * advantages[at],
                  min(max(ratio, 0.8), 1.2) * advantages[at])
  found = run(logprobs, old, advantages.astype(np.float32), mask)[0]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_what_is_masked_has_no_influence():
  logprobs, old, ref, advantages, mask = batch()

  def loss(logprobs, fill):
    hide = lambda x: jnp.where(mask, x, fill)
    num, den, sums = run(
        hide(logprobs), hide(old), advantages, mask, ref=hide(ref), coef=0.1)
    return num / den, sums

  both = jax.value_and_grad(loss, has_aux=True)
  for fill in (-1e30, jnp.nan):
    got, want = both(logprobs, fill), both(logprobs, 0.0)
    jax.tree.map(np.testing.assert_array_equal, got, want)
  assert np.isfinite(got[1]).all()


def test_a_kl_without_a_weight_changes_no_gradient():
  logprobs, old, ref, advantages, mask = batch()
  grad = lambda **options: jax.grad(lambda x: run(
      x, old, advantages, mask, **options)[0])(logprobs)
  np.testing.assert_array_equal(grad(), grad(ref=ref))


def test_importance_weights_leave_the_kl_alone():
  """As TRL: the product comes before the KL is added."""
  logprobs, old, ref, advantages, mask = batch()
  rng = np.random.default_rng(1)
  factors = np.where(rng.random(mask.shape) < 0.5, 0, rng.random(mask.shape))
  grad = lambda **options: jax.grad(lambda x: run(
      x, old, advantages, mask, **options)[0])(logprobs)
  policy_term = grad()
  kl_term = grad(ref=ref, coef=0.3) - policy_term
  found = grad(ref=ref, coef=0.3, importance_weights=jnp.array(factors))
  np.testing.assert_allclose(
      found, factors * policy_term + kl_term, rtol=1e-5, atol=1e-6)
  left_out = mask & (factors == 0)
  assert left_out.any() and np.all(np.abs(found[left_out]) > 1e-4)


def test_a_kl_term_needs_a_reference():
  logprobs, _, _, _, mask = batch()
  with pytest.raises(ValueError, match="reads the column 'ref_logprobs'"):
    columns_lib.call(kl.kl_loss, {"logprobs": logprobs, "loss_mask": mask},
                     dict(coefficient=0.1, estimator="k3"))


def test_an_unknown_aggregation_is_an_error():
  with pytest.raises(ValueError, match=r"loss.aggregation is 'mean'"):
    policy.aggregation_weights("mean", np.ones(2, int))


def test_cross_entropy_is_a_masked_mean():
  logprobs, _, _, _, mask = batch()
  terms, sums = columns_lib.call(supervised.cross_entropy, {
      "logprobs": logprobs, "loss_mask": mask, "entropy": 2 * logprobs}, {})
  term = terms["cross_entropy"]
  np.testing.assert_allclose(
      term.numerator / term.denominator, -logprobs[mask].mean(), rtol=1e-6)
  assert term.denominator == mask.sum()
  np.testing.assert_allclose(sums["entropy"], -2 * term.numerator, rtol=1e-6)
