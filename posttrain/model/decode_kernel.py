"""Decode attention as a Pallas TPU kernel: one new token per row, KV cache.

Flash-decoding over blocks of slots (arXiv 2205.14135, section 3.1, with one
query): the softmax is kept up to date from block to block, and the scores
never leave the core. The cache's positions say, before the kernel starts, which
blocks hold a slot that the row sees, and it fetches no other. So a short row
in a batch with a long one, a row that is done, and a layer with a window read
only what they see, where the plain form (`attention.attend`) reads all S slots.

Each device runs it on its own rows and heads. Where it cannot run is an error;
nothing falls back to the plain form. Only the single query of a decode step
comes here: prompts have many queries, and take the plain form.

  B: batch  K: kv heads  G: query heads per kv head  H: head_dim  S: slots
  N: blocks of slots
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posttrain import sharding
from posttrain.model import attention
from posttrain.model.cache import Layer
from posttrain.model.config import INTERPRETED, ModelConfig

LANES = 128  # Of a TPU's vector register: the last axis is padded to them.
# Bytes of a block of keys, or of values. The pipeline holds two of each, one in
# use and one that is fetched, in the 16 MiB of a core.
BLOCK_BYTES = 2**20
# Slots of a block at most: the slots that a row sees are rounded up to blocks.
MOST_SLOTS = 512


def check(config: ModelConfig) -> None:
  """Raises ValueError where the kernel is asked for and cannot run."""
  if config.decode_attention != "kernel":
    return
  if config.head_dim % LANES:
    raise ValueError(
        "compute.decode_attention='kernel' needs a head_dim that is a "
        f"multiple of {LANES}, and the model's is {config.head_dim}: the "
        "cache would be padded to it. Use 'reference'.")
  if (platform := sharding.platform()) not in (None, "tpu"):
    raise ValueError(
        "compute.decode_attention='kernel' is a kernel for TPUs, and these "
        f"devices are of the platform {platform!r}. Use 'reference'.")


def chosen(config: ModelConfig) -> bool:
  """Returns True if the attention of a decode step is the kernel."""
  return config.decode_attention != "reference"


def of_layer(
    config: ModelConfig, kind: str, q: jax.Array, layer: Layer,
    positions: jax.Array, query: jax.Array,
) -> jax.Array:
  """Calls `attend` with the settings of a kind of layer."""
  return attend(
      q, layer, positions, query, scale=config.attention_scale,
      softcap=config.attention_softcap,
      window=config.sliding_window if kind == "local" else 0,
      interpret=config.decode_attention == INTERPRETED)


def block_slots(layer: Layer) -> int:
  """Returns the slots of a block: a multiple of 128, or all S."""
  heads = layer.k.shape[1] // sharding.axis_size("kv_heads")
  slot = heads * layer.k.shape[3] * layer.k.dtype.itemsize
  fitting = BLOCK_BYTES // slot // LANES * LANES
  return min(max(LANES, min(MOST_SLOTS, fitting)), layer.k.shape[2])


def visible_blocks(
    positions: jax.Array, query: jax.Array, *, window: int, block: int,
) -> tuple[jax.Array, jax.Array]:
  """Finds the blocks that each row sees a slot of.

  Args:
    positions: [B, S] int32, of the cache; -1: empty.
    query: [B] int32, position of the row's token; -1: the row sees nothing.
    window: how many positions a token sees, its own included; 0: all.
    block: slots of a block; the last may have fewer.

  Returns:
    The numbers of the blocks, [B, N] int32, the visible ones first and in
    order, the last of them repeated behind; and their count, [B] int32.
  """
  seen = _visible(positions, query[:, None], window)
  rest = -seen.shape[1] % block
  seen = jnp.pad(seen, ((0, 0), (0, rest)))
  numbers = jnp.arange(seen.shape[1] // block, dtype=jnp.int32)
  starts = range(0, seen.shape[1], block)
  any_seen = jnp.stack(
      [jnp.any(seen[:, i:i + block], axis=1) for i in starts], axis=1)
  beyond = jnp.int32(len(starts))
  # The grid has N steps for every row. Behind the visible blocks it names the
  # last one again: the pipeline does not fetch a block twice in a row.
  order = jnp.sort(jnp.where(any_seen, numbers, beyond), axis=1)
  last = jnp.max(jnp.where(any_seen, numbers, 0), axis=1, keepdims=True)
  return (jnp.where(order == beyond, last, order),
          jnp.sum(any_seen, axis=1, dtype=jnp.int32))


def _visible(positions, query, window):
  """Returns bool, a slot's position is seen from the query's."""
  seen = (positions >= 0) & (positions <= query)
  return seen & (query - positions < window) if window else seen


def attend(
    q: jax.Array, layer: Layer, positions: jax.Array, query: jax.Array, *,
    scale: float, softcap: float = 0.0, window: int = 0,
    interpret: bool = False, block: int = 0,
) -> jax.Array:
  """Computes `attention.attend` under the mask of these positions.

  Args:
    q: [B, 1, K, G, H]. layer: of the cache, this token written already.
    positions, query, window: see `visible_blocks`.
    scale, softcap: see `attention.attend`.
    interpret: run it in Python, on any device.
    block: slots of a block; 0: `block_slots`.

  Returns:
    [B, 1, K, G, H] in q's dtype; zeros in a row that sees nothing.
  """
  block = block or block_slots(layer)
  blocks, counts = visible_blocks(
      positions, query, window=window, block=block)
  scales = [x for x in (layer.k_scale, layer.v_scale) if x is not None]
  run = functools.partial(
      _call, softcap=softcap, window=window, block=block, interpret=interpret)
  out = sharding.per_shard(
      run, (q * scale)[:, 0], blocks, counts, query, positions[:, None],
      layer.k, layer.v, *scales)
  return out[:, None]


def _call(q, blocks, counts, query, positions, k, v, *scales, softcap, window,
          block, interpret):
  """Runs the kernel on one device.

  Args:
    q: [B, K, G, H], scaled. positions: [B, 1, S]. k, v: [B, K, S, H].
    blocks, counts: of `visible_blocks`. query: [B].
    scales: none, or k_scale and v_scale, [B, K, S].
  """
  rows, heads, _, width = q.shape
  row = lambda b, i, *_: (b, 0, 0, 0)
  keys = pl.BlockSpec(
      (1, heads, block, width),
      lambda b, i, blocks, *_: (b, 0, blocks[b, i], 0))
  column = lambda size: pl.BlockSpec(
      (1, size, block), lambda b, i, blocks, *_: (b, 0, blocks[b, i]))
  queries = pl.BlockSpec((1, *q.shape[1:]), row)
  summed = pltpu.VMEM((*q.shape[1:3], 1), jnp.float32)
  return pl.pallas_call(
      functools.partial(
          _kernel, softcap=softcap, window=window, slots=k.shape[2]),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          # blocks, counts and query: they choose what is fetched, so the
          # core has to have them before the first block.
          num_scalar_prefetch=3, grid=(rows, blocks.shape[1]),
          in_specs=[queries, column(1), keys, keys,
                    *(column(heads) for _ in scales)],
          out_specs=queries,
          scratch_shapes=[summed, summed,
                          pltpu.VMEM(q.shape[1:], jnp.float32)]),
      out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
      # Rows do not depend on each other; a row's blocks do, by the scratch.
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary")),
      interpret=interpret, name="decode_attention",
  )(blocks, counts, query, q, positions, k, v, *scales)


def _kernel(
    blocks, counts, query, q_ref, positions_ref, k_ref, v_ref, *refs,
    softcap, window, slots):
  """Adds one block of one row to the running maximum, sum and values.

  Refs hold the blocks: q [1, K, G, H], positions [1, 1, block], k and v
  [1, K, block, H], scales [1, K, block], out as q. The scratch is [K, G, 1],
  [K, G, 1] and [K, G, H] float32, and stays from block to block.
  """
  *scale_refs, out_ref, top_ref, sum_ref, mean_ref = refs
  row, step = pl.program_id(0), pl.program_id(1)
  block = k_ref.shape[2]

  @pl.when(step == 0)
  def _():
    top_ref[...] = jnp.full(top_ref.shape, attention.MASKED, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    mean_ref[...] = jnp.zeros(mean_ref.shape, jnp.float32)

  @pl.when(step < counts[row])
  def _():
    q = q_ref[0]  # [K, G, H]
    seen = _visible(positions_ref[0], query[row], window)  # [1, block]
    k_scale, v_scale = [ref[0][:, None] for ref in scale_refs] or (1.0, 1.0)
    values = v_ref[0].astype(q.dtype)
    # The last block may reach beyond the cache. What is there is undefined, and
    # a NaN times a weight of 0 is NaN: values and scales are zeroed, too.
    if slots % block:
      left = slots - blocks[row, step] * block
      inside = lambda axis: jax.lax.broadcasted_iota(
          jnp.int32, (1, block) if axis else (block, 1), axis) < left
      seen = seen & inside(1)
      values = jnp.where(inside(0), values, 0)
      v_scale = jnp.where(inside(1), v_scale, 0)
    scores = jax.lax.dot_general(
        q, k_ref[0].astype(q.dtype), (((2,), (2,)), ((0,), (0,))),
        preferred_element_type=jnp.float32) * k_scale  # [K, G, block]
    scores = jnp.where(
        seen, attention.soft_cap(scores, softcap), attention.MASKED)
    top = jnp.maximum(
        top_ref[...], jnp.max(scores, axis=2, keepdims=True))
    # Masked again: while nothing was seen, `top` is MASKED and exp(0) is 1.
    weights = jnp.where(seen, jnp.exp(scores - top), 0)
    shrink = jnp.exp(top_ref[...] - top)
    top_ref[...] = top
    sum_ref[...] = sum_ref[...] * shrink + jnp.sum(
        weights, axis=2, keepdims=True)
    mean_ref[...] = mean_ref[...] * shrink + jax.lax.dot_general(
        (weights * v_scale).astype(q.dtype), values,
        (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    total = sum_ref[...]  # 0 in a row that saw nothing.
    out_ref[0] = (
        mean_ref[...] / jnp.where(total > 0, total, 1)).astype(out_ref.dtype)
