"""Logprobs of the tokens that occurred: the one definition, for every loss.

The [R, T, V] float32 logits of a large vocabulary would be the largest array
of a training step by far. Here they exist for `chunk` positions at once, and
the backward pass computes them again. The head is gathered once for all
chunks: each would gather it anew, forward and backward.

Where the mesh splits the length (context parallelism), each part of a row goes
through the head like a row of its own; only the shift by one, from the token
that is predicted to the position that predicts it, looks across.

  R: rows    T: length    C: chunk    D: embed    V: vocabulary, padded
"""

import functools

import jax
import jax.numpy as jnp

from posttrain import sharding
from posttrain.model import moe
from posttrain.model.head import Head
from posttrain.model.transformer import Transformer


def token_logprobs(
    model: Transformer, batch: dict[str, jax.Array], *, chunk: int,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array, moe.Traffic | None]:
  """Runs the model on [R, T] arrays.

  Args:
    batch: `tokens`, `positions`, `segment_ids` and, if prompts are shared,
      `prefix_ids`: [R, T], laid out alike.
    chunk, temperature: see `of_hidden`.

  Returns:
    Logprobs and entropies [R, T], see `of_hidden`, and what the routers did.
  """
  tokens = batch["tokens"]
  hidden, traffic = model.routed(
      tokens, batch["positions"], batch["segment_ids"],
      batch.get("prefix_ids"))
  return *of_hidden(
      model.gathered_head(), hidden, tokens, chunk=chunk,
      temperature=temperature), traffic


def of_hidden(
    head: Head, hidden: jax.Array, tokens: jax.Array, *,
    temperature: float = 1.0, chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
  """Computes each token's logprob given the ones before it in its row.

  `hidden[:, t - 1]` predicts `tokens[:, t]`. The first token of a row has no
  predictor: its logprob and entropy are 0. The first token of a later segment
  of a packed row is given a meaningless value; no loss mask may hold it.

  Args:
    head: the vocabulary may be split over devices.
    hidden: [R, T, D].
    tokens: [R, T] int32.
    temperature: divides the logits, as in the sampler; above 0.
    chunk: positions whose logits exist at once. T need not be a multiple.

  Returns:
    logprobs: [R, T] float32.
    entropy: [R, T] float32, nats, of the distribution that the token was
      drawn from; a measure, without a gradient.

  Raises:
    ValueError: the temperature is not above 0, or chunk is not above 0.
  """
  if temperature <= 0:
    raise ValueError(
        f"The temperature is {temperature}, and logprobs need one above 0. "
        "Change rollout.temperature.")
  if chunk <= 0:
    raise ValueError(
        f"The chunk is {chunk} and must be 1 or more. Change "
        "compute.loss_chunk.")
  compute = functools.partial(
      _next_logprobs, head, chunk=chunk, temperature=temperature)
  if not sharding.splits_length(tokens):
    # Position t is paired with the token that it predicts.
    found = compute(hidden, jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))))
    return jax.tree.map(lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0))), found)

  def shifted(x, before, after):
    """Cut at one end and filled up at the other; these arrays are small."""
    x = sharding.whole_length(x)[:, after:x.shape[1] - before]
    return sharding.shard(
        jnp.pad(x, ((0, 0), (before, after))), "batch", "length")

  found = compute(
      sharding.length_to_rows(hidden),
      sharding.length_to_rows(shifted(tokens, 0, 1)))
  return jax.tree.map(
      lambda x: shifted(sharding.rows_to_length(x), 1, 0), found)


def _next_logprobs(
    head: Head, hidden: jax.Array, targets: jax.Array, *, temperature: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """Computes logprobs and entropies; `hidden[:, t]` predicts `targets[:, t]`.

  No position looks at another, so that a part of a row may stand for itself.
  """
  length = targets.shape[1]
  chunk = min(chunk, length)
  num_chunks = -(-length // chunk)
  padding = num_chunks * chunk - length
  targets = jnp.pad(targets, ((0, 0), (0, padding)))
  hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))

  def split(x):  # [R, T, ...] -> [chunks, R, C, ...]
    x = x.reshape(x.shape[0], num_chunks, chunk, *x.shape[2:])
    return jnp.swapaxes(x, 0, 1)

  def join(x):  # [chunks, R, C] -> [R, T]
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0], num_chunks * chunk)[:, :length]

  def body(_, xs):
    return None, _chunk_logprobs(head(xs[0]) / temperature, xs[1])

  # Within a scan nothing else could be merged with the recomputation.
  body = jax.checkpoint(body, prevent_cse=False)
  _, (logprobs, entropies) = jax.lax.scan(
      body, None, (split(hidden), split(targets)))
  return join(logprobs), join(entropies)


def _chunk_logprobs(
    logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """[R, C, V], [R, C] -> logprobs and entropies, [R, C]."""
  normaliser = jax.nn.logsumexp(logits, axis=-1)
  # A contraction, not a gather: V may be split over devices.
  chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
  logprobs = jnp.sum(jnp.where(chosen, logits, 0), axis=-1) - normaliser
  # Not normaliser - sum(p * logits): where one token has nearly all the mass
  # that is the small difference of two large numbers.
  logits = jax.lax.stop_gradient(logits - normaliser[..., None])
  return logprobs, -jnp.sum(jnp.exp(logits) * logits, axis=-1)
