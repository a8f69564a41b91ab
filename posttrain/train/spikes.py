"""Losses that jump: found within the compiled update, from the last losses.

A loss is a spike if it lies above the median of the last `window` losses by
more than `mads` times their median absolute deviation (of Gaussian noise, 0.67
standard deviations). Losses of updates that were not made are not among them.
Until there are `window` losses nothing is a spike, and nothing is while their
deviation is zero. The losses are a part of the state, so that a resumed run
decides as an uninterrupted one, and no host is asked.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rule:
  """When a loss is a spike.

  Attributes:
    mads: deviations above the median.
    window: losses that both are of.
  """

  mads: float
  window: int

  def start(self) -> jax.Array:
    """[window] float32, NaN where there is no loss yet."""
    return jnp.full(self.window, jnp.nan, jnp.float32)

  def is_spike(self, losses: jax.Array, loss: jax.Array) -> jax.Array:
    """Whether `loss` (scalar) is one after `losses` [window]; a bool."""
    median = jnp.median(losses)  # NaN as long as one is missing.
    deviation = jnp.median(jnp.abs(losses - median))
    return (deviation > 0) & (loss - median > self.mads * deviation)

  def add(self, losses: jax.Array, loss: jax.Array) -> jax.Array:
    """`losses` with the newest in place of the oldest."""
    return jnp.append(losses[1:], loss)
