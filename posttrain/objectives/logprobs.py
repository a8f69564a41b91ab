"""Logprobs of the tokens that occurred, a chunk of the length at a time.

The [B, T, V] float32 logits of a large vocabulary would be the largest array
of a training step by far. Here they exist for `chunk` positions at once, and
the backward pass computes them again.

  B: rows    T: length    C: chunk    D: embed    V: vocabulary, padded
"""

from typing import Protocol

import jax
import jax.numpy as jnp


class Head(Protocol):
  """What a model gives to get from hidden states to logits."""

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[B, C, D] -> [B, C, V] float32; padded ids at a huge negative value."""
    ...


def token_logprobs(
    model: Head, hidden: jax.Array, tokens: jax.Array, *,
    temperature: float = 1.0, chunk: int = 128, entropy: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
  """Logprob of each token given the ones before it in its row.

  `hidden[:, t - 1]` predicts `tokens[:, t]`. The first token of a row has no
  predictor: its logprob and entropy are 0. The first token of a later segment
  of a packed row is given a meaningless value; no loss mask may hold it.

  Args:
    model: its `logits` is the head; the vocabulary may be split over devices.
    hidden: [B, T, D].
    tokens: [B, T] int32.
    temperature: divides the logits, as in the sampler; above 0.
    chunk: positions whose logits exist at once. T need not be a multiple.
    entropy: whether to compute the entropy.

  Returns:
    logprobs: [B, T] float32.
    entropy: [B, T] float32, nats, of the distribution that the token was
      drawn from; a measure, without a gradient. None if not asked for.

  Raises:
    ValueError: the temperature is not above 0, or chunk is not above 0.
  """
  # Position t is paired with the token that it predicts.
  logprobs, entropies = next_logprobs(
      model, hidden, jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))),
      temperature=temperature, chunk=chunk, entropy=entropy)
  beside_its_token = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
  return beside_its_token(logprobs), (
      None if entropies is None else beside_its_token(entropies))


def next_logprobs(
    model: Head, hidden: jax.Array, targets: jax.Array, *,
    temperature: float = 1.0, chunk: int = 128, entropy: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
  """Logprob of the token that each position is to predict.

  Arguments and results as of `token_logprobs`, but that `hidden[:, t]`
  predicts `targets[:, t]`: no position looks at another, so that a part of
  a row may stand for itself.
  """
  if temperature <= 0:
    raise ValueError(
        f"The temperature is {temperature}, and logprobs need one above 0. "
        "Change rollout.temperature.")
  if chunk <= 0:
    raise ValueError(
        f"The chunk is {chunk} and must be 1 or more. Change "
        "compute.loss_chunk.")
  length = targets.shape[1]
  chunk = min(chunk, length)
  num_chunks = -(-length // chunk)
  padding = num_chunks * chunk - length
  targets = jnp.pad(targets, ((0, 0), (0, padding)))
  hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))

  def split(x):  # [B, T, ...] -> [chunks, B, C, ...]
    x = x.reshape(x.shape[0], num_chunks, chunk, *x.shape[2:])
    return jnp.swapaxes(x, 0, 1)

  def join(x):  # [chunks, B, C] -> [B, T]
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0], num_chunks * chunk)[:, :length]

  def body(_, xs):
    logits = model.logits(xs[0]) / temperature
    return None, _chunk_logprobs(logits, xs[1], entropy)

  # Within a scan nothing else could be merged with the recomputation.
  body = jax.checkpoint(body, prevent_cse=False)
  _, (logprobs, entropies) = jax.lax.scan(
      body, None, (split(hidden), split(targets)))
  return join(logprobs), join(entropies) if entropy else None


def _chunk_logprobs(
    logits: jax.Array, targets: jax.Array, entropy: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """[B, C, V], [B, C] -> logprobs and entropies, [B, C]."""
  normaliser = jax.nn.logsumexp(logits, axis=-1)
  # A contraction, not a gather: V may be split over devices.
  chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
  logprobs = jnp.sum(jnp.where(chosen, logits, 0), axis=-1) - normaliser
  if not entropy:
    return logprobs, None
  # Not normaliser - sum(p * logits): where one token has nearly all the mass
  # that is the small difference of two large numbers.
  logits = jax.lax.stop_gradient(logits - normaliser[..., None])
  return logprobs, -jnp.sum(jnp.exp(logits) * logits, axis=-1)
