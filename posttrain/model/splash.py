"""Causal attention by JAX's splash attention kernel, for TPUs.

The kernel is `jax.experimental.pallas.ops.tpu.splash_attention`, called on each
device's own rows and heads. Its masks are by columns, not by positions. This
relies on packed rows: within a segment later columns hold later positions, and
consecutive ones where there is a window.

  B: batch  T: length  K: kv heads  G: query heads per kv head  H: head_dim
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)

from posttrain import sharding
from posttrain.model.blockwise_attention import SAVED

# Block sizes of the forward kernel, and of the two of the backward pass.
BLOCKS = (
    "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
    "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")


def check_devices() -> None:
  """Raises ValueError where the mesh has other devices than TPUs."""
  platform = sharding.platform()
  if platform not in (None, "tpu"):
    raise ValueError(
        "compute.attention='splash' is a kernel for TPUs, and these devices "
        f"are of the platform {platform!r}. Use compute.attention='blocks'.")


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *,
    window: int | None, block: int, scale: float, softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
  """Computes causal attention within segments, on each device's own part.

  Args:
    q: [B, T, K, G, H]. k, v: [B, T, K, H], split over devices by rows and
      heads alone.
    segment_ids: [B, T] int32; segment 0 is padding.
    window: how many keys back a query sees, its own included; None: all.
    block: tokens of a block, a multiple of 128 that divides T.
    scale: of the scores.
    softcap: scores become cap * tanh(score / cap); 0: they do not.
    interpret: run the kernel's program step by step, on any device.

  Returns:
    [B, T, K, G, H] in q's dtype; zeros on padding.

  Raises:
    ValueError: T is not a multiple of the block.
  """
  length = q.shape[1]
  if length % block:
    raise ValueError(
        f"compute.attention='splash' takes sequences of whole blocks, and "
        f"{length} tokens are no multiple of compute.attention_block={block}. "
        "Change sequence_length or rollout.max_prompt_tokens, or use "
        "compute.attention='blocks'.")
  return sharding.per_shard(functools.partial(
      _attend, window=window, block=block, softcap=softcap,
      interpret=interpret), q * scale, k, v, segment_ids)


def _attend(q, k, v, segment_ids, *, window, block, softcap, interpret):
  """Runs the kernel on one device; q is scaled already."""
  rows, length, kv_heads, groups, width = shape = q.shape
  heads = kv_heads * groups
  one = masks.CausalMask((length, length)) if window is None else (
      masks.LocalMask((length, length), (window - 1, 0), 0))
  attend_row = kernel.make_splash_mha(
      masks.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1,
      block_sizes=kernel.BlockSizes(**dict.fromkeys(BLOCKS, block)),
      attn_logits_soft_cap=softcap or None, interpret=interpret,
      residual_checkpoint_name=SAVED)
  # The kernel takes one row, [heads, T, H], with K * G heads of q and K of k.
  heads_first = lambda x: x.reshape(rows, length, -1, width).swapaxes(1, 2)

  def row(q, k, v, ids):
    return attend_row(q, k, v, segment_ids=kernel.SegmentIds(ids, ids))

  q, k, v = map(heads_first, (q, k, v))
  out = jax.vmap(row)(q, k, v, segment_ids)
  out = out.swapaxes(1, 2).reshape(shape)
  # The kernel lets padding, segment 0, read padding.
  real = (segment_ids > 0)[:, :, None, None, None]
  return jnp.where(real, out, 0).astype(q.dtype)
