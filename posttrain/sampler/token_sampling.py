"""Token sampling: temperature, truncation, Gumbel noise, and logprobs.

A token's random bits depend on (seed, stage, step, prompt_id, sample_id,
position) and on nothing else. A row therefore draws the same token whatever the
batch around it, its row, or the number of hosts. Each row has a key
(`row_keys`), and each position folds into it (`fold_position`).

The position counts the row's draws. A continuation of a row has its ids, and
counts on from its draws, so that no noise comes twice. A fork has a sample id
of its own (`fork_id`).

Temperature and truncation are data: rows of one batch may differ in them, and
no change compiles anything. A step does the work that some row asks for: it
sorts if one is cut by rank or mass, and draws noise if one is not greedy.

  B: rows    V: vocabulary (the true one, without padding)
"""

import dataclasses
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Stands for minus infinity: differences and sums of it stay finite.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """Sampling parameters, of one request or of all rows of a batch.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token (greedy).
      The truncations cannot change that token, and are then left out.
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
    for name, valid, needed in (
        ("temperature", self.temperature >= 0, "be 0 (greedy) or more"),
        ("top_k", self.top_k >= 0, "be 0 (off) or more"),
        ("top_p", 0 < self.top_p <= 1, "lie in (0, 1], 1 being off"),
        ("min_p", 0 <= self.min_p <= 1, "lie in [0, 1], 0 being off")):
      if not valid:
        raise ValueError(f"{name} is {getattr(self, name)} and must {needed}. "
                         f"Change rollout.{name}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
  """`SamplingParams` of each row: [B] float32, `top_k` int32."""

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array

  @classmethod
  def of(cls, params: Sequence[SamplingParams]) -> "RowParams":
    """Makes NumPy columns of the parameters of each row."""
    def column(name: str, dtype: type) -> Any:  # On the mesh later.
      return np.array([getattr(p, name) for p in params], dtype)

    return cls(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32), top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32))


def stage_number(stage: str) -> int:
  """Returns the 32-bit number that stands for a stage's name in a key."""
  return zlib.crc32(stage.encode())


def row_keys(
    seed: int | jax.Array, stage: str | jax.Array, step: int | jax.Array,
    prompt_id: jax.Array, sample_id: jax.Array,
) -> jax.Array:
  """Makes the key of each row, as key data.

  Args:
    seed: of the run, or of each request ([B] uint32).
    stage: name of the stage; hashed, so that stages draw different noise. Or
      `stage_number` of each row's, [B] uint32.
    step: optimizer step (0 outside training), or [B] int32.
    prompt_id, sample_id: [B] int32; which completion of which prompt it is.

  Returns:
    [B, 2] uint32.
  """
  stages = np.uint32(stage_number(stage)) if isinstance(
      stage, str) else stage
  rows = jnp.zeros_like(prompt_id)

  # The implementation is named: another default of JAX would change all draws.
  def key(seed, *ids):
    key = jax.random.key(seed, impl="threefry2x32")
    for part in ids:
      key = jax.random.fold_in(key, part)
    return jax.random.key_data(key)

  parts = (seed, stages, step, prompt_id, sample_id)
  return jax.vmap(key)(*(
      rows.astype(jnp.asarray(x).dtype) + x for x in parts))


def fork_id(sample_id: int, draws: int, branch: int) -> int:
  """Returns the sample id of a fork: a signed 32-bit number.

  It is the CRC-32 of the parent's sample id, the draws that the parent took
  (int64 each) and the branch (int32), in this order, little-endian. A CRC maps
  32 bits in a row one to one, so that no two branches of a parent are equal.

  Raises:
    ValueError: `branch` is no int32.
  """
  if not -2**31 <= branch < 2**31:
    raise ValueError(
        f"branch is {branch} and must lie in -2**31 to 2**31 - 1.")
  code = zlib.crc32(struct.pack("<qqi", sample_id, draws, branch))
  return code - 2**32 * (code >= 2**31)


def fold_position(keys: jax.Array, positions: jax.Array) -> jax.Array:
  """Folds positions [B] int32 into keys [B, 2] uint32: the keys of one draw."""
  keys = jax.random.wrap_key_data(keys, impl="threefry2x32")
  return jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, positions))


