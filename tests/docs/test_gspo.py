"""GSPO as docs/changing.md has it, on packed rows of a model.

Oracles: the worked value, and a loop over completions from the paper's
equation 5, each alone in its row.
"""

import functools

import jax
import numpy as np
import pytest

from posttrain import sharding
from posttrain.objectives import policy
from posttrain.rl import experience as experience_lib
from posttrain.rl import objective, packing
from posttrain.sampler.rollouts import Rollouts
from posttrain.train import step
from tests import meshes, one_by_one
from tests.docs.test_changing import FILES
from tests.model import build
from tests.objectives import oracles

LOG_RATIOS = [0.1, -0.05, 0.2, -0.01]
WORKED = oracles.VALUES[f"gspo logratios {LOG_RATIOS}"]
LOW, HIGH = (abs(1 - bound) for bound in WORKED["clipped_at"])
CONFIG, LENGTH = build.make_config(), 32
OPTIONS = dict(temperature=1.0, chunk=7)
RNG = np.random.default_rng(5)
# Prompts' lengths; completions of one prompt are neighbours.
PROMPTS = [RNG.integers(CONFIG.vocab_size, size=n).tolist()
           for n in (3, 3, 7, 7, 1, 1)]
PROMPTS[1], PROMPTS[3], PROMPTS[5] = PROMPTS[::2]
SAMPLED = [4, 4, 4, 4, 9, 2]  # Tokens in the loss; others are forced.
ADVANTAGES = np.array([1, -1, -1, 1, -0.5, 2], np.float32)
SHIFTS = [RNG.permutation(LOG_RATIOS) if n == 4 else RNG.normal(0, 0.2, n)
          for n in SAMPLED]


def make_rollouts() -> Rollouts:
  width, rows = 12, len(SAMPLED)
  provenance = np.zeros((rows, width), np.int8)
  lengths = np.array([n + 2 for n in SAMPLED], np.int32)
  for row, n in enumerate(SAMPLED):
    provenance[row, :n + 2] = RNG.permutation([1] * n + [2, 2])
  zeros = np.zeros(rows, np.int32)
  return Rollouts(
      prompts=PROMPTS, tokens=np.where(
          provenance > 0, RNG.integers(CONFIG.vocab_size, size=(rows, width)),
          0),
      logprobs=np.zeros((rows, width)), provenance=provenance,
      lengths=lengths, finish_reason=zeros, think_end=zeros,
      think_lengths=zeros, think_steps=zeros, answer_lengths=lengths,
      wait_count=zeros, prompt_id=np.repeat(np.arange(3, dtype=np.int32), 2),
      sample_id=zeros, in_thinking=zeros, raw=np.zeros((rows, 0)),
      num_turns=zeros + 1, stop_reason=zeros)


ROLLOUTS = make_rollouts()


@pytest.fixture(scope="module")
def loss(tmp_path_factory):
  """The page's function, as the config would name it, with its args."""
  assert len(FILES["my_gspo.py"].splitlines()) <= 20
  path = tmp_path_factory.mktemp("gspo") / "my_gspo.py"
  path.write_text(FILES["my_gspo.py"])
  made = objective.make(
      function=f"{path}:loss", args=dict(clip_low=LOW, clip_high=HIGH),
      clip_low=0.2, clip_high=0.2, aggregation="sequence_mean")
  return functools.partial(step.evaluate, made, **OPTIONS)


def ratio_and_slope(row):
  """exp(mean of the log ratios), clipped; and d loss / d mean log ratio."""
  ratio = np.exp(np.mean(SHIFTS[row]))
  clipped = min(max(ratio, 1 - LOW), 1 + HIGH)
  advantage = ADVANTAGES[row]
  inside = ratio * advantage <= clipped * advantage
  return min(ratio * advantage, clipped * advantage), (
      -ratio * advantage if inside else 0.0)


@functools.cache
def looped():
  """Loss and gradient, one completion at a time."""
  with jax.set_mesh(meshes.one()):
    model = build.load(CONFIG, build.random_params(CONFIG))
    grad = jax.jit(jax.grad(lambda model, tokens, weights: (
        one_by_one.logprobs(model, tokens, 1.0) * weights).sum()))
    total, count = None, len(SAMPLED)
    for row, n in enumerate(SAMPLED):
      weights = np.zeros(LENGTH, np.float32)
      at = len(PROMPTS[row]) + np.flatnonzero(ROLLOUTS.loss_mask[row])
      weights[at] = ratio_and_slope(row)[1] / n / count
      tokens = one_by_one.row_of(
          PROMPTS[row] + ROLLOUTS.completion(row), LENGTH)
      one = jax.device_get(grad(model, tokens, weights))
      total = one if total is None else jax.tree.map(np.add, total, one)
  return -np.mean([ratio_and_slope(r)[0] for r in range(count)]), total


