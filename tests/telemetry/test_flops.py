"""Oracles: a loop over tokens and layers, and 6 N per token.

That a forward pass has as many as XLA counts is in tests/benchmarks.
"""

import dataclasses
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.model.presets import PRESETS
from posttrain.telemetry import flops

CONFIG = dataclasses.replace(
    PRESETS["tiny"], vocab_size=300, layers=3,
    layer_pattern=("local", "local", "global"), sliding_window=4)


def keys_of(position: int, kind: str) -> int:
  """That the token at a position attends to, one by one."""
  return sum(1 for other in range(position + 1)
             if kind != "local" or position - other < 4)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=20))
def test_the_context_is_what_tokens_attend_to(positions):
  wanted = np.mean([keys_of(p, kind) for p in positions
                    for kind in CONFIG.layer_kinds])
  assert flops.mean_context(
      CONFIG, np.array(positions, np.int32)) == pytest.approx(wanted)


def token_by_token(config, positions) -> float:
  """FLOPs of a forward pass whose every token has logits."""
  total = 0.0
  for position in positions:
    for kind in config.layer_kinds:
      total += 2 * config.matrix_parameters(config.num_experts)
      total += 4 * keys_of(position, kind) * config.heads * config.head_dim
    total += 2 * config.embed * config.vocab_size
  return total


def test_a_batch_is_its_tokens_without_the_padding():
  positions = np.array([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
  segment_ids = np.array([[1, 1, 1, 2, 2, 0, 0], [1] * 7])
  batch = {"positions": positions, "segment_ids": segment_ids}
  forward = token_by_token(CONFIG, positions[segment_ids > 0])
  assert flops.of_batch(CONFIG, batch, trained=1.0) == pytest.approx(
      3 * forward)
  # Without any weight to train: two passes, and attention's own backward.
  attention = 4 * CONFIG.heads * CONFIG.head_dim * sum(
      keys_of(p, kind) for p in positions[segment_ids > 0]
      for kind in CONFIG.layer_kinds)
  assert flops.of_batch(CONFIG, batch, trained=0.0) == pytest.approx(
      2 * forward + attention)
  nothing = {name: x[:, :0] for name, x in batch.items()}
  assert flops.of_batch(CONFIG, nothing, trained=1.0) == 0


def test_six_per_parameter_and_token_where_attention_is_little():
  config = PRESETS["qwen3-0.6b"]
  count = flops.update(config, 1000, 1.0, logits=1000)
  assert count == pytest.approx(6 * 1000 * config.num_parameters, rel=1e-3)


def test_experts_that_are_not_chosen_cost_nothing():
  config = PRESETS["qwen3-30b-a3b"]
  count = flops.forward(config, 1.0, 1.0, logits=1.0)
  # Of 3.3 billion active parameters, the input table is looked up.
  active = 3.35e9 - config.vocab_size * config.embed
  assert count == pytest.approx(2 * active, rel=0.02)


def test_rollouts_feed_each_prompt_once_and_all_tokens_but_the_last():
  rollouts = types.SimpleNamespace(  # Of `Rollouts`, what is looked at.
      prompts=[[0] * 3, [0] * 3, [0] * 5, [0] * 5],
      lengths=np.array([4, 1, 2, 6]), prompt_id=np.array([7, 7, 2, 2]))
  fed = [0, 1, 2, *range(5), 3, 4, 5, 5, 5, 6, 7, 8, 9]
  heads = 2 + 3 + 0 + 1 + 5  # One of each prompt, and of each token fed.
  wanted = token_by_token(CONFIG, fed) - (
      len(fed) - heads) * 2 * CONFIG.embed * CONFIG.vocab_size
  assert flops.of_rollouts(CONFIG, rollouts) == pytest.approx(wanted)
