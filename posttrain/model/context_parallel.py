"""Attention over a length that the mesh splits: heads in place of positions.

Outside of attention a device has a part of each row's tokens, with all heads
of its "tensor" part. Within, it has all tokens of fewer heads: two reshards,
all-to-alls that XLA makes of the types, as in DeepSpeed-Ulysses (arXiv
2309.14509). So attention itself is the same function as without the split,
whatever its form, and every device has the same work under a causal mask,
which parts of the length would not.

If the kv heads are too few, the query heads of each are split in their place;
their keys and values are then gathered whole, as for the attention of Llama 3
(arXiv 2407.21783, section 3.3.2). Of grouped queries these are the small part.

  B: batch  T: length  K: kv heads  G: query heads per kv head  H: head_dim
"""

from collections.abc import Callable

import jax

from posttrain.model.config import ModelConfig
from posttrain.sharding import (
    axis_size,
    lengthwise,
    shard,
    splits_length,
)


def check(config: ModelConfig) -> None:
  """Raises ValueError where the heads cannot stand in for the length."""
  parts, tensor = axis_size("length"), axis_size("kv_heads")
  heads = config.kv_heads // tensor
  if heads % parts and config.groups % parts:
    best = max(n for n in range(1, parts)
               if heads % n == 0 or config.groups % n == 0)
    raise ValueError(
        f"mesh.context={parts} divides neither the {heads} kv heads that a "
        f"part of mesh.tensor={tensor} has nor the {config.groups} query "
        f"heads of each, and attention splits one of them. Use mesh.context="
        f"{best}, the largest size below that does.")


def over_length(
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    q: jax.Array, k: jax.Array, v: jax.Array,
) -> jax.Array:
  """`attend` with the whole length on each device.

  Args:
    attend: q, k, v to [B, T, K, G, H], laid out as q is.
    q: [B, T, K, G, H]. k, v: [B, T, K, H].
  """
  if not splits_length(q):
    return attend(q, k, v)
  kv_heads, groups = "kv_heads_of_length", "groups"
  if q.shape[2] % axis_size(kv_heads):
    kv_heads, groups = "kv_heads", "groups_of_length"
  whole = [shard(x, "batch", None, kv_heads, *axes, "head_dim")
           for x, axes in ((q, (groups,)), (k, ()), (v, ()))]
  return jax.sharding.reshard(
      attend(*whole), lengthwise(q, "kv_heads", "groups", "head_dim"))