def process(
    logits: jax.Array, params: SamplingParams | RowParams,
) -> jax.Array:
  """Applies temperature, top-k, top-p and min-p, in this order.

  Each truncation sees the tokens that the one before it left. Tokens exactly
  as likely as the last one kept are kept too, so the result does not depend on
  how a sort orders ties. The tokens that are left are sampled from,
  renormalised.

  Args:
    logits: [B, V] float32, not split over V.
    params: of all rows, or of each. A row of temperature 0 is left as it is.

  Returns:
    [B, V] float32, `MASKED` where a token cannot be sampled.
  """
  temperature, top_k, top_p, min_p = _columns(params)
  greedy = temperature == 0
  logits = logits / jnp.where(greedy, 1, temperature)
  # A sort of the vocabulary is dear, so it is in a branch that runs only in
  # steps in which some row is cut by rank or mass.
  ranked = ((top_k > 0) | (top_p < 1)) & ~greedy
  logits = jax.lax.cond(
      jnp.any(ranked),
      lambda x: jnp.where(x < _least(x, top_k, top_p, ranked), MASKED, x),
      lambda x: x, logits)
  least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
  return jnp.where(~greedy & (logits < least), MASKED, logits)


def draw(
    logits: jax.Array, banned: jax.Array | None, keys: jax.Array,
    params: SamplingParams | RowParams,
) -> tuple[jax.Array, jax.Array]:
  """Draws one token for each row by the Gumbel-max trick.

  Args:
    logits: [B, V] float32, not split over V.
    banned: [B, V] bool, tokens that may not be drawn; None for none. They are
      masked first, so that truncation counts the others only.
    keys: [B, 2] uint32, of this draw (`fold_position`).
    params: temperature and truncation, of all rows or of each.

  Returns:
    tokens: [B] int32; at temperature 0, and on ties, the lowest likeliest id.
    distribution: [B, V] float32, logprobs of the distribution that was
      sampled from (temperature, truncation and bans included); at temperature
      0, those at temperature 1 without the banned tokens.
  """
  if banned is not None:
    logits = jnp.where(banned, MASKED, logits)
  logits = process(logits, params)
  greedy = _columns(params)[0] == 0

  def perturbed(logits):
    wrapped = jax.random.wrap_key_data(keys, impl="threefry2x32")
    noise = jax.vmap(
        lambda key: jax.random.gumbel(key, logits.shape[-1:]))(wrapped)
    return logits + jnp.where(greedy, 0, noise)

  tokens = jnp.argmax(
      jax.lax.cond(jnp.all(greedy), lambda x: x, perturbed, logits), axis=-1)
  return tokens, logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def logprob_of(distribution: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns the logprobs [B] of tokens [B] in a distribution [B, V]."""
  # A contraction in place of a gather: its layout is never ambiguous.
  chosen = jnp.arange(distribution.shape[-1]) == tokens[:, None]
  return jnp.sum(jnp.where(chosen, distribution, 0), axis=-1)


def _columns(params: SamplingParams | RowParams) -> list[jax.Array]:
  """Returns temperature, top_k, top_p and min_p, [B, 1] each or scalars."""
  fields = (params.temperature, params.top_k, params.top_p, params.min_p)
  return [x[:, None] if x.ndim else x for x in map(jnp.asarray, fields)]


def _least(
    logits: jax.Array, top_k: jax.Array, top_p: jax.Array, rows: jax.Array,
) -> jax.Array:
  """Returns the least logit that top-k, then top-p, leave: [B, 1] float32.

  Rows that are not in `rows` [B, 1] bool get -inf: nothing is cut there.
  """
  size = logits.shape[-1]
  ranked = -jnp.sort(-logits, axis=-1)
  rank = jnp.arange(size)
  # Ties with the last of the k are kept, and count for top-p.
  last = jnp.where((top_k > 0) & (top_k < size), top_k, size) - 1
  least = jnp.min(
      jnp.where(rank <= last, ranked, jnp.inf), axis=-1, keepdims=True)
  ranked = jnp.where(ranked < least, MASKED, ranked)
  probs = jax.nn.softmax(ranked, axis=-1)
  # A token stays while those before it have not reached the mass: the first
  # always does.
  before = jnp.cumsum(probs, axis=-1) - probs
  kept = (ranked >= least) & ((before < top_p) | (top_p >= 1))
  least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(rows, least, -jnp.inf)
