"""Identity: a mesh changes where an update is computed, not the update.

Rows are packed, and their segments end on both sides of every place where the
length is cut: attention, positions and the shift from a token to the position
that predicts it all have to look across.
"""

import functools

import jax
import numpy as np
import pytest
from ml_collections import config_dict

from posttrain import sharding
from posttrain.model import attention, token_logprobs
from posttrain.objectives import policy as policy_lib
from posttrain.objectives import supervised
from posttrain.rl import experience
from posttrain.rl.objective import PolicyObjective
from posttrain.stages import training
from posttrain.train import step
from tests import meshes
from tests.model import build

ROWS, LENGTH, CHUNK = 8, 12, 4

# Two query heads of each of two kv heads: beside tensor=2, a length in two
# parts has to split the query heads. Of four kv heads it splits those.
CONFIGS = {
    "groups": build.make_config(
        layer_pattern=("local", "global"), sliding_window=5,
        tied_embeddings=False),
    "kv_heads": build.make_config(kv_heads=4, qk_norm="full", remat="full"),
    "experts": build.make_config(**build.OPTIONS["experts"]),
    "experts_grouped": build.make_config(
        **build.OPTIONS["experts_grouped"], remat="dots"),
}
LOSSES = {
    "sft": functools.partial(
        step.evaluate, supervised.cross_entropy, chunk=CHUNK),
    "grpo": functools.partial(step.evaluate, PolicyObjective(
        policy_lib.policy_loss, dict(clip_low=0.2, clip_high=0.28),
        kl_coef=0.1), chunk=CHUNK, temperature=0.8)}
SHAPES = {
    "4x2": dict(fsdp=4, tensor=2),
    "data": dict(fsdp=2, tensor=2, data=2),
    "context": dict(fsdp=2, tensor=2, context=2),
    "context alone": dict(fsdp=1, tensor=1, context=4),
    "expert": dict(fsdp=2, tensor=2, expert=2),
    "expert and context": dict(fsdp=1, tensor=2, expert=2, context=2),
    "data and context": dict(fsdp=2, tensor=1, data=2, context=2)}


def make_batch(config):
  """[2, ROWS / 2, LENGTH] arrays of two segments a row, and padding."""
  rng = np.random.default_rng(0)
  first = rng.integers(3, 9, (ROWS, 1))
  end = first + rng.integers(1, LENGTH - 8, (ROWS, 1))
  at = np.arange(LENGTH)
  real = at < end
  segment = np.where(at < first, 1, 2) * real
  position = np.where(at < first, at, at - first) * real
  draw = lambda: rng.normal(size=(ROWS, LENGTH)).astype(np.float32)
  batch = {
      "tokens": rng.integers(0, 86, (ROWS, LENGTH)) * real,
      "positions": position, "segment_ids": segment,
      "loss_mask": real & (position > 0), "advantages": draw(),
      "token_weights": np.abs(draw()),
      "denominator_shares": np.ones_like(draw()),
      "sampler_logprobs": draw() - 4, "old_logprobs": draw() / 9 - 4.4,
      "ref_logprobs": draw() / 9 - 4.4}
  if config.num_experts:
    batch["sampler_experts"] = np.ones(
        (ROWS, LENGTH, config.layers, config.experts_per_token), int)
  return {name: x if x.dtype in (bool, np.float32) else x.astype(np.int32)
          for name, x in batch.items()}


@functools.lru_cache
def gradient(name, kind, **sizes):
  config, loss = CONFIGS[name], LOSSES[kind]
  with jax.set_mesh(meshes.mesh(**(dict(fsdp=1, tensor=1) | sizes))):
    model = build.load(config, build.random_params(config))
    batch = {key: sharding.put(
        x.reshape(2, -1, *x.shape[1:]), None, "batch", "length",
        *(None,) * (x.ndim - 2)) for key, x in make_batch(config).items()}
    grads, terms, sums = jax.jit(functools.partial(
        step.accumulate, loss, num_microbatches=2))(model, batch)
    sums |= step.metrics_of_terms(terms)
    for w, g in zip(
        jax.tree.leaves(model), jax.tree.leaves(grads), strict=True):
      assert jax.typeof(w) == jax.typeof(g)
    return sharding.fetch(grads), sharding.fetch(sums)


def slow(*case):
  return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize("name,kind,shape", [
    ("groups", "grpo", "data"), ("groups", "grpo", "context"),
    slow("groups", "grpo", "4x2"), slow("groups", "sft", "context"),
    slow("kv_heads", "sft", "context alone"),
    slow("kv_heads", "grpo", "context"),
    slow("kv_heads", "sft", "data and context"),
    slow("experts", "grpo", "expert"), slow("experts", "grpo", "context"),
    slow("experts_grouped", "sft", "expert and context")])
def test_a_mesh_leaves_loss_and_gradient_alone(name, kind, shape):
  want, sums = gradient(name, kind)
  got, found = gradient(name, kind, **SHAPES[shape])
  build.assert_same_leaves(got, want)
  assert sums["loss"] and set(sums) == set(found)
  for key in sums:
    np.testing.assert_allclose(
        found[key], sums[key], rtol=1e-5, atol=1e-5, err_msg=key)


def test_a_length_that_the_mesh_does_not_divide_names_its_key():
  section = config_dict.ConfigDict(dict(sequence_length=LENGTH + 1))
  with jax.set_mesh(meshes.with_context()), pytest.raises(
      ValueError, match=r"sequence_length=13 .* mesh\.context=2\. Use "
      r"sequence_length=14, the next multiple"):
    training.make_update(section, LOSSES["sft"])


@pytest.mark.parametrize("name,inside", [
    ("groups", "float32[4@fsdp,12,2@tensor,2@context,8]"),
    ("kv_heads", "float32[4@fsdp,12,4@(tensor,context),1,8]")])
def test_heads_stand_in_for_the_length_within_attention(
    name, inside, monkeypatch):
  """And nothing else than attention has a whole length of what is wide."""
  config, seen = CONFIGS[name], {}

  def trace(model, tokens):
    batch = dict(tokens=tokens, positions=tokens, segment_ids=tokens)
    hidden = model(tokens, tokens, tokens)
    seen["hidden"] = str(jax.typeof(hidden))
    logprobs, _, _ = token_logprobs.token_logprobs(model, batch, chunk=CHUNK)
    seen["logprobs"] = str(jax.typeof(logprobs))
    several = {key: x[None] for key, x in batch.items()}
    seen["several"] = str(jax.typeof(experience.sequence_logprobs(
        model, several, 1, chunk=CHUNK, temperature=0.8)))
    return hidden

  def watched(q, *args, real=attention.attend, **options):
    seen["inside"] = str(jax.typeof(q))
    return real(q, *args, **options)

  monkeypatch.setattr(attention, "attend", watched)
  with jax.set_mesh(meshes.with_context()):
    rows = sharding.put(
        np.ones((4, LENGTH), np.int32), "batch", "length")
    jax.eval_shape(trace, build.load(
        config, build.random_params(config)), rows)
  assert seen == {
      "hidden": "float32[4@fsdp,12@context,32]", "inside": inside,
      "logprobs": "float32[4@fsdp,12@context]",
      "several": "float32[1,4@fsdp,12@context]"}
