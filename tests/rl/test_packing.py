"""Oracle: each completion alone in its row, and the loss written as a loop.

What is packed, cut into microbatches and spread over a mesh has to give the
gradient of that loop.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.objectives import policy as policy_lib
from posttrain.rl import experience as experience_lib
from posttrain.rl import objective, packing
from posttrain.sampler.rollouts import Rollouts
from posttrain.train import step
from tests import meshes, one_by_one
from tests.model import build

CONFIG = build.make_config()
LENGTH, MAX_TOKENS, TEMPERATURE = 24, 12, 0.8
MINIBATCHES = (np.array([0, 1, 3, 4, 6, 7, 8]), np.array([5]))  # Without 2.
OPTIONS = dict(temperature=TEMPERATURE, chunk=7)
OBJECTIVE = objective.PolicyObjective(
    policy_lib.policy_loss, dict(clip_low=0.1, clip_high=0.3), kl_coef=0.2,
    kl_estimator="k3")


def make_rollouts(rng) -> Rollouts:
  lengths = np.array([5, 12, 3, 1, 9, 7, 12, 2, 6], np.int32)
  shape = rows, width = len(lengths), lengths.max()
  inside = np.arange(width) < lengths[:, None]
  provenance = np.where(inside, rng.choice([1, 1, 2, 3], shape), 0)
  provenance[7] *= 0
  provenance[7, :2] = 2  # All forced: no token of it is in the loss.
  zeros = np.zeros(rows, np.int32)
  prompts = [rng.integers(CONFIG.vocab_size, size=n).tolist()
             for n in rng.integers(1, 9, rows)]
  prompts[1], prompts[3] = prompts[0], prompts[0]
  prompts[7] = prompts[6]
  return Rollouts(
      prompts=prompts,
      tokens=np.where(inside, rng.integers(CONFIG.vocab_size, size=shape), 0),
      logprobs=np.where(provenance == 1, rng.normal(size=shape), 0),
      provenance=provenance.astype(np.int8), lengths=lengths,
      finish_reason=zeros, think_end=zeros, think_lengths=zeros,
      think_steps=zeros,
      answer_lengths=zeros, wait_count=zeros, prompt_id=zeros,
      sample_id=zeros, in_thinking=zeros, raw=np.zeros((rows, 0)),
      num_turns=zeros + 1, stop_reason=zeros)


RNG = np.random.default_rng(3)
ROLLOUTS = make_rollouts(RNG)
GROUPS = np.array([4, 4, 1, 4, 0, 2, 3, 3, 5])
ADVANTAGES = RNG.normal(size=len(ROLLOUTS.lengths)).astype(np.float32)


@functools.cache
def params():
  """Of the policy, the old one and the reference.

  These are some way off: some ratios are clipped and some are not.
  """
  with jax.set_mesh(meshes.one()):
    now, *others = (build.random_params(CONFIG, seed) for seed in range(3))
  mix = lambda w, noise: w + np.float32(0.05) * noise
  return now, *(jax.tree.map(mix, now, other) for other in others)


def models():
  """The same on the current mesh."""
  return [build.load(CONFIG, p) for p in params()]


# The loop.


def alone(row: int) -> np.ndarray:
  """[1, T], one completion behind its prompt."""
  return one_by_one.row_of(
      ROLLOUTS.prompts[row] + ROLLOUTS.completion(row), LENGTH)


@jax.jit
def row_gradient(model, old, reference, tokens, advantage, weights):
  """Of one completion; `weights` [T] are its tokens' shares of the loss."""
  old, reference = (
      one_by_one.logprobs(m, tokens, TEMPERATURE) for m in (old, reference))

  def loss(model):
    now = one_by_one.logprobs(model, tokens, TEMPERATURE)
    ratio = jnp.exp(now - old)
    clipped = jnp.minimum(jnp.maximum(ratio, 0.9), 1.3)
    objective = jnp.minimum(ratio * advantage, clipped * advantage)
    kl = jnp.exp(reference - now) - (reference - now) - 1
    return jnp.sum(weights * (0.2 * kl - objective)), (now, old, reference)

  return jax.value_and_grad(loss, has_aux=True)(model)


