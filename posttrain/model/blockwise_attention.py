"""Causal attention in blocks: no array of all queries and all keys.

Softmax is summed up over blocks of keys (arXiv 2205.14135), and the backward
pass computes the probabilities again from their normaliser (arXiv 2307.08691).
Pairs of blocks that cannot see each other, because they are later, of other
segments or out of the window, are not visited.

Within a segment, later columns hold later positions, and a prefix comes before
what goes on from it, as packing and prompts have it; other than
`attention.attend` this does not take any mask.

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

# The name that what a backward pass reads goes by in `jax.checkpoint`.
SAVED = "attention"


class _Static(NamedTuple):
  block: int
  scale: float
  softcap: float


class Blocks(NamedTuple):
  """What decides who sees whom; `pairs` [P, 2], of them the first `visits`."""

  positions: jax.Array  # [N, B, C]
  segment_ids: jax.Array  # [N, B, C]
  prefix_ids: jax.Array | None  # [N, B, C]
  window: jax.Array  # Scalar.
  pairs: jax.Array
  visits: jax.Array


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array,
    segment_ids: jax.Array, window: jax.Array,
    prefix_ids: jax.Array | None = None, *, block: int, scale: float,
    softcap: float = 0.0,
) -> jax.Array:
  """Causal attention within equal segment ids, of each device's own part.

  Args:
    q: [B, T, K, G, H]. k, v: [B, T, K, H], split over devices by rows and
      heads alone.
    positions, segment_ids: [B, T] int32; segment 0 is padding.
    window: scalar int32: keys that a query sees, its own included.
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
  return _forward(static, q, k, v, *seen)[0]


def _forward(static, q, k, v, *seen):
  blocks = visited(*seen, block=static.block)
  out, normaliser = _out(static, q, k, v, blocks)
  out, normaliser = (checkpoint_name(x, SAVED) for x in (
      _join(out, q), normaliser))
  return out, (q, k, v, blocks, out, normaliser)


def _split(static: _Static, x: jax.Array) -> jax.Array:
  """[B, T, K, G, H] -> [N, B, K, R, H]; [B, T, K, H] likewise."""
  x = x[:, :, :, None] if x.ndim == 4 else x
  x = _cut(static.block, x)  # [N, B, C, K, G, H]
  return x.transpose(0, 1, 3, 4, 2, 5).reshape(
      *x.shape[:2], x.shape[3], -1, x.shape[-1])


def _cut(block: int, x: jax.Array) -> jax.Array:
  """[B, T, ...] -> [N, B, C, ...], zeros behind the end."""
  rest = -x.shape[1] % block
  x = jnp.pad(x, ((0, 0), (0, rest)) + ((0, 0),) * (x.ndim - 2))
  return jnp.swapaxes(
      x.reshape(x.shape[0], -1, block, *x.shape[2:]), 0, 1)


def _join(x: jax.Array, like: jax.Array) -> jax.Array:
  """[N, B, K, R, H] -> as `like`, [B, T, K, G, H] or [B, T, K, H]."""
  n, rows, heads, _, width = x.shape
  groups = like.shape[3] if like.ndim == 5 else 1
  x = x.reshape(n, rows, heads, groups, -1, width).transpose(1, 0, 4, 2, 3, 5)
  x = x.reshape(rows, -1, heads, groups, width)[:, :like.shape[1]]
  return x.reshape(like.shape).astype(like.dtype)


def visited(
    positions: jax.Array, segment_ids: jax.Array, window: jax.Array,
    prefix_ids: jax.Array | None = None, *, block: int,
) -> Blocks:
  """The pairs that may see each other, in the order of the queries."""
  cut = lambda x: _cut(block, jnp.asarray(x))
  positions, segment_ids = cut(positions), cut(segment_ids)
  prefix_ids = None if prefix_ids is None else cut(prefix_ids)
  pairs = np.array([
      (i, j) for i in range(len(positions)) for j in range(i + 1)], np.int32)
  real = segment_ids > 0
  most = np.iinfo(np.int32).max
  least = lambda x: jnp.where(real, x, most).min(-1)  # [N, B]
  largest = lambda x: jnp.where(real, x, -1).max(-1)
  queries, keys = pairs.T

  def overlap(ids):
    return (least(ids)[queries] <= largest(segment_ids)[keys]) & (
        least(segment_ids)[keys] <= largest(ids)[queries])

  # Of two blocks with several segments this says yes too often, never no.
  meet = overlap(segment_ids)
  if prefix_ids is not None:
    meet |= overlap(prefix_ids)
  near = least(positions)[queries] - largest(positions)[keys] < window
  visible = (meet & near).any(-1)
  order = jnp.argsort(~visible, stable=True)
  return Blocks(
      positions, segment_ids, prefix_ids, window, jnp.asarray(pairs)[order],
      jnp.minimum(visible.sum(dtype=jnp.int32), len(pairs)))


