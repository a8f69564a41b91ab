"""Importance sampling correction of off-policy tokens (TIS, IcePop).

The sampler's logprobs are of the policy that drew (the behaviour policy): an
older version, or the same one in a program that rounds differently. Each
token's policy term is multiplied by the ratio of its probability under the
trainer's old policy to that under the sampler's. The KL to the reference is
not: TRL 1.16 adds it after the product, so that a token that is left out, or
has a small weight, is still pulled to the reference.

  R: rows    T: length

References: truncated importance sampling, Ionides 2008, and for language models
https://fengyao.notion.site/off-policy-rl; masking, IcePop (Ling team, 2025).
"""

import jax
import jax.numpy as jnp

from posttrain.objectives import kl


def correction(
    old_logprobs: jax.Array, sampler_logprobs: jax.Array,
    loss_mask: jax.Array, *, kind: str, cap: float, floor: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Factors of the tokens' policy terms, without a gradient.

  Args:
    old_logprobs, sampler_logprobs: [R, T] float32, of the trainer before the
      updates on these rollouts, and of the policy that drew.
    loss_mask: [R, T] bool.
    kind: "truncate": min(ratio, cap); "mask": the ratio where it lies within
      [floor, cap], and 0 elsewhere.

  Returns:
    [R, T] float32, and sums over the tokens in the loss: "importance/ratio",
    and "importance/clipped", those that were cut off or left out; maxima
    "importance_max" and "importance_inverse_max".
  """
  difference = jax.lax.stop_gradient(jnp.where(
      loss_mask, old_logprobs - sampler_logprobs, 0))
  ratio = jnp.exp(jnp.clip(difference, -kl.MAX_LOG_RATIO, kl.MAX_LOG_RATIO))
  over = ratio > cap
  if kind == "truncate":
    factors = jnp.minimum(ratio, cap)
  else:
    over |= ratio < floor
    factors = jnp.where(over, 0.0, ratio)
  masked = lambda x: jnp.where(loss_mask, x, 0)
  return factors, {
      "importance/ratio": jnp.sum(masked(ratio)),
      "importance/clipped": jnp.sum(masked(over), dtype=jnp.float32),
      "importance_max": jnp.max(masked(ratio)),
      "importance_inverse_max": jnp.max(masked(1 / ratio))}
