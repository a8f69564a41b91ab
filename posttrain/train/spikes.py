"""Loss spikes: found within the compiled update, from the last losses.

A loss is a spike if it is above the median of the last `window` losses by
more than `mads` times their median absolute deviation (for Gaussian noise, 0.67
standard deviations). The losses of skipped updates do not count. As long as
there are fewer than `window` losses, or their deviation is zero, nothing is a
spike. The losses are a part of the train state, so that a resumed run decides
like an uninterrupted one, and the device need not wait for a host.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rule:
  """Rule for spikes: the number of deviations and of losses.

  Attributes:
    mads: median absolute deviations above the median.
    window: number of losses that median and deviation are computed from.
  """

  mads: float
  window: int

  def start(self) -> jax.Array:
    """Makes the losses at the start: [window] float32, all NaN."""
    return jnp.full(self.window, jnp.nan, jnp.float32)

  def is_spike(self, losses: jax.Array, loss: jax.Array) -> jax.Array:
    """Tests if `loss` (scalar) is a spike after `losses` [window]."""
    # NaN as long as a loss is missing, and comparisons with it are false.
    median = jnp.median(losses)
    deviation = jnp.median(jnp.abs(losses - median))
    return (deviation > 0) & (loss - median > self.mads * deviation)

  def add(self, losses: jax.Array, loss: jax.Array) -> jax.Array:
    """Replaces the oldest of `losses` by the newest."""
    return jnp.append(losses[1:], loss)
