"""Model FLOPs from shapes alone, for the model-FLOPs utilisation (MFU).

A multiply-add counts as two. The count is what the mathematics needs: causal
attention within a segment and a window, the true vocabulary, chosen experts
only, and a backward pass of twice the forward pass. Padding and recomputation
(remat) are not counted, as in PaLM (https://arxiv.org/abs/2204.02311, appendix
B). It differs from PaLM's count in that masked scores are not counted either.
"""

from collections.abc import Mapping

import numpy as np

from posttrain.model.config import ModelConfig
from posttrain.sampler.rollouts import Rollouts


def forward(
    config: ModelConfig, tokens: float, context: float, *, logits: float,
) -> float:
  """Counts the FLOPs of one forward pass.

  Args:
    tokens: number of tokens that go through the layers.
    context: mean number of keys that a token attends to in a layer, itself
      included.
    logits: number of tokens whose logits are computed.
  """
  return _products(config, tokens, logits) + _attention(
      config, tokens, context)


def update(
    config: ModelConfig, tokens: float, context: float, *, logits: float,
    trained: float = 1.0,
) -> float:
  """Counts the FLOPs of a forward and a backward pass.

  Args:
    tokens, context, logits: as in `forward`.
    trained: the share of the weights that is trained. Each weight takes part
      in three products: the output, its input's gradient and its own; a frozen
      one does not need the last.
  """
  return ((2 + trained) * _products(config, tokens, logits)
          + 3 * _attention(config, tokens, context))


def of_batch(
    config: ModelConfig, batch: Mapping[str, np.ndarray], *, trained: float,
) -> float:
  """Counts the FLOPs of an update on packed rows.

  Args:
    batch: `positions` and `segment_ids`, of one shape.
    trained: as in `update`.
  """
  positions = batch["positions"][batch["segment_ids"] > 0]
  return update(
      config, positions.size, mean_context(config, positions),
      logits=positions.size, trained=trained)


def of_rollouts(config: ModelConfig, rollouts: Rollouts) -> float:
  """Counts the FLOPs of sampling: prompts once each, then tokens but the last.

  The last token of a row is never fed, since nothing follows it.
  """
  # Samples of one prompt share its prefill.
  _, first = np.unique(rollouts.prompt_id, return_index=True)
  prompts = [np.arange(len(rollouts.prompts[row])) for row in first]
  fed = [len(prompt) + np.arange(length - 1) for prompt, length in zip(
      rollouts.prompts, rollouts.lengths, strict=True)]
  positions = np.concatenate([*prompts, *fed])
  logits = len(prompts) + sum(map(len, fed))
  return forward(
      config, positions.size, mean_context(config, positions), logits=logits)


def mean_context(config: ModelConfig, positions: np.ndarray) -> float:
  """Returns the mean `context` of tokens at these positions; 0 without tokens.

  Args:
    positions: positions in the tokens' segments, from 0; any shape.
  """
  if not positions.size:
    return 0.0
  whole = positions.astype(np.int64) + 1
  # A layer with a sliding window attends to no more keys than the window has.
  local = config.layer_kinds.count("local")
  near = np.minimum(whole, config.sliding_window).mean() if local else 0.0
  return float((config.layers - local) * whole.mean()
               + local * near) / config.layers


def _products(config: ModelConfig, tokens: float, logits: float) -> float:
  """Counts the products with weights; LoRA's are left out as negligible."""
  layers = config.layers * config.matrix_parameters(
      config.experts_per_token)
  return 2.0 * (tokens * layers + logits * config.embed * config.vocab_size)


def _attention(config: ModelConfig, tokens: float, context: float) -> float:
  """Counts the attention scores and the weighted sums of values."""
  return 4.0 * tokens * config.layers * context * (
      config.heads * config.head_dim)
