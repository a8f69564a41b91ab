"""Sums and means over a completion, given back to each of its tokens.

A sequence-level ratio (GSPO) needs them, and a mask of whole completions. All
tokens of a completion lie together in one row, packed or after a prompt that
its group shares, so a microbatch never holds a part of one.

  R: rows    T: length
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def sum_over_completion(
    x: jax.Array, columns: Mapping[str, jax.Array]) -> jax.Array:
  """Sums [R, T] `x` over the tokens of a completion that are in the loss.

  Returns:
    [R, T], the same number at every token of the completion, its prompt and
    forced tokens too.
  """
  ids = columns["completion_ids"]
  change = ids[:, 1:] != ids[:, :-1]
  first = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
  last = jnp.pad(change, ((0, 0), (0, 1)), constant_values=True)
  running = _running_sum(jnp.where(columns["loss_mask"], x, 0), first)
  # The total stands at the last token; summed from there it is that of all.
  return _running_sum(jnp.where(last, running, 0), last, reverse=True)


def mean_over_completion(
    x: jax.Array, columns: Mapping[str, jax.Array]) -> jax.Array:
  """Computes the mean of `sum_over_completion`; 0 without a token."""
  count = sum_over_completion(jnp.ones_like(x), columns)
  return sum_over_completion(x, columns) / jnp.maximum(count, 1)


def _running_sum(
    x: jax.Array, starts: jax.Array, reverse: bool = False) -> jax.Array:
  """Cumulative sum along rows that begins anew at each start.

  Not a difference of two cumulative sums of the row, which would leave the
  rounding of all completions before it in each.
  """
  def add(a, b):
    return a[0] | b[0], jnp.where(b[0], b[1], a[1] + b[1])

  return jax.lax.associative_scan(
      add, (starts, x), reverse=reverse, axis=1)[1]
