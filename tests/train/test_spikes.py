"""Oracle: the rule in plain Python, one loss after the other."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.train import spikes


def by_hand(losses, mads, window):
  """Which are spikes; those are not remembered."""
  kept, found = [], []
  for loss in losses:
    last = kept[-window:]
    spike = False
    if len(last) == window:
      median = statistics.median(last)
      deviation = statistics.median(abs(x - median) for x in last)
      spike = deviation > 0 and loss - median > mads * deviation
    found.append(spike)
    if not spike:
      kept.append(loss)
  return found


@jax.jit
def take(losses, loss):
  rule = spikes.Rule(mads=2.0, window=5)
  spike = rule.is_spike(losses, loss)
  return jnp.where(spike, losses, rule.add(losses, loss)), spike


# Eighths: medians and deviations are exact in float32.
@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 80).map(lambda n: n / 8), max_size=30))
def test_spikes_are_those_of_the_rule(losses):
  state, found = spikes.Rule(mads=2.0, window=5).start(), []
  for loss in losses:
    state, spike = take(state, jnp.float32(loss))
    found.append(bool(spike))
  assert found == by_hand(losses, 2.0, 5)


def test_a_loss_that_never_moves_has_no_spikes():
  """Its deviation is zero, and every rise would be one."""
  state = jnp.ones(5)
  _, spike = take(state, jnp.float32(100))
  assert not spike


def test_a_level_that_falls_is_followed():
  state = spikes.Rule(mads=2.0, window=5).start()
  for loss in np.linspace(9, 1, 40, dtype=np.float32):
    state, spike = take(state, loss)
    assert not spike
  _, spike = take(state, jnp.float32(9))
  assert spike