def token_weights(rows, aggregation: str) -> dict[int, np.ndarray]:
  """What each token counts, straight from the definitions."""
  sampled = {row: np.flatnonzero(ROLLOUTS.loss_mask[row]) for row in rows}
  total = sum(len(tokens) for tokens in sampled.values())
  answers = len(sampled)  # One has no token in the loss, and still counts.
  weights = {}
  for row, tokens in sampled.items():
    weights[row] = np.zeros(LENGTH, np.float32)
    weights[row][len(ROLLOUTS.prompts[row]) + tokens] = {
        "token_mean": 1 / total,
        "sequence_mean": 1 / (answers * max(len(tokens), 1)),
        "constant": 1 / (answers * MAX_TOKENS)}[aggregation]
  return weights


@functools.cache
def looped(index: int, aggregation: str):
  """Loss and gradient of a minibatch, one completion at a time."""
  with jax.set_mesh(meshes.one()):
    policies = models()
    loss, total = 0.0, None
    for row, weights in token_weights(
        MINIBATCHES[index], aggregation).items():
      (value, _), grad = row_gradient(
          *policies, alone(row), ADVANTAGES[row], weights)
      loss += float(value)
      grad = jax.tree.map(np.float64, jax.device_get(grad))
      total = grad if total is None else jax.tree.map(np.add, total, grad)
  return loss, total


# What is tested.


def pack(
    rows: int, aggregation: str, share_prompts: bool = False) -> packing.Arrays:
  lengths = ROLLOUTS.loss_mask.sum(1)
  every = lambda packed, x: packing.per_token(
      packed, ROLLOUTS, np.broadcast_to(x[:, None], ROLLOUTS.tokens.shape))
  packed = packing.pack_experience(
      ROLLOUTS, GROUPS, MINIBATCHES, packing.Shapes(
          length=LENGTH, rows=rows, num_minibatches=2, completions=7,
          share_prompts=share_prompts))
  return packed | {
      "advantages": every(packed, ADVANTAGES),
      "token_weights": every(packed, policy_lib.aggregation_weights(
          aggregation, lengths)),
      "denominator_shares": packing.denominator_shares(packed, [
          policy_lib.aggregation_denominator(
              aggregation, lengths[rows_of], max_tokens=MAX_TOKENS)
          for rows_of in MINIBATCHES])}


def with_logprobs(experience, old, reference):
  add = functools.partial(experience_lib.add_logprobs, **OPTIONS)
  return add("ref_logprobs", reference, add("old_logprobs", old, experience))


@jax.jit
def accumulate(model, arrays, used):
  """The gradient of the loss, its terms, and sums."""
  grads, terms, sums = step.accumulate(functools.partial(
      step.evaluate, OBJECTIVE, **OPTIONS), model, arrays, used)
  denominator = terms[min(terms)].denominator
  return jax.tree.map(
      lambda g: g / denominator, grads), step.metrics_of_terms(terms) | sums


@pytest.mark.parametrize("layout, rows, share_prompts", [
    ((1, 1), 2, False), ((4, 2), 8, False), ((1, 1), 2, True),
    pytest.param((1, 1), 8, False, marks=pytest.mark.slow)])
def test_packed_and_cut_is_the_loop(layout, rows, share_prompts):
  with jax.set_mesh(meshes.mesh(*layout)):
    model, old, reference = models()
    for aggregation in policy_lib.AGGREGATIONS:
      experience = with_logprobs(
          pack(rows, aggregation, share_prompts), old, reference)
      for index in (0, 1):
        arrays, used = packing.minibatch(experience, index)
        grads, sums = accumulate(model, arrays, np.int32(used))
        sums, grads = sharding.fetch((sums, grads))
        loss, wanted = looped(index, aggregation)
        assert sums["loss"] == pytest.approx(loss, rel=1e-5)
        # The ratio's exp magnifies what rounding leaves of two logprobs.
        build.assert_same_leaves(grads, wanted, tolerance=2e-5)
      assert sums["clip_ratio/high"] + sums["clip_ratio/low"] > 0


def test_nothing_but_sampled_tokens_has_an_influence():
  """Forced tokens and prompts may have had any logprob, even none."""
  with jax.set_mesh(meshes.one()):
    model, old, reference = models()
    experience = with_logprobs(pack(2, "token_mean"), old, reference)
    poisoned = dict(experience)
    for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs",
                 "advantages"):
      poisoned[name] = np.where(experience["loss_mask"], experience[name],
                                np.nan)
    results = []
    for columns in (experience, poisoned):
      arrays, used = packing.minibatch(columns, 0)
      results.append(jax.device_get(
          accumulate(model, arrays, np.int32(used))))
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_array_equal(a, b)
  _, sums = results[0]
  assert sums["tokens"] == ROLLOUTS.loss_mask[MINIBATCHES[0]].sum()
  means = objective.metrics_of_sums(
      {name: float(x) for name, x in sums.items()}, fresh=True)
  assert means["sampling/logp_difference/max"] == sums["difference_max"]
  assert means["entropy"] == pytest.approx(sums["entropy"] / sums["tokens"])


