"""The clipped policy-gradient loss, and how its tokens are weighed.

  B: rows (packed or not)    T: length    N: completions

References: GRPO, https://arxiv.org/abs/2402.03300; separate clips and the
token mean, DAPO, https://arxiv.org/abs/2503.14476; the constant denominator,
Dr. GRPO, https://arxiv.org/abs/2503.20783.
"""

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.objectives import kl, masked

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


def policy_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array,
    loss_mask: jax.Array, *, clip_low: float, clip_high: float,
    ref_logprobs: jax.Array | None = None, kl_coef: float = 0.0,
    kl_estimator: str = "k3", token_weights: jax.Array | None = None,
    token_shares: jax.Array | None = None,
    importance_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Clipped policy-gradient loss, summed over the sampled tokens.

  Args:
    logprobs, old_logprobs: [B, T] float32, of the tokens that were sampled,
      under the current policy and the one at rollout time.
    advantages: [B] or [B, T] float32.
    loss_mask: [B, T] bool, true on tokens that the policy sampled.
    clip_low, clip_high: the ratio is kept in [1 - clip_low, 1 + clip_high].
    ref_logprobs: [B, T] float32, under the reference; needed for a KL term.
    kl_coef: weight of the KL term in the loss; 0 only measures it.
    kl_estimator: "k1", "k2" or "k3", see `kl`.
    token_weights: [B, T] float32, see `aggregation_weights`.
    token_shares: [B, T] float32, each token's part of the denominator, which
      may be of more completions than these (`aggregation_denominator`). None
      for both is the mean over these tokens.
    importance_weights: [B, T] float32, see `behaviour`. They multiply the
      policy term only, as in TRL: a token that they leave out is still held
      to the reference.

  Returns:
    Numerator and denominator, scalars, and a dict of sums over the tokens in
    the loss (divide by their number): `clip_ratio/low`, `clip_ratio/high`,
    `ratio`, and `kl` if there is a reference. The caller adds each over
    microbatches and devices, then divides: one denominator for the whole
    batch, so that a long completion is not discounted per token.

  Raises:
    ValueError: a KL term without a reference.
  """
  if kl_coef and ref_logprobs is None:
    raise ValueError(
        f"loss.kl_coef is {kl_coef} and no reference logprobs were given. "
        "Compute them, or set loss.kl_coef=0.")
  if advantages.ndim == 1:
    advantages = advantages[:, None]
  # Masked first: a padding token's logprobs may be anything.
  log_ratio = jnp.where(loss_mask, logprobs - old_logprobs, 0)
  ratio = jnp.exp(
      jnp.clip(log_ratio, -kl.MAX_LOG_RATIO, kl.MAX_LOG_RATIO))  # [B, T]
  clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  loss = -jnp.minimum(ratio * advantages, clipped * advantages)
  if importance_weights is not None:
    loss = importance_weights * loss
  # Counted where the clip takes effect: the minimum takes the other branch
  # where the advantage pulls the ratio back.
  low = (ratio < 1 - clip_low) & (advantages < 0)
  high = (ratio > 1 + clip_high) & (advantages > 0)
  sums = {"clip_ratio/low": masked.masked_sum(low, loss_mask),
          "clip_ratio/high": masked.masked_sum(high, loss_mask),
          "ratio": masked.masked_sum(ratio, loss_mask)}
  if ref_logprobs is not None:
    divergence = kl.ESTIMATORS[kl_estimator](
        jnp.where(loss_mask, logprobs, 0),
        jnp.where(loss_mask, ref_logprobs, 0))
    sums["kl"] = masked.masked_sum(divergence, loss_mask)
    loss = loss + kl_coef * divergence
  ones = jnp.ones_like(loss)
  weights = ones if token_weights is None else token_weights
  shares = ones if token_shares is None else token_shares
  sums = jax.tree.map(jax.lax.stop_gradient, sums)
  numerator = masked.masked_sum(loss * weights, loss_mask)
  return numerator, masked.masked_sum(shares, loss_mask), sums
