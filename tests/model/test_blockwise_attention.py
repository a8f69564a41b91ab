"""Attention in blocks is attention over a mask, and so is its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import sharding
from posttrain.model import attention, blockwise_attention
from tests import meshes
from tests.model import build, test_transformer

ANY = np.iinfo(np.int32).max
# Rows, length, kv heads, groups, head_dim, block, soft cap, dtype: a length
# that is no multiple; one block; blocks of one token.
CASES = [
    (2, 37, 2, 3, 6, 8, 0.0, "float32"), (3, 24, 1, 2, 4, 64, 2.0, "float32"),
    (1, 7, 2, 1, 4, 1, 0.0, "float32"), (2, 32, 2, 2, 8, 16, 0.0, "bfloat16")]
TOLERANCE = {"float32": 1e-5, "bfloat16": 6e-2}


def packed(lengths, rows, total):
  """Positions and segment ids of rows that hold examples of these lengths."""
  positions = np.zeros((rows, total), np.int32)
  segment_ids = np.zeros((rows, total), np.int32)
  row = at = 0
  for number, length in enumerate(lengths, 1):
    if at + length > total:
      row, at = row + 1, 0
    if row == rows:
      break
    positions[row, at:at + length] = np.arange(length)
    segment_ids[row, at:at + length] = number
    at += length
  return positions, segment_ids


def with_members(lengths, rows, total):
  """The same, each segment cut in a prefix and up to three that go on from it.

  Returns:
    Positions, segment ids and prefix ids.
  """
  positions, segment_ids = packed(lengths, rows, total)
  part = np.minimum(positions // 3, 3)
  # A member begins where the prefix ended, whatever lies between them.
  positions = np.where(part > 0, positions - 3 * (part - 1), positions)
  prefix_ids = 4 * segment_ids
  return positions, prefix_ids + part * (segment_ids > 0), prefix_ids


@functools.cache
def arrays(case):
  """q, k, v and a cotangent; the two ways of attention with gradients."""
  rows, length, kv, groups, width, block, cap, dtype = case
  rng = np.random.default_rng(0)
  axes = {1: ("kv_heads",), 2: ("kv_heads", "groups")}
  draw = lambda *heads: sharding.put(
      2 * rng.normal(size=(rows, length, *heads, width)), "batch", "length",
      *axes[len(heads)], "head_dim").astype(dtype)
  inputs = draw(kv, groups), draw(kv), draw(kv), draw(kv, groups)
  options = dict(scale=width**-0.5, softcap=cap)

  def over_mask(q, k, v, positions, segment_ids, window, prefix_ids=None):
    distance = positions[:, :, None] - positions[:, None]
    mask = attention.causal_mask(positions, segment_ids, prefix_ids)
    return attention.attend(q, k, v, mask & (distance < window), **options)

  in_blocks = functools.partial(blockwise_attention.attend, block=block,
      **options)

  def both(attend):
    def run(q, k, v, cotangent, positions, segment_ids, window, *prefix):
      real = sharding.shard(
          segment_ids > 0, "batch", "length")[:, :, None, None, None]
      out, pull = jax.vjp(
          lambda *x: attend(*x, positions, segment_ids, window, *prefix),
          q, k, v)
      return jnp.where(real, out, 0), pull(jnp.where(real, cotangent, 0))
    return jax.jit(run)

  return inputs, both(over_mask), both(in_blocks)


@pytest.mark.parametrize("case", CASES, ids=str)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=12),
       window=st.sampled_from([ANY, 1, 3, 9]), members=st.booleans())
@settings(max_examples=40, deadline=None)
def test_blocks_are_the_whole(case, lengths, window, members):
  with jax.set_mesh(meshes.one()):
    inputs, over_mask, in_blocks = arrays(case)
    *rows, = (with_members if members else packed)(lengths, *case[:2])
    rows.insert(2, np.int32(window))
    want, got = (f(*inputs, *rows) for f in (over_mask, in_blocks))
  for a, b in zip(*map(jax.tree.leaves, (want, got)), strict=True):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(
        b, a, rtol=0, atol=TOLERANCE[case[-1]] * max(1, np.abs(a).max()))


def test_padding_gives_nothing_and_takes_nothing():
  with jax.set_mesh(meshes.one()):
    (q, k, v, cotangent), *_ = arrays(CASES[0])
    nothing = np.zeros(q.shape[:2], np.int32)

    @jax.jit
    def run(*inputs):
      out, pull = jax.vjp(lambda *x: blockwise_attention.attend(
          *x, nothing, nothing, np.int32(ANY), block=8, scale=1.0), *inputs)
      return out, pull(cotangent)

    assert not any(x.any() for x in jax.tree.leaves(run(q, k, v)))


def test_only_pairs_that_can_see_each_other_are_visited():
  """32 tokens in blocks of 4 have 36 causal pairs; fewer with segments."""
  def count(lengths, window=ANY):
    return int(blockwise_attention.visited(
        *packed(lengths, 2, 32), np.int32(window), block=4).visits)

  assert count([32, 32]) == 36
  assert count([8] * 8) == 4 * 3  # Of each segment of two blocks.
  assert count([8] * 4 + [32]) == 36  # The second row has but one segment.
  assert count([32, 32], window=5) == 8 + 7
  assert count([32, 32], window=6) == 8 + 7 + 6
  assert count([]) == 0


def test_a_prefix_is_visited_by_those_that_go_on_from_it():
  """Three blocks of prompt, two completions of two: 6 + 2 (3 x 2 + 3)."""
  segment_ids = np.repeat([3, 4, 5], [12, 8, 8])[None]
  positions = np.concatenate(
      [np.arange(12), 12 + np.arange(8), 12 + np.arange(8)])[None]
  prefix_ids = np.full_like(segment_ids, 3)
  assert blockwise_attention.visited(
      positions, segment_ids, np.int32(ANY), prefix_ids, block=4).visits == 24


@jax.jit
def gradient(model, tokens, positions, segment_ids):
  """Gradient of a loss that reads one position at a time, in any layout."""
  def loss(model):
    hidden = jnp.tanh(model(tokens, positions, segment_ids))
    weights = jnp.sin(jnp.arange(hidden.shape[-1]))
    return jnp.sum(hidden * weights * (segment_ids > 0)[..., None])

  return jax.value_and_grad(loss)(model)


@pytest.mark.parametrize("option, mesh, fields", [
    ("gemma", meshes.eight, {}),
    ("everything", meshes.with_context, dict(remat="dots", unroll=2)),
    pytest.param("nope", meshes.with_context, dict(remat="full"),
                 marks=pytest.mark.slow),
    pytest.param("ungrouped", meshes.with_context, {}, marks=pytest.mark.slow),
    pytest.param("experts", meshes.eight, {}, marks=pytest.mark.slow)])
def test_a_model_on_a_mesh(option, mesh, fields):
  """Blocks of five and gradients in layout, against one device's reference."""
  rows, _ = test_transformer.packed_rows()
  rows = [np.concatenate([x, x[::-1]]) for x in rows]
  found = []
  for where, how in (
      (meshes.one, {}), (mesh, dict(
          attention="blocks", attention_block=5, gradients="in_layout",
          **fields))):
    config = build.make_config(**build.OPTIONS[option], **how)
    with jax.set_mesh(where()):
      model = build.load(config, build.random_params(config))
      found.append(sharding.fetch(
          gradient(model, *build.put_rows(*rows))))
  (want_loss, want), (loss, got) = found
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  build.assert_same_leaves(got, want, tolerance=3e-5)
