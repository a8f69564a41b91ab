"""Blockwise causal attention (FlashAttention), in plain JAX.

No array of all queries and all keys is made. The softmax is summed up over
blocks of keys (arXiv 2205.14135, section 3.1), and the backward pass computes
the probabilities again from their normaliser (arXiv 2307.08691, section 3.1).
Pairs of blocks that cannot see each other, because the keys are later, of other
segments, or out of the window, are not visited.

Unlike `attention.attend` this takes no mask. It relies on the order of packed
rows: within a segment later columns hold later positions, and a prefix comes
before the segments that read it.

  B: batch  T: length  K: kv heads  G: query heads per kv head  H: head_dim
  N: blocks of C tokens  R: the rows of one kv head in a block, G * C
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from posttrain.model.attention import MASKED, same_segment, soft_cap
from posttrain.sharding import per_shard

# Name of the arrays that the backward pass reads, for policies of
# `jax.checkpoint`: "dots" saves them, as it would not compute products again.
SAVED = "attention"


class _Static(NamedTuple):
  """Static arguments, hashable for `custom_vjp`; see `attend`."""

  block: int
  scale: float
  softcap: float


class Blocks(NamedTuple):
  """Arrays that decide which queries read which keys.

  Attributes:
    positions, segment_ids, prefix_ids: [N, B, C] int32; the last may be None.
    window: scalar int32, see `attend`.
    pairs: [P, 2] int32, all pairs of a block of queries and an earlier or the
      same block of keys; those that are visited come first.
    visits: scalar int32, how many are visited.
  """

  positions: jax.Array
  segment_ids: jax.Array
  prefix_ids: jax.Array | None
  window: jax.Array
  pairs: jax.Array
  visits: jax.Array


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array,
    segment_ids: jax.Array, window: jax.Array,
    prefix_ids: jax.Array | None = None, *, block: int, scale: float,
    softcap: float = 0.0,
) -> jax.Array:
  """Computes causal attention within segments, on each device's own part.

  Args:
    q: [B, T, K, G, H]. k, v: [B, T, K, H], split over devices by rows and
      heads alone.
    positions, segment_ids: [B, T] int32; segment 0 is padding.
    window: scalar int32, how many keys back a query sees, its own included.
    prefix_ids: [B, T] int32, see `attention.same_segment`; None: no prefixes.
    block: tokens of one (C). T need not be a multiple.
    scale: of the scores.
    softcap: scores become cap * tanh(score / cap); 0: they do not.

  Returns:
    [B, T, K, G, H] in q's dtype; zeros on padding.
  """
  static = _Static(min(block, q.shape[1]), scale, softcap)
  return per_shard(
      functools.partial(_attend, static), q, k, v, positions, segment_ids,
      window, *(() if prefix_ids is None else (prefix_ids,)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, *seen):
  """Computes attention on one device; `seen` are the arguments of `visited`."""
  return _forward(static, q, k, v, *seen)[0]


def _forward(static, q, k, v, *seen):
  """Computes the output, and the residuals that the backward pass reads."""
  blocks = visited(*seen, block=static.block)
  out, normaliser = _out(static, q, k, v, blocks)
  out, normaliser = (checkpoint_name(x, SAVED) for x in (
      _join(out, q), normaliser))
  return out, (q, k, v, blocks, out, normaliser)


def _split(static: _Static, x: jax.Array) -> jax.Array:
  """Cuts [B, T, K, G, H], or [B, T, K, H], into blocks [N, B, K, R, H].

  The queries of one kv head lie together, G * C rows of a single product.
  """
  x = x[:, :, :, None] if x.ndim == 4 else x
  x = _cut(static.block, x)  # [N, B, C, K, G, H]
  return x.transpose(0, 1, 3, 4, 2, 5).reshape(
      *x.shape[:2], x.shape[3], -1, x.shape[-1])


def _cut(block: int, x: jax.Array) -> jax.Array:
  """Cuts [B, T, ...] into blocks [N, B, C, ...], zeros behind the end."""
  rest = -x.shape[1] % block
  x = jnp.pad(x, ((0, 0), (0, rest)) + ((0, 0),) * (x.ndim - 2))
  return jnp.swapaxes(
      x.reshape(x.shape[0], -1, block, *x.shape[2:]), 0, 1)


def _join(x: jax.Array, like: jax.Array) -> jax.Array:
  """Joins blocks [N, B, K, R, H] to the shape and dtype of `like`.

  That is [B, T, K, G, H], or [B, T, K, H].
  """
  n, rows, heads, _, width = x.shape
  groups = like.shape[3] if like.ndim == 5 else 1
  x = x.reshape(n, rows, heads, groups, -1, width).transpose(1, 0, 4, 2, 3, 5)
  x = x.reshape(rows, -1, heads, groups, width)[:, :like.shape[1]]
  return x.reshape(like.shape).astype(like.dtype)


def visited(
    positions: jax.Array, segment_ids: jax.Array, window: jax.Array,
    prefix_ids: jax.Array | None = None, *, block: int,
) -> Blocks:
  """Finds the pairs of blocks that may see each other.

  They come in the order of the queries. The list of pairs has one length
  whatever is visited, as shapes are static; the loop runs over a part of it.

  Args:
    positions, segment_ids, window, prefix_ids, block: see `attend`.
  """
  cut = lambda x: _cut(block, jnp.asarray(x))
  positions, segment_ids = cut(positions), cut(segment_ids)
  prefix_ids = None if prefix_ids is None else cut(prefix_ids)
  pairs = np.array([
      (i, j) for i in range(len(positions)) for j in range(i + 1)], np.int32)
  real = segment_ids > 0
  most = np.iinfo(np.int32).max
  # A block is described by the least and the largest id and position in it.
  least = lambda x: jnp.where(real, x, most).min(-1)  # [N, B]
  largest = lambda x: jnp.where(real, x, -1).max(-1)
  queries, keys = pairs.T

  def overlap(ids):
    return (least(ids)[queries] <= largest(segment_ids)[keys]) & (
        least(segment_ids)[keys] <= largest(ids)[queries])

  # Intervals of ids may overlap where no id is shared: then a pair is visited
  # in vain, and its mask is false. A pair that matters is never left out.
  meet = overlap(segment_ids)
  if prefix_ids is not None:
    meet |= overlap(prefix_ids)
  # The nearest that a query of the one and a key of the other can be.
  near = least(positions)[queries] - largest(positions)[keys] < window
  # All rows go through one loop, so a pair is visited if any row needs it.
  visible = (meet & near).any(-1)
  order = jnp.argsort(~visible, stable=True)
  return Blocks(
      positions, segment_ids, prefix_ids, window, jnp.asarray(pairs)[order],
      jnp.minimum(visible.sum(dtype=jnp.int32), len(pairs)))


def _mask(blocks: Blocks, i: jax.Array, j: jax.Array) -> jax.Array:
  """Makes the mask [B, C, C] bool of queries of block i, keys of block j."""
  segment, position = blocks.segment_ids[i], blocks.positions[i]
  distance = position[:, :, None] - blocks.positions[j][:, None]
  same = same_segment(
      segment[:, :, None], blocks.segment_ids[j][:, None],
      None if blocks.prefix_ids is None else blocks.prefix_ids[i][:, :, None])
  return same & (segment > 0)[:, :, None] & (distance >= 0) & (
      distance < blocks.window)


def _over_pairs(blocks: Blocks, step, carry):
  """Runs `carry = step(i, j, *carry)` over the pairs that are visited."""
  def body(number, carry):
    i, j = blocks.pairs[number]
    return step(i, j, *carry)

  return jax.lax.fori_loop(0, blocks.visits, body, carry)


def _masked(mask: jax.Array, x: jax.Array, value: float) -> jax.Array:
  """Replaces x [B, K, R, C] by `value` where the mask [B, C, C] is false."""
  heads = x.reshape(*x.shape[:2], -1, *mask.shape[1:])
  return jnp.where(mask[:, None, None], heads, value).reshape(x.shape)


_dot = functools.partial(
    jnp.einsum, preferred_element_type=jnp.float32)


def _out(static, q, k, v, blocks):
  """Computes the blocks of the output, and the softmax's normaliser.

  Returns:
    [N, B, K, R, H] float32; and log sum exp of the scores, [N, B, K, R].
  """
  q, k, v = (_split(static, x) for x in (q * static.scale, k, v))
  # Transposed once for all pairs: each product would else make its own copy.
  k_t = jnp.swapaxes(k, -1, -2)

  def step(i, j, out, peak, total):
    scores = soft_cap(_dot("bkrh,bkhc->bkrc", q[i], k_t[j]), static.softcap)
    scores = _masked(_mask(blocks, i, j), scores, MASKED)
    # Online softmax: sums so far were made with a lower peak, so they are
    # scaled by exp(old peak - new peak) before this block is added. While a
    # query has seen masked keys only, its weights are 1 and its sums wrong; its
    # first real score then scales them by exp(MASKED - peak), which is 0.
    higher = jnp.maximum(peak[i], scores.max(-1))
    kept = jnp.exp(peak[i] - higher)
    weights = jnp.exp(scores - higher[..., None])
    added = _dot("bkrc,bkch->bkrh", weights.astype(v.dtype), v[j])
    return (out.at[i].set(out[i] * kept[..., None] + added),
            peak.at[i].set(higher),
            total.at[i].set(total[i] * kept + weights.sum(-1)))

  rows = q.shape[:-1]
  out, peak, total = _over_pairs(blocks, step, (
      jnp.zeros(q.shape, jnp.float32), jnp.full(rows, MASKED, jnp.float32),
      jnp.zeros(rows, jnp.float32)))
  # A real token sees itself, so its total is that of real scores. Padding sees
  # nothing, and its sums are of masked scores alone.
  real = blocks.segment_ids > 0  # [N, B, C]
  real = jnp.tile(real[:, :, None], (1, 1, 1, rows[-1] // static.block))
  total = jnp.where(real, total, 1)
  return jnp.where(real[..., None], out / total[..., None], 0), (
      peak + jnp.log(total))


def _backward(static, residuals, cotangent):
  """Computes the gradients of q, k and v (arXiv 2307.08691, algorithm 2)."""
  q, k, v, blocks, out, normaliser = residuals
  shape_q, shape_k, dtype = q, k, q.dtype
  # Rows of output * cotangent, summed: the softmax's own term of the gradient.
  delta = _split(static, (
      cotangent.astype(jnp.float32) * out.astype(jnp.float32)
  ).sum(-1, keepdims=True))[..., 0]  # [N, B, K, R]
  cotangent, q, k, v = (
      _split(static, x) for x in (cotangent, q * static.scale, k, v))
  # All below is [keys, queries], so that none of the five products has to
  # transpose its operand.
  transpose = lambda x: jnp.swapaxes(x, -1, -2)
  cotangent_t, q_t, k_t = map(transpose, (cotangent, q, k))

  def step(i, j, dq, dk, dv):
    scores = soft_cap(_dot("bkch,bkhr->bkcr", k[j], q_t[i]), static.softcap)
    weights = jnp.exp(scores - normaliser[i][:, :, None])
    weights = _masked_transposed(_mask(blocks, i, j), weights)
    d_weights = _dot("bkch,bkhr->bkcr", v[j], cotangent_t[i])
    d_scores = weights * (d_weights - delta[i][:, :, None])
    if static.softcap:  # Derivative of cap * tanh(x / cap), by its value.
      d_scores *= 1 - jnp.square(scores / static.softcap)
    d_scores = d_scores.astype(dtype)
    return (
        dq.at[i].add(_dot("bkhc,bkcr->bkhr", k_t[j], d_scores)),
        dk.at[j].add(_dot("bkcr,bkrh->bkch", d_scores, q[i])),
        dv.at[j].add(_dot(
            "bkcr,bkrh->bkch", weights.astype(dtype), cotangent[i])))

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  dq, dk, dv = _over_pairs(
      blocks, step, (zeros(q_t), zeros(k), zeros(v)))
  return (_join(transpose(dq) * static.scale, shape_q), _join(dk, shape_k),
          _join(dv, shape_k), None, None, None,
          *(() if blocks.prefix_ids is None else (None,)))


def _masked_transposed(mask: jax.Array, x: jax.Array) -> jax.Array:
  """Zeroes x [B, K, C, R] (keys, queries) where the mask is false.

  The mask is [B, C, C], of queries and keys.
  """
  heads = x.reshape(*x.shape[:3], -1, mask.shape[1])
  mask = jnp.swapaxes(mask, 1, 2)[:, None, :, None]
  return jnp.where(mask, heads, 0).reshape(x.shape)


_attend.defvjp(_forward, _backward)
