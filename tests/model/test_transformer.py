"""Oracle: the NumPy transformer; packing and recomputation change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.model import attention, transformer
from tests import meshes
from tests.model import build, numpy_transformer

LENGTHS = ((9, 14), (23,))  # Of the segments packed into each row of 24.
ROW = 24


def packed_rows(seed=0):
  """tokens, positions, segment_ids [2, 24], and the examples in order."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 87, (len(LENGTHS), ROW))  # Padding holds ids too.
  positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
  examples = []
  for row, lengths in enumerate(LENGTHS):
    start = 0
    for index, length in enumerate(lengths):
      part = slice(start, start + length)
      positions[row, part] = np.arange(length)
      segment_ids[row, part] = index + 1
      examples.append((row, part, tokens[row, part]))
      start += length
  return (tokens, positions, segment_ids), examples


def unpacked_rows(examples):
  """One example a row, padded on the right."""
  tokens = np.zeros((len(examples), ROW), int)
  segment_ids = np.zeros_like(tokens)
  for row, (_, _, example) in enumerate(examples):
    tokens[row, :len(example)] = example
    segment_ids[row, :len(example)] = 1
  return tokens, np.tile(np.arange(ROW), (len(examples), 1)), segment_ids


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(meshes.one()):
    yield


@pytest.mark.parametrize("option", build.OPTIONS)
def test_logits_match_numpy(option):
  """Every option, in rows that hold several examples and padding."""
  config = build.make_config(**build.OPTIONS[option])
  params = build.random_params(config)
  rows, examples = packed_rows()
  logits = build.full_logits(
      build.load(config, params), *build.put_rows(*rows))
  for row, part, tokens in examples:
    want = numpy_transformer.logits(params, config, tokens)
    np.testing.assert_allclose(logits[row, part], want, rtol=0, atol=1e-4)


def test_numpy_packs_as_it_does_not_pack():
  """The oracle's own segments: one packed row is its examples, one by one."""
  config = build.make_config(**build.OPTIONS["everything"])
  params = build.random_params(config)
  (tokens, positions, segment_ids), examples = packed_rows()
  packed = numpy_transformer.logits(
      params, config, tokens[0], positions[0], segment_ids[0])
  for row, part, example in examples[:2]:
    assert row == 0
    np.testing.assert_allclose(
        packed[part], numpy_transformer.logits(params, config, example),
        atol=1e-12)


def test_bfloat16_stays_within_its_band():
  """Measured: max 0.15, mean 0.021, on logits of standard deviation 2.1."""
  config = build.make_config(**build.OPTIONS["everything"], dtype="bfloat16")
  params = build.random_params(config)
  rows, examples = packed_rows()
  logits = build.full_logits(
      build.load(config, params), *build.put_rows(*rows))
  assert logits.dtype == jnp.float32
  gaps = np.concatenate([
      np.abs(logits[row, part]
             - numpy_transformer.logits(params, config, tokens))
      for row, part, tokens in examples])
  assert gaps.max() < 0.3 and 1e-3 < gaps.mean() < 0.04


def negative_logprob(model, tokens, positions, segment_ids):
  """Summed over all tokens but the first of each example."""
  logprobs = jax.nn.log_softmax(
      model.logits(model(tokens, positions, segment_ids)))[:, :-1]
  chosen = jax.nn.one_hot(tokens[:, 1:], logprobs.shape[-1])
  counts = (segment_ids[:, 1:] > 0) & (positions[:, 1:] > 0)
  return -jnp.sum(logprobs * chosen * counts[..., None])


gradient = jax.jit(jax.value_and_grad(negative_logprob))


def test_packed_is_unpacked():
  config = build.make_config(**build.OPTIONS["everything"])
  model = build.load(config, build.random_params(config))
  rows, examples = packed_rows()
  rows, alone = build.put_rows(*rows), build.put_rows(*unpacked_rows(examples))
  packed, single = (
      sharding.fetch(build.full_logits(model, *x)) for x in (rows, alone))
  for index, (row, part, tokens) in enumerate(examples):
    np.testing.assert_allclose(
        packed[row, part], single[index, :len(tokens)], rtol=0, atol=2e-5)
  (loss, got), (want_loss, want) = gradient(model, *rows), gradient(
      model, *alone)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
  build.assert_same_leaves(got, want)


def test_recomputing_and_unrolling_leave_the_gradient_alone():
  rows, _ = packed_rows()
  params = build.random_params(build.make_config())
  grads = [
      gradient(build.load(build.make_config(**fields), params),
               *build.put_rows(*rows))[1]
      for fields in (
          dict(), dict(remat="full"), dict(remat="dots", unroll=2))]
  for other in grads[1:]:
    build.assert_same_leaves(other, grads[0])


def test_the_padding_of_the_vocabulary_takes_no_gradient():
  config = build.make_config(tied_embeddings=False)
  rows, _ = packed_rows()
  _, grads = gradient(
      build.load(config, build.random_params(config)), *build.put_rows(*rows))
  np.testing.assert_array_equal(grads.embedding[...][87:], 0)
  np.testing.assert_array_equal(grads.head[...][:, 87:], 0)
  assert np.abs(grads.head[...][:, :87]).min() > 0


def test_padded_ids_have_no_probability():
  config = build.make_config()
  model = build.load(config, build.random_params(config))
  hidden = jnp.ones((1, 1, config.embed))
  logits = jax.jit(lambda model, x: model.logits(x))(model, hidden)
  assert logits.shape == (1, 1, 128)
  np.testing.assert_array_equal(
      logits[..., 87:], np.float32(attention.MASKED))
  np.testing.assert_allclose(
      jax.nn.logsumexp(logits), jax.nn.logsumexp(logits[..., :87]))


def test_a_random_model_knows_nothing():
  """At the start every token is about equally likely: the loss is log V."""
  model = transformer.init(build.make_config(), 0)
  rows, _ = packed_rows()
  logits = build.full_logits(model, *build.put_rows(*rows))
  entropy = -np.sum(
      np.exp(jax.nn.log_softmax(logits)) * jax.nn.log_softmax(logits), axis=-1)
  assert np.abs(np.log(87) - entropy).max() < 1.0
  np.testing.assert_array_equal(model.embedding[...][87:], 0)


def test_the_dict_form_is_the_model():
  config = build.make_config(**build.OPTIONS["everything"])
  params = build.random_params(config)
  tree = transformer.to_dict(build.load(config, params))
  assert jax.tree.structure(tree) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, tree, params)
  assert sorted(tree) == ["blocks", "embedding", "final_norm", "head"]
  assert tree["blocks"]["q"].shape == (2, 32, 2, 2, 12)  # L, D, K, G, H
