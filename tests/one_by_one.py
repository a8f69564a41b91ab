"""Oracle for what is packed: one completion alone in its row, all logits.

  T: length of the row
"""

import jax
import jax.numpy as jnp
import numpy as np

from posttrain import sharding
from tests.model import build


def row_of(sequence: list[int], length: int) -> np.ndarray:
  """[1, T], the sequence at the start."""
  tokens = np.zeros((1, length), np.int32)
  tokens[0, :len(sequence)] = sequence
  return tokens


def distributions(model, tokens: jax.Array, temperature: float) -> jax.Array:
  """[T, V]; row t is what `tokens[t]` was drawn from (none for the first)."""
  length = tokens.shape[1]
  logits = build.full_logits(
      model, tokens, jnp.arange(length)[None], jnp.ones_like(tokens))
  logits = sharding.shard(logits, None, None, None)[0] / temperature
  logprobs = jax.nn.log_softmax(logits)
  return jnp.concatenate([jnp.zeros_like(logprobs[:1]), logprobs[:-1]])


def logprobs(model, tokens: jax.Array, temperature: float) -> jax.Array:
  """[T]; of `tokens[t]` given those before it, 0 for the first."""
  return distributions(model, tokens, temperature)[
      jnp.arange(tokens.shape[1]), tokens[0]]


jitted = jax.jit(distributions, static_argnames="temperature")