def _mask(blocks: Blocks, i: jax.Array, j: jax.Array) -> jax.Array:
  """[B, C, C] bool: queries of block i, keys of block j."""
  segment, position = blocks.segment_ids[i], blocks.positions[i]
  distance = position[:, :, None] - blocks.positions[j][:, None]
  same = same_segment(
      segment[:, :, None], blocks.segment_ids[j][:, None],
      None if blocks.prefix_ids is None else blocks.prefix_ids[i][:, :, None])
  return same & (segment > 0)[:, :, None] & (distance >= 0) & (
      distance < blocks.window)


def _over_pairs(blocks: Blocks, step, carry):
  """Runs `step(i, j, *carry)` over the pairs that are visited."""
  def body(number, carry):
    i, j = blocks.pairs[number]
    return step(i, j, *carry)

  return jax.lax.fori_loop(0, blocks.visits, body, carry)


def _masked(mask: jax.Array, x: jax.Array, value: float) -> jax.Array:
  """[B, K, R, C], of the mask [B, C, C] of every head; or as it lies there."""
  heads = x.reshape(*x.shape[:2], -1, *mask.shape[1:])
  return jnp.where(mask[:, None, None], heads, value).reshape(x.shape)


_dot = functools.partial(
    jnp.einsum, preferred_element_type=jnp.float32)


def _out(static, q, k, v, blocks):
  """[N, B, K, R, H] float32 and the logarithm of the sums, [N, B, K, R]."""
  q, k, v = (_split(static, x) for x in (q * static.scale, k, v))
  turned = jnp.swapaxes(k, -1, -2)  # Products then need no turned copy.

  def step(i, j, out, peak, total):
    scores = soft_cap(_dot("bkrh,bkhc->bkrc", q[i], turned[j]), static.softcap)
    scores = _masked(_mask(blocks, i, j), scores, MASKED)
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
  real = blocks.segment_ids > 0  # [N, B, C]; all others see themselves.
  real = jnp.tile(real[:, :, None], (1, 1, 1, rows[-1] // static.block))
  total = jnp.where(real, total, 1)
  return jnp.where(real[..., None], out / total[..., None], 0), (
      peak + jnp.log(total))


def _backward(static, residuals, cotangent):
  q, k, v, blocks, out, normaliser = residuals
  shape_q, shape_k, dtype = q, k, q.dtype
  delta = _split(static, (
      cotangent.astype(jnp.float32) * out.astype(jnp.float32)
  ).sum(-1, keepdims=True))[..., 0]  # [N, B, K, R]
  cotangent, q, k, v = (
      _split(static, x) for x in (cotangent, q * static.scale, k, v))
  # All below is [keys, queries]: of five products none turns its operand.
  turn = lambda x: jnp.swapaxes(x, -1, -2)
  cotangent_t, q_t, k_t = map(turn, (cotangent, q, k))

  def step(i, j, dq, dk, dv):
    scores = soft_cap(_dot("bkch,bkhr->bkcr", k[j], q_t[i]), static.softcap)
    weights = jnp.exp(scores - normaliser[i][:, :, None])
    weights = _masked_turned(_mask(blocks, i, j), weights)
    d_weights = _dot("bkch,bkhr->bkcr", v[j], cotangent_t[i])
    d_scores = weights * (d_weights - delta[i][:, :, None])
    if static.softcap:
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
  return (_join(turn(dq) * static.scale, shape_q), _join(dk, shape_k),
          _join(dv, shape_k), None, None, None,
          *(() if blocks.prefix_ids is None else (None,)))


def _masked_turned(mask: jax.Array, x: jax.Array) -> jax.Array:
  """[B, K, C, R], 0 where [B, C, C] (queries, keys) is false."""
  heads = x.reshape(*x.shape[:3], -1, mask.shape[1])
  mask = jnp.swapaxes(mask, 1, 2)[:, None, :, None]
  return jnp.where(mask, heads, 0).reshape(x.shape)


_attend.defvjp(_forward, _backward)
