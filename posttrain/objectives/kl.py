"""Estimators of KL(policy || reference) from the tokens that were sampled.

With d = log reference - log policy, per token:

  k1 = -d             unbiased; as a loss its expected gradient is zero
  k2 = d^2 / 2        biased in value; as a loss the true gradient
  k3 = e^d - d - 1    unbiased, never negative; as a loss the gradient of the
                      forward KL(reference || policy)

The gradients are those on tokens of the current policy. Taken off the reward
instead (gradient stopped), k1 gives the true gradient and k3 does not.

Reference: http://joschu.net/blog/kl-approx.html.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from posttrain.objectives.columns import Columns, Sums, Term, Terms, needs
from posttrain.objectives.masked import masked_sum

# e^20 is far outside anything a loss can use, and far from overflowing.
MAX_LOG_RATIO = 20.0


def k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  return logprobs - ref_logprobs


def k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  return jnp.square(ref_logprobs - logprobs) / 2


def k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  d = jnp.clip(ref_logprobs - logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
  return jnp.expm1(d) - d


ESTIMATORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "k1": k1, "k2": k2, "k3": k3}


@needs("ref_logprobs", "token_weights", "denominator_shares")
def kl_loss(
    columns: Columns, *, coefficient: float, estimator: str,
) -> tuple[Terms, Sums]:
  """Estimates the KL to the reference: the term and the sum "kl".

  Args:
    columns: tokens are weighed as those of the policy's term are.
    coefficient: weight of the term.
    estimator: "k2" or "k3"; the gradient of k1 is zero in expectation.
  """
  mask = columns["loss_mask"]
  divergence = ESTIMATORS[estimator](
      jnp.where(mask, columns["logprobs"], 0),
      jnp.where(mask, columns["ref_logprobs"], 0))
  return {"kl": Term(
      masked_sum(divergence * columns["token_weights"], mask),
      masked_sum(columns["denominator_shares"], mask), coefficient)}, {
          "kl": jax.lax.stop_gradient(masked_sum(divergence, mask))}
