"""Oracles: exact distributions by hand in NumPy, and the RNG contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.sampler import token_sampling

DRAWS = 20_000
LOGITS = np.array(
    [2.0, 1.5, 1.5, 1.0, 0.3, 0.0, -0.5, -1.0, -2.0, -4.0], np.float32)


def exact(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, banned=()):
  """The distribution from the definitions, one token at a time, float64."""
  p = {i: float(np.exp(x / temperature))
       for i, x in enumerate(logits.astype(np.float64)) if i not in banned}
  normal = lambda p: {i: x / sum(p.values()) for i, x in p.items()}
  p = normal(p)
  if top_k:
    least = sorted(p.values(), reverse=True)[min(top_k, len(p)) - 1]
    p = normal({i: x for i, x in p.items() if x >= least})
  if top_p < 1:
    mass, least = 0.0, 1.0
    for x in sorted(p.values(), reverse=True):
      if mass >= top_p:
        break
      mass, least = mass + x, x
    p = normal({i: x for i, x in p.items() if x >= least})
  if min_p:
    p = normal({i: x for i, x in p.items() if x >= min_p * max(p.values())})
  return np.array([p.get(i, 0.0) for i in range(len(logits))])


def choose(logits, banned, keys, params, given=None):
  """Tokens and their logprobs, from the parts that the decode loop calls."""
  tokens, distribution = token_sampling.draw(logits, banned, keys, params)
  if given is not None:
    tokens = jnp.where(given >= 0, given, tokens)
  return tokens, token_sampling.logprob_of(distribution, tokens)


def draw(logits, banned, params, prompt_id, sample_id, positions, seed=0):
  keys = token_sampling.fold_position(
      token_sampling.row_keys(seed, "reason", 3, prompt_id, sample_id),
      positions)
  return choose(logits, banned, keys, params)


@pytest.fixture(scope="module")
def many_keys():
  rows = np.arange(DRAWS, dtype=np.int32)
  return token_sampling.fold_position(
      token_sampling.row_keys(0, "reason", 3, rows // 7, rows % 7), rows % 11)


CASES = [
    dict(), dict(temperature=0.7), dict(temperature=2.0), dict(top_k=4),
    dict(top_k=2), dict(top_p=0.6), dict(min_p=0.15), dict(banned=(0, 4)),
    dict(temperature=1.3, top_k=7, top_p=0.9),
    dict(temperature=0.8, top_p=0.95, min_p=0.1),
    dict(temperature=1.5, top_k=6, top_p=0.8, min_p=0.3, banned=(1,)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frequencies_follow_the_exact_distribution(case, many_keys):
  """Chi-square at a false-alarm rate of 1e-6 a case; the seed is fixed."""
  case = dict(case)
  expected = exact(LOGITS, **case)
  banned = np.zeros((DRAWS, 10), bool)
  banned[:, list(case.pop("banned", ()))] = True
  tokens, logprobs = jax.jit(choose, static_argnames="params")(
      np.tile(LOGITS, (DRAWS, 1)), banned, many_keys,
      params=token_sampling.SamplingParams(**case))
  kept = expected > 0
  counts = np.bincount(tokens, minlength=10)
  assert counts[~kept].sum() == 0
  wanted = DRAWS * expected[kept]
  statistic = ((counts[kept] - wanted) ** 2 / wanted).sum()
  # Wilson-Hilferty: (X / d)^(1/3) is close to normal; 4.75 sigma is 1e-6.
  d = kept.sum() - 1
  if d > 0:
    limit = d * (1 - 2 / (9 * d) + 4.75 * np.sqrt(2 / (9 * d))) ** 3
    assert statistic < limit, (statistic, limit)
  np.testing.assert_allclose(logprobs, np.log(expected[tokens]), atol=2e-6)


def test_the_chi_square_notices_a_wrong_temperature():
  wrong = exact(LOGITS, temperature=1.1)
  right = exact(LOGITS)
  assert (DRAWS * (right - wrong) ** 2 / wrong).sum() > 75


def test_ties_at_a_threshold_are_all_kept():
  kept = lambda **params: np.flatnonzero(token_sampling.process(
      jnp.asarray(LOGITS)[None], token_sampling.SamplingParams(**params))[
      0] > -1e29)
  assert list(kept(top_k=1)) == [0]
  assert list(kept(top_k=2)) == [0, 1, 2]
  first = exact(LOGITS)[0]
  assert list(kept(top_p=float(first) / 2)) == [0]
  assert list(kept(top_p=float(first) * 1.05)) == [0, 1, 2]
  assert list(kept(min_p=1.0)) == [0]
  assert list(kept(top_k=10)) == list(range(10))


def test_temperature_zero_is_argmax_with_the_untempered_logprob():
  logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
  banned = np.zeros((6, 50), bool)
  banned[np.arange(3), logits[:3].argmax(1)] = True
  zeros = np.zeros(6, np.int32)
  tokens, logprobs = draw(
      logits, banned, token_sampling.SamplingParams(temperature=0, top_k=3),
      zeros,
      zeros, zeros)
  allowed = np.where(banned, -np.inf, logits.astype(np.float64))
  np.testing.assert_array_equal(tokens, allowed.argmax(1))
  want = allowed.max(1) - np.log(np.exp(allowed).sum(1))
  np.testing.assert_allclose(logprobs, want, atol=2e-6)


def test_a_given_token_has_the_logprob_of_a_drawn_one():
  logits = np.tile(LOGITS, (3, 1))
  given = np.array([4, -1, 2], np.int32)
  rows = np.arange(3, dtype=np.int32)
  keys = token_sampling.row_keys(0, "reason", 0, rows, rows)
  params = token_sampling.SamplingParams(temperature=0.7)
  drawn, _ = choose(logits, None, keys, params)
  tokens, logprobs = choose(logits, None, keys, params, given)
  assert list(tokens) == [4, drawn[1], 2]
  want = np.log(exact(LOGITS, temperature=0.7))[np.asarray(tokens)]
  np.testing.assert_allclose(logprobs, want, atol=2e-6)


def test_low_temperature_tends_to_argmax():
  logits = np.random.default_rng(1).normal(size=(64, 50)).astype(np.float32)
  rows = np.arange(64, dtype=np.int32)
  tokens, _ = draw(
      logits, None, token_sampling.SamplingParams(temperature=1e-6), rows, rows,
      rows)
  np.testing.assert_array_equal(tokens, logits.argmax(1))


def test_a_draw_depends_on_its_ids_and_position_only():
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(24, 40)).astype(np.float32)
  prompt_id = np.repeat(np.arange(6), 4).astype(np.int32)
  sample_id = np.tile(np.arange(4), 6).astype(np.int32)
  positions = rng.integers(0, 50, 24).astype(np.int32)
  params = token_sampling.SamplingParams(temperature=0.9, top_p=0.95)
  tokens, logprobs = jax.jit(functools.partial(draw, params=params))(
      logits, None, prompt_id=prompt_id, sample_id=sample_id,
      positions=positions)
  for rows in (rng.permutation(24), [17]):
    again, again_logprobs = draw(
        logits[rows], None, params, prompt_id[rows], sample_id[rows],
        positions[rows])
    np.testing.assert_array_equal(again, np.asarray(tokens)[rows])
    np.testing.assert_allclose(
        again_logprobs, np.asarray(logprobs)[rows], atol=1e-6)


@pytest.mark.parametrize(
    "change", ["seed", "stage", "step", "prompt_id", "sample_id", "positions"])
def test_any_id_changes_the_noise(change):
  ids = dict(
      seed=0, stage="a", step=0, prompt_id=np.zeros(64, np.int32),
      sample_id=np.zeros(64, np.int32), positions=np.arange(64))

  def tokens(seed, stage, step, prompt_id, sample_id, positions):
    keys = token_sampling.row_keys(seed, stage, step, prompt_id, sample_id)
    keys = token_sampling.fold_position(keys, positions)
    return np.asarray(choose(
        jnp.zeros((64, 1000)), None, keys, token_sampling.SamplingParams())[0])

  one = tokens(**ids)
  np.testing.assert_array_equal(one, tokens(**ids))
  ids[change] = "b" if change == "stage" else ids[change] + 1
  # positions + 1 shifts the noise by one row; rows must differ all the same.
  assert (one != tokens(**ids)).mean() > 0.9


def test_a_mesh_draws_the_same_tokens():
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(8, 33)).astype(np.float32)
  banned = rng.random((8, 33)) < 0.2
  ids = np.arange(8, dtype=np.int32)
  params = token_sampling.SamplingParams(temperature=0.8, top_k=20, top_p=0.9,
                                 min_p=0.01)

  def on(mesh):
    with jax.set_mesh(mesh):
      rows = sharding.put(ids, "batch")
      tokens, logprobs = jax.jit(functools.partial(draw, params=params))(
          sharding.put(logits, "batch", None),
          sharding.put(banned, "batch", None), prompt_id=rows, sample_id=rows,
          positions=rows)
      return str(jax.typeof(tokens)), *sharding.fetch((tokens, logprobs))

  layout, tokens, logprobs = on(sharding.make_mesh(4, 2))
  assert layout == "int32[8@fsdp]"
  one = on(sharding.make_mesh(1, 1, devices=jax.devices()[:1]))
  np.testing.assert_array_equal(tokens, one[1])
  np.testing.assert_allclose(logprobs, one[2], atol=1e-6)


@pytest.mark.parametrize("wrong", [
    dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0),
    dict(top_p=1.5), dict(min_p=2.0)])
def test_impossible_parameters_name_their_config_key(wrong):
  with pytest.raises(ValueError, match=f"rollout.{next(iter(wrong))}"):
    token_sampling.SamplingParams(**wrong)
