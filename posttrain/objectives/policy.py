"""Clipped policy-gradient loss (PPO, GRPO), and the weights of its tokens.

  R: rows    T: length    N: completions

References: GRPO, https://arxiv.org/abs/2402.03300; separate clips and the
token mean, DAPO, https://arxiv.org/abs/2503.14476; the constant denominator,
Dr. GRPO, https://arxiv.org/abs/2503.20783.
"""

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.objectives import kl
from posttrain.objectives.columns import Columns, Sums, Term, Terms, needs
from posttrain.objectives.masked import masked_sum

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


def aggregation_weights(aggregation: str, lengths: np.ndarray) -> np.ndarray:
  """Weights of a completion's tokens in the numerator.

  | aggregation   | loss of a batch                                       |
  |---------------|-------------------------------------------------------|
  | token_mean    | mean over all tokens (DAPO)                           |
  | sequence_mean | mean over completions of the mean over tokens (GRPO)  |
  | constant      | sum over tokens / (completions x max_tokens) (Dr.GRPO)|

  Args:
    aggregation: one of `AGGREGATIONS`.
    lengths: [N] int, tokens of each completion that are in the loss.

  Returns:
    [N] float32, for each token of a completion.

  Raises:
    ValueError: `aggregation` is another word.
  """
  if aggregation not in AGGREGATIONS:
    raise ValueError(
        f"loss.aggregation is {aggregation!r} and must be one of "
        f"{', '.join(AGGREGATIONS)}.")
  if aggregation != "sequence_mean":
    return np.ones(lengths.shape, np.float32)
  return (1 / np.maximum(lengths, 1)).astype(np.float32)


def aggregation_denominator(
    aggregation: str, lengths: np.ndarray, *, max_tokens: int) -> float:
  """Denominator of the loss over all completions of a minibatch.

  It counts completions whose advantage is zero, and completions without a
  token in the loss, as the formulas do (and TRL 1.16): a batch of which half
  teaches nothing moves the weights half as far.

  Args:
    aggregation, lengths: as in `aggregation_weights`, of every completion.
    max_tokens: the longest completion possible; "constant" only.
  """
  if aggregation == "token_mean":
    return float(np.sum(lengths))
  return float(len(lengths) * (
      max_tokens if aggregation == "constant" else 1))


@needs("old_logprobs", "advantages", "importance_weights", "token_weights",
       "denominator_shares")
def policy_loss(
    columns: Columns, *, clip_low: float, clip_high: float,
) -> tuple[Terms, Sums]:
  """Clips the ratio to the old policy, token by token (PPO clipping).

  Args:
    columns: `importance_weights` multiply the policy term, see
      `importance_sampling`; `token_weights` and `denominator_shares` carry
      the aggregation.
    clip_low, clip_high: the ratio is kept in [1 - clip_low, 1 + clip_high].

  Returns:
    The term "policy", and sums over the tokens in the loss (divide by their
    number): `clip_ratio/low`, `clip_ratio/high` and `ratio`.
  """
  mask, advantages = columns["loss_mask"], columns["advantages"]
  # Masked first: a padding token's logprobs may be anything.
  log_ratio = jnp.where(
      mask, columns["logprobs"] - columns["old_logprobs"], 0)
  ratio = jnp.exp(
      jnp.clip(log_ratio, -kl.MAX_LOG_RATIO, kl.MAX_LOG_RATIO))  # [R, T]
  clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  loss = -jnp.minimum(ratio * advantages, clipped * advantages)
  loss = columns["importance_weights"] * loss
  # Counted where the clip takes effect: the minimum takes the other branch
  # where the advantage pulls the ratio back.
  low = (ratio < 1 - clip_low) & (advantages < 0)
  high = (ratio > 1 + clip_high) & (advantages > 0)
  sums = {"clip_ratio/low": masked_sum(low, mask),
          "clip_ratio/high": masked_sum(high, mask),
          "ratio": masked_sum(ratio, mask)}
  return {"policy": Term(
      masked_sum(loss * columns["token_weights"], mask),
      masked_sum(columns["denominator_shares"], mask))}, jax.tree.map(
          jax.lax.stop_gradient, sums)