def packed(model, rows, share_prompts):
  """Old logprobs are the model's, less the log ratio of each token."""
  shape, lengths = ROLLOUTS.tokens.shape, ROLLOUTS.loss_mask.sum(1)
  shifts = np.zeros(shape, np.float32)
  for row, shift in enumerate(SHIFTS):
    shifts[row, ROLLOUTS.loss_mask[row]] = shift
  weights = policy.aggregation_weights("sequence_mean", lengths)
  experience = packing.pack_experience(
      ROLLOUTS, np.repeat(np.arange(3), 2), [np.arange(len(SAMPLED))],
      packing.Shapes(
          length=LENGTH, rows=rows, num_minibatches=1,
          completions=len(SAMPLED), share_prompts=share_prompts))
  experience |= {name: packing.per_token(experience, ROLLOUTS, values)
                 for name, values in (
      ("advantages", np.broadcast_to(ADVANTAGES[:, None], shape)),
      ("token_weights", np.broadcast_to(weights[:, None], shape)),
      ("shifts", shifts))}
  experience["denominator_shares"] = packing.denominator_shares(
      experience, [float(len(SAMPLED))])
  experience = experience_lib.add_logprobs(
      "old_logprobs", model, experience, **OPTIONS)
  experience["old_logprobs"] -= experience.pop("shifts")
  return packing.minibatch(experience, 0)


@pytest.mark.parametrize("mesh, rows, share_prompts", [
    (meshes.one, 1, False), (meshes.one, 6, False), (meshes.one, 1, True),
    (meshes.with_context, 2, True), (meshes.eight, 4, False)])
def test_packed_gspo_is_the_papers(loss, mesh, rows, share_prompts):
  with jax.set_mesh(mesh()):
    model = build.load(CONFIG, build.random_params(CONFIG))
    arrays, used = packed(model, rows, share_prompts)
    assert (used > 1) == (rows < 4)
    grads, terms, sums = sharding.fetch(jax.jit(functools.partial(
        step.accumulate, loss))(model, arrays, np.int32(used)))
  term = terms["policy"]
  value, wanted = looped()
  np.testing.assert_allclose(
      term.numerator / term.denominator, value, rtol=1e-5)
  build.assert_same_leaves(jax.tree.map(
      lambda g: g / term.denominator, grads), wanted, tolerance=2e-5)
  ratios = [np.exp(np.mean(shift)) for shift in SHIFTS]
  np.testing.assert_allclose(
      sums["ratio"], np.dot(ratios, SAMPLED), rtol=1e-5)


def test_the_loop_has_the_worked_value():
  """Unclipped where the advantage is negative, else at the upper bound."""
  for row in range(4):
    assert np.exp(np.mean(SHIFTS[row])) == pytest.approx(WORKED["s"])
    np.testing.assert_allclose(
        np.exp(np.sort(SHIFTS[row])), np.sort(WORKED["token_ratios"]),
        rtol=1e-6)
    wanted = {-1: -WORKED["s"], 1: WORKED["clipped_at"][1]}[ADVANTAGES[row]]
    assert ratio_and_slope(row)[0] == pytest.approx(wanted)


def test_a_batch_of_the_worked_completions_has_the_worked_loss(loss):
  """Of four tokens each, packed: half at s, half at the bound."""
  with jax.set_mesh(meshes.one()):
    model = build.load(CONFIG, build.random_params(CONFIG))
    arrays, used = packed(model, 1, False)
    inside = np.asarray(arrays["completion_ids"]) < 4
    arrays["loss_mask"] = sharding.put(
        np.asarray(arrays["loss_mask"]) & inside, None, "batch", "length")
    _, terms, _ = sharding.fetch(jax.jit(functools.partial(
        step.accumulate, loss))(model, arrays, np.int32(used)))
  assert terms["policy"].numerator / 4 == pytest.approx(
      (WORKED["s"] - WORKED["clipped_at"][1]) / 2, rel=1e-4)
