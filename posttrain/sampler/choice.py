"""Chooses the next token of each row: truncation, Gumbel noise, logprob.

A token's random bits depend on (seed, stage, step, prompt_id, sample_id,
position) and on nothing else, so that a row draws the same token whatever the
batch around it, its slot, or the number of hosts. Each row has a key
(`row_keys`), and each position folds into it (`fold_position`).

  B: rows    V: vocabulary (the true one, without padding)
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp

# Stands for minus infinity: differences and sums of it stay finite.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How logits become a distribution; static, so a change compiles anew.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token, and the
      truncations, which cannot change it, are then left out.
    top_k: keep the k likeliest tokens; 0 for all.
    top_p: keep the likeliest tokens up to this mass; 1 for all.
    min_p: keep tokens at least this share as likely as the likeliest; 0 for
      all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self):
    if self.temperature < 0:
      raise ValueError(
          f"The temperature is {self.temperature} and must be 0 (greedy) or "
          "more. Change rollout.temperature.")
    if self.top_k < 0:
      raise ValueError(
          f"top_k is {self.top_k} and must be 0 (off) or more. Change "
          "rollout.top_k.")
    if not 0 < self.top_p <= 1:
      raise ValueError(
          f"top_p is {self.top_p} and must lie in (0, 1], 1 being off. Change "
          "rollout.top_p.")
    if not 0 <= self.min_p <= 1:
      raise ValueError(
          f"min_p is {self.min_p} and must lie in [0, 1], 0 being off. Change "
          "rollout.min_p.")


def row_keys(
    seed: int, stage: str, step: int | jax.Array, prompt_id: jax.Array,
    sample_id: jax.Array,
) -> jax.Array:
  """The key of each row, as key data.

  Args:
    seed: of the run, or of a request.
    stage: name of the stage; hashed, so that stages draw different noise.
    step: optimizer step (0 outside training).
    prompt_id, sample_id: [B] int32; which completion of which prompt it is.

  Returns:
    [B, 2] uint32.
  """
  key = jax.random.key(seed, impl="threefry2x32")
  key = jax.random.fold_in(key, zlib.crc32(stage.encode()))
  key = jax.random.fold_in(key, step)
  fold = jax.vmap(lambda prompt, sample: jax.random.fold_in(
      jax.random.fold_in(key, prompt), sample))
  return jax.random.key_data(fold(prompt_id, sample_id))


def fold_position(keys: jax.Array, positions: jax.Array) -> jax.Array:
  """[B, 2] uint32 keys and [B] int32 positions -> the keys of one draw."""
  keys = jax.random.wrap_key_data(keys, impl="threefry2x32")
  return jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, positions))


def process(logits: jax.Array, params: SamplingParams) -> jax.Array:
  """Tempers and truncates; what is left is sampled from, renormalised.

  In this order, each on what the one before it left: temperature, top-k,
  top-p, min-p. Tokens exactly as likely as the last one kept are kept too, so
  the result does not depend on how a sort orders ties.

  Args:
    logits: [B, V] float32, not split over V.
    params: a temperature above 0.

  Returns:
    [B, V] float32, `MASKED` where a token cannot be sampled.
  """
  logits = logits / params.temperature
  if 0 < params.top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, params.top_k)[0][:, -1:]
    logits = jnp.where(logits < least, MASKED, logits)
  if params.top_p < 1:
    ranked = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(ranked, axis=-1)
    # A token stays while those before it have not reached the mass: the
    # first always does.
    before = jnp.cumsum(probs, axis=-1) - probs
    least = jnp.min(
        jnp.where(before < params.top_p, ranked, jnp.inf), axis=-1,
        keepdims=True)
    logits = jnp.where(logits < least, MASKED, logits)
  if params.min_p > 0:
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(params.min_p)
    logits = jnp.where(logits < least, MASKED, logits)
  return logits


def choose(
    logits: jax.Array, banned: jax.Array | None, keys: jax.Array,
    params: SamplingParams, given: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws one token a row by the Gumbel-max trick.

  Args:
    logits: [B, V] float32, not split over V.
    banned: [B, V] bool, tokens that may not be drawn; None for none. They are
      taken out first, so a truncation looks at the others only.
    keys: [B, 2] uint32, of this draw (`fold_position`).
    params: temperature and truncation.
    given: [B] int32, what is taken in place of the draw where it is not
      negative: a replay, or a test's script.

  Returns:
    tokens: [B] int32; at temperature 0, and on ties, the lowest likeliest id.
    logprobs: [B] float32, under the distribution that was really sampled from
      (temperature, truncation and bans included); at temperature 0, of the
      distribution at temperature 1 without the banned tokens.
  """
  if banned is not None:
    logits = jnp.where(banned, MASKED, logits)
  if params.temperature == 0:
    tokens = jnp.argmax(logits, axis=-1)
  else:
    logits = process(logits, params)
    keys = jax.random.wrap_key_data(keys, impl="threefry2x32")
    noise = jax.vmap(
        lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    tokens = jnp.argmax(logits + noise, axis=-1)
  if given is not None:
    tokens = jnp.where(given >= 0, given, tokens)
  # A contraction and not a gather: its layout is never ambiguous.
  chosen = jnp.arange(logits.shape[-1]) == tokens[:, None]
  picked = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
  return tokens, picked - jax.nn.logsumexp(logits, axis=-1)