def test_every_completion_is_packed_once_and_whole():
  experience = pack(2, "token_mean")
  assert experience["num_microbatches"].tolist() == [2, 1]
  for index, rows in enumerate(MINIBATCHES):
    flat = {name: x[index].reshape(-1, LENGTH)
            for name, x in experience.items() if x.ndim > 1}
    found = []
    for r in range(len(flat["tokens"])):
      for segment in range(1, flat["segment_ids"][r].max() + 1):
        at = flat["segment_ids"][r] == segment
        row = int(flat["completion_ids"][r, at][0])
        found.append(row)
        prompt = len(ROLLOUTS.prompts[row])
        assert flat["tokens"][r, at].tolist() == (
            ROLLOUTS.prompts[row] + ROLLOUTS.completion(row))
        assert flat["positions"][r, at].tolist() == list(range(at.sum()))
        assert (flat["completion_ids"][r, at] == row).all()
        assert (flat["group_ids"][r, at] == GROUPS[row]).all()
        length = ROLLOUTS.lengths[row]
        np.testing.assert_array_equal(
            flat["loss_mask"][r, at],
            [False] * prompt + ROLLOUTS.loss_mask[row, :length].tolist())
        np.testing.assert_array_equal(
            flat["sampler_logprobs"][r, at][prompt:],
            ROLLOUTS.logprobs[row, :length].astype(np.float32))
        assert (flat["advantages"][r, at][prompt:] == ADVANTAGES[row]).all()
    assert sorted(found) == sorted(rows)
    for name in ("completion_ids", "group_ids"):
      assert (flat[name][flat["segment_ids"] == 0] == -1).all()


@pytest.mark.parametrize("share_prompts", [False, True])
def test_values_per_token_lie_with_their_tokens(share_prompts):
  experience = pack(2, "token_mean", share_prompts)
  values = RNG.normal(size=ROLLOUTS.tokens.shape)
  found = packing.per_token(experience, ROLLOUTS, values)
  left = np.count_nonzero(found)
  for row in np.concatenate(MINIBATCHES):
    length = ROLLOUTS.lengths[row]
    at = np.argwhere(experience["completion_ids"] == row)[-length:]
    np.testing.assert_array_equal(
        found[tuple(at.T)], values[row, :length].astype(np.float32))
    left -= length
  assert left == 0


def test_a_shared_prompt_is_of_a_group_and_of_no_completion():
  experience = pack(2, "token_mean", share_prompts=True)
  shared = (experience["segment_ids"] == experience["prefix_ids"]) & (
      experience["segment_ids"] > 0)
  assert shared.any()
  assert (experience["completion_ids"][shared] == -1).all()
  assert (experience["group_ids"][shared] >= 0).all()
  for row in np.concatenate(MINIBATCHES):
    at = experience["completion_ids"] == row
    # The prompt's last token begins each completion.
    assert at.sum() == 1 + ROLLOUTS.lengths[row]
    assert set(experience["group_ids"][at]) == {GROUPS[row]}


def test_divergences_are_sums_over_each_completion():
  """Of the sampled tokens; the rows of a batch in any order."""
  with jax.set_mesh(meshes.one()):
    model, _, reference = models()
    experience = pack(2, "token_mean")
    lines = {}
    for row in np.concatenate(MINIBATCHES):
      (_, (now, _, ref)), _ = row_gradient(
          model, model, reference, alone(row), 0.0, np.zeros(LENGTH, "f"))
      start = len(ROLLOUTS.prompts[row])
      at = start + np.flatnonzero(ROLLOUTS.loss_mask[row])
      lines[row] = np.asarray(ref - now, np.float64)[at]
    for name, formula in {
        "k1": lambda d: -d, "k2": lambda d: d**2 / 2,
        "k3": lambda d: np.exp(d) - 1 - d}.items():
      found = experience_lib.divergences(
          with_logprobs(experience, model, reference), name,
          len(ROLLOUTS.lengths))
      wanted = np.zeros(len(ROLLOUTS.lengths))
      for row, d in lines.items():
        wanted[row] = formula(d).sum()
      np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
      assert found[2] == found[7] == 0
