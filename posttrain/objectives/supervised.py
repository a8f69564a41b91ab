"""Supervised cross-entropy: the mean over all target tokens of a batch.

  R: rows    T: length
"""

import jax.numpy as jnp

from posttrain.objectives.columns import Columns, Sums, Term, Terms, needs
from posttrain.objectives.masked import masked_sum


@needs("entropy")
def cross_entropy(columns: Columns) -> tuple[Terms, Sums]:
  """Negative log-likelihood of the target tokens, in nats."""
  logprobs, mask = columns["logprobs"], columns["loss_mask"]
  tokens = masked_sum(jnp.ones_like(logprobs), mask)
  return {"cross_entropy": Term(-masked_sum(logprobs, mask), tokens)}, {
      "entropy": masked_sum(columns["entropy"], mask)}
