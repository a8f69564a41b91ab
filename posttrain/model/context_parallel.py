"""Context parallelism by all-to-all: the mesh splits the sequence's length.

Outside of attention a device has a part of each row's tokens, with all heads
of its "tensor" part. Within attention it has all tokens of fewer heads. Two
reshards change one into the other, all-to-alls that XLA makes of the types
(DeepSpeed-Ulysses, arXiv 2309.14509, section 3). So attention is the same
function as without the split, in each of its forms. Under a causal mask every
device has the same work, which it had not if each kept its part of the length.

If there are too few kv heads to split, the query heads of each are split in
their place. Keys and values are then gathered whole, as in Llama 3 (arXiv
2407.21783, section 3.3.2); with grouped queries they are the small part.

  B: batch  T: length  K: kv heads  G: query heads per kv head  H: head_dim
"""

from collections.abc import Callable

import jax

from posttrain.model.config import ModelConfig
from posttrain.sharding import axis_size, lengthwise, shard, splits_length


def check(config: ModelConfig) -> None:
  """Raises ValueError where `mesh.context` divides no axis of heads."""
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
  """Calls `attend` with the whole length, and fewer heads, on each device.

  Args:
    attend: q, k, v to [B, T, K, G, H], laid out as q is.
    q: [B, T, K, G, H]. k, v: [B, T, K, H].
  """
  if not splits_length(q):
    return attend(q, k, v)
  # Logical axes that take over the mesh axis of the length.
  kv_heads, groups = "kv_heads_of_length", "groups"
  if q.shape[2] % axis_size(kv_heads):
    kv_heads, groups = "kv_heads", "groups_of_length"
  whole = [shard(x, "batch", None, kv_heads, *axes, "head_dim")
           for x, axes in ((q, (groups,)), (k, ()), (v, ()))]
  return jax.sharding.reshard(
      attend(*whole), lengthwise(q, "kv_heads", "groups", "head_dim"))
