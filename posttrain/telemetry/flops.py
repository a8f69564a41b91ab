"""FLOPs that a model needs, from shapes alone; a multiply-add is two.

Counted is what the mathematics needs: causal attention within a segment and a
window, the true vocabulary, experts that are chosen, a backward pass of twice
the forward; not what a program computes beyond that (masked scores, padding,
recomputation). This is the count of the model-FLOPs utilisation (MFU) in the
metrics.
"""

from collections.abc import Mapping

import numpy as np

from posttrain.model.config import ModelConfig
from posttrain.sampler.rollouts import Rollouts
from posttrain.telemetry import memory


def forward(
    config: ModelConfig, tokens: float, context: float, *, logits: float,
) -> float:
  """Of one forward pass.

  Args:
    tokens: that go through the layers.
    context: keys that a token attends to in a layer, itself included, on the
      average.
    logits: tokens whose logits are computed.
  """
  return _products(config, tokens, logits) + _attention(
      config, tokens, context)


def update(
    config: ModelConfig, tokens: float, context: float, *, logits: float,
    trained: float = 1.0,
) -> float:
  """Of a forward and a backward pass.

  Args:
    tokens, context, logits: as of `forward`.
    trained: the share of the weights that is; the others need no gradient of
      their own, one of three products.
  """
  return ((2 + trained) * _products(config, tokens, logits)
          + 3 * _attention(config, tokens, context))


def of_batch(
    config: ModelConfig, batch: Mapping[str, np.ndarray], *, trained: float,
) -> float:
  """`update` on packed rows.

  Args:
    batch: `positions` and `segment_ids`, of one shape, whatever it is.
  """
  positions = batch["positions"][batch["segment_ids"] > 0]
  return update(
      config, positions.size, mean_context(config, positions),
      logits=positions.size, trained=trained)


def of_rollouts(config: ModelConfig, rollouts: Rollouts) -> float:
  """Of sampling: each prompt once, then each token but a row's last."""
  _, first = np.unique(rollouts.prompt_id, return_index=True)
  prompts = [np.arange(len(rollouts.prompts[row])) for row in first]
  fed = [len(prompt) + np.arange(length - 1) for prompt, length in zip(
      rollouts.prompts, rollouts.lengths, strict=True)]
  positions = np.concatenate([*prompts, *fed])
  logits = len(prompts) + sum(map(len, fed))
  return forward(
      config, positions.size, mean_context(config, positions), logits=logits)


def mean_context(config: ModelConfig, positions: np.ndarray) -> float:
  """`context` of tokens at these positions of their segments; 0 of none.

  Args:
    positions: any shape, from 0.
  """
  if not positions.size:
    return 0.0
  whole = positions.astype(np.int64) + 1
  local = config.layer_kinds.count("local")
  near = np.minimum(whole, config.sliding_window).mean() if local else 0.0
  return float((config.layers - local) * whole.mean()
               + local * near) / config.layers


def _products(config: ModelConfig, tokens: float, logits: float) -> float:
  """With weights; adapters left out."""
  layers = config.layers * memory.layer_parameters(
      config, config.experts_per_token)
  return 2.0 * (tokens * layers + logits * config.embed * config.vocab_size)


def _attention(config: ModelConfig, tokens: float, context: float) -> float:
  """Scores, and the weighted values."""
  return 4.0 * tokens * config.layers * context * (
      config.heads * config.head_dim)
