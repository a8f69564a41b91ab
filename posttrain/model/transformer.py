"""The one model: training, prefill and decode run the same block.

A decoder-only transformer whose layers are stacked on a leading axis.
Training and prefill scan over that axis; decode unrolls it over a cache that
is one array per layer, because a cache carried through a scan is copied.
What differs between the three is only the `attend` closure that a block is
given.

  B: batch  T: length  D: embed  K: kv heads  G: query heads per kv head
  H: head_dim  F: mlp  L: layers  V: vocab (padded)

Deliberately not here: losses, sampling, anything that knows a stage.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from posttrain.model import attention
from posttrain.model import cache as kv
from posttrain.model.attention import attend, causal_mask, rms_norm, rotate
from posttrain.model.config import ModelConfig
from posttrain.sharding import axis_size, gather_fsdp, shard, spec

ACTIVATION = ("batch", "length", "act_embed")

# Given q [B,T,K,G,H] and k, v [B,T,K,H] of the new tokens: the attention
# output [B,T,K,G,H] and whatever the caller wants to keep (keys, a cache).
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def check_mesh(config: ModelConfig) -> None:
  """Raises ValueError where the current mesh does not divide the model."""
  for name, axis, key in (
      ("kv_heads", "kv_heads", "mesh.tensor"), ("mlp", "mlp", "mesh.tensor"),
      ("embed", "embed", "mesh.fsdp"),
      ("padded_vocab_size", "vocab", "mesh.tensor")):
    size, parts = getattr(config, name), axis_size(axis)
    if size % parts:
      best = max(n for n in range(1, parts) if size % n == 0)
      raise ValueError(
          f"the model's {name}={size} cannot be split over {key}={parts}. "
          f"Use {key}={best}, the largest size below that divides it.")


def normal(key: jax.Array, shape: tuple[int, ...], std: float, *axes: str):
  """A normal-initialised parameter, born with its layout."""
  return nnx.Param(
      jax.random.normal(key, shape, out_sharding=spec(*axes)) * std)


def constant(value: float, shape: tuple[int, ...], *axes: str) -> nnx.Param:
  return nnx.Param(
      jnp.full(shape, value, jnp.float32, out_sharding=spec(*axes)))


class Block(nnx.Module):
  """One layer; parameters carry a leading layer axis that a scan slices."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    c = config
    self.config = config
    keys = iter(jax.random.split(key, 7))
    layers, width = (c.layers,), c.embed**-0.5
    # Residual branches start small, so that depth does not grow the stream.
    residual = (2 * c.layers) ** -0.5
    heads, kv = (c.kv_heads, c.groups, c.head_dim), (c.kv_heads, c.head_dim)
    head_axes, kv_axes = (
        ("kv_heads", "groups", "head_dim"), ("kv_heads", "head_dim"))
    self.attn_norm = constant(1, (*layers, c.embed), "layers", "act_embed")
    self.mlp_norm = constant(1, (*layers, c.embed), "layers", "act_embed")
    self.q = normal(next(keys), (*layers, c.embed, *heads), width,
                    "layers", "embed", *head_axes)
    self.k = normal(next(keys), (*layers, c.embed, *kv), width,
                    "layers", "embed", *kv_axes)
    self.v = normal(next(keys), (*layers, c.embed, *kv), width,
                    "layers", "embed", *kv_axes)
    self.o = normal(next(keys), (*layers, *heads, c.embed),
                    residual * (c.heads * c.head_dim) ** -0.5,
                    "layers", *head_axes, "embed")
    if c.qkv_bias:
      self.q_bias = constant(0, (*layers, *heads), "layers", *head_axes)
      self.k_bias = constant(0, (*layers, *kv), "layers", *kv_axes)
      self.v_bias = constant(0, (*layers, *kv), "layers", *kv_axes)
    if c.qk_norm:
      self.q_norm = constant(1, (*layers, c.head_dim), "layers", "head_dim")
      self.k_norm = constant(1, (*layers, c.head_dim), "layers", "head_dim")
    self.gate = normal(next(keys), (*layers, c.embed, c.mlp), width,
                       "layers", "embed", "mlp")
    self.up = normal(next(keys), (*layers, c.embed, c.mlp), width,
                     "layers", "embed", "mlp")
    self.down = normal(next(keys), (*layers, c.mlp, c.embed),
                       residual * c.mlp**-0.5, "layers", "mlp", "embed")

  def weight(self, param: nnx.Param) -> jax.Array:
    """In the compute dtype, gathered over "fsdp": cast first, move less."""
    return gather_fsdp(param[...].astype(self.config.dtype))

  def project(self, x: jax.Array, rope) -> tuple[jax.Array, ...]:
    """[B, T, D] -> q [B, T, K, G, H], k and v [B, T, K, H]."""
    c = self.config
    q = jnp.einsum("btd,dkgh->btkgh", x, self.weight(self.q))
    k = jnp.einsum("btd,dkh->btkh", x, self.weight(self.k))
    v = jnp.einsum("btd,dkh->btkh", x, self.weight(self.v))
    if c.qkv_bias:
      q = q + self.weight(self.q_bias)
      k = k + self.weight(self.k_bias)
      v = v + self.weight(self.v_bias)
    if c.qk_norm:
      q = rms_norm(q, self.q_norm[...], c.norm_eps)
      k = rms_norm(k, self.k_norm[...], c.norm_eps)
    return rotate(q, rope), rotate(k, rope), v

  def feed_forward(self, x: jax.Array) -> jax.Array:
    gate = jnp.einsum("btd,df->btf", x, self.weight(self.gate))
    up = jnp.einsum("btd,df->btf", x, self.weight(self.up))
    return jnp.einsum(
        "btf,fd->btd", jax.nn.silu(gate) * up, self.weight(self.down),
        out_sharding=spec(*ACTIVATION))

  def __call__(self, x: jax.Array, rope, attend_fn: Attend):
    """[B, T, D] -> [B, T, D], and what `attend_fn` keeps."""
    eps = self.config.norm_eps
    q, k, v = self.project(rms_norm(x, self.attn_norm[...], eps), rope)
    attended, kept = attend_fn(q, k, v)
    x = x + jnp.einsum(
        "btkgh,kghd->btd", attended, self.weight(self.o),
        out_sharding=spec(*ACTIVATION))
    x = x + self.feed_forward(rms_norm(x, self.mlp_norm[...], eps))
    return x, kept


class Transformer(nnx.Module):
  """Tokens in, final hidden states out; `logits` is the head.

  The module is a pytree: `jax.jit`, `jax.grad` and Optax take it as it is.
  """

  def __init__(self, config: ModelConfig, key: jax.Array):
    self.config = config
    embedding, blocks, head = jax.random.split(key, 3)
    width = config.embed**-0.5
    table = (config.padded_vocab_size, config.embed)
    real = (jnp.arange(table[0]) < config.vocab_size)[:, None]
    self.embedding = normal(embedding, table, width, "vocab", "embed")
    self.embedding[...] = jnp.where(
        shard(real, "vocab", None), self.embedding[...], 0)
    self.blocks = Block(config, blocks)
    self.final_norm = constant(1, (config.embed,), "act_embed")
    if not config.tied_embeddings:
      self.head = normal(head, table[::-1], width, "embed", "vocab")

  def embed(self, tokens: jax.Array) -> jax.Array:
    """[B, T] int32 -> [B, T, D]."""
    table = gather_fsdp(self.embedding[...].astype(self.config.dtype))
    return table.at[tokens].get(out_sharding=spec(*ACTIVATION))

  def rope(self, positions: jax.Array):
    return attention.rope_tables(
        positions, self.config.head_dim, self.config.rope_theta)

  def __call__(
      self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array,
  ) -> jax.Array:
    """Hidden states [B, T, D] in the compute dtype, after the final norm.

    Args:
      tokens, positions, segment_ids: [B, T] int32, sharded over "batch";
        attention is causal and stays within equal segment ids; 0 is padding.
    """
    mask = causal_mask(positions, segment_ids)
    return self._scan(
        tokens, positions, lambda q, k, v: (attend(q, k, v, mask), None))[0]

  def prefill(
      self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array,
  ) -> tuple[jax.Array, kv.KVCache]:
    """As `__call__`, and the cache that holds these tokens."""
    mask = causal_mask(positions, segment_ids)
    hidden, (k, v) = self._scan(
        tokens, positions,
        lambda q, k, v: (attend(q, k, v, mask), (k, v)))
    return hidden, kv.from_prefill(k, v, positions, segment_ids)

  def decode(
      self, tokens: jax.Array, positions: jax.Array, cache: kv.KVCache,
      blocks: list[Block],
  ) -> tuple[jax.Array, kv.KVCache]:
    """One token per row, over the cache.

    Args:
      tokens, positions: [B] int32; position -1 marks a row that feeds nothing.
      cache: written at its `index`, which must be below its number of slots.
      blocks: `unstacked()`, made once outside of the decode loop.

    Returns:
      Hidden states [B, D], and the cache with one more slot in use.
    """
    positions = positions[:, None]
    occupied = kv.write_slot(cache.positions, positions, cache.index)
    mask = (occupied >= 0) & (occupied <= positions)
    x, rope = self.embed(tokens[:, None]), self.rope(positions)
    keys, values = [], []
    for block, k_cache, v_cache in zip(blocks, cache.k, cache.v, strict=True):
      def over_cache(q, k, v, k_cache=k_cache, v_cache=v_cache):
        k_cache = kv.write_slot(k_cache, k, cache.index)
        v_cache = kv.write_slot(v_cache, v, cache.index)
        return attend(q, k_cache, v_cache, mask[:, None]), (k_cache, v_cache)

      x, (k, v) = block(x, rope, over_cache)
      keys.append(k)
      values.append(v)
    x = rms_norm(x, self.final_norm[...], self.config.norm_eps)
    return x[:, 0], kv.KVCache(
        k=tuple(keys), v=tuple(values), positions=occupied,
        index=cache.index + 1)

  def unstacked(self) -> list[Block]:
    """The layers one by one, cast and gathered over "fsdp": for decode."""
    cast = lambda w: gather_fsdp(w.astype(self.config.dtype))
    return [
        jax.tree.map(lambda w: cast(w[layer]), self.blocks)
        for layer in range(self.config.layers)]

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] -> [..., V] float32; ids beyond the vocabulary at -1e30.

    The product is float32 in the sampler and in the trainer alike, since a
    rounded head is the largest source of their disagreement (ScaleRL,
    arXiv 2510.13786).
    """
    if self.config.tied_embeddings:
      table = gather_fsdp(self.embedding[...]).T
    else:
      table = gather_fsdp(self.head[...])
    logits = jnp.einsum(
        "...d,dv->...v", hidden.astype(jnp.float32),
        table.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    if self.config.padded_vocab_size == self.config.vocab_size:
      return logits
    real = jnp.arange(logits.shape[-1]) < self.config.vocab_size
    return jnp.where(real, logits, attention.MASKED)

  def _scan(self, tokens: jax.Array, positions: jax.Array, attend_fn: Attend):
    config, rope = self.config, self.rope(positions)
    layer = lambda x, block: block(x, rope, attend_fn)
    if config.remat != "none":
      layer = jax.checkpoint(layer, policy=REMAT[config.remat])
    x, kept = jax.lax.scan(
        layer, self.embed(tokens), self.blocks, unroll=config.unroll)
    return rms_norm(x, self.final_norm[...], config.norm_eps), kept


def init(config: ModelConfig, seed: int) -> Transformer:
  """A random model on the current mesh; the values do not depend on it."""
  check_mesh(config)
  return _born(config, jax.random.key(seed))


# One program per shape and mesh, however often a run asks for "init".
_born = jax.jit(Transformer, static_argnums=0)


def abstract(config: ModelConfig) -> Transformer:
  """The same module with shapes, dtypes and shardings in place of arrays."""
  check_mesh(config)
  # The key is made inside: outside it would need a device, and the mesh of
  # a machine that is not here has none.
  return jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))


def to_dict(model: Transformer) -> dict:
  """Nested plain dict of arrays: what checkpoints and interop speak."""
  return nnx.to_pure_dict(nnx.state(model))


def from_dict(config: ModelConfig, tree: dict) -> Transformer:
  """The module around a nested dict of arrays (see `to_dict`)."""
  graph, state = nnx.split(abstract(config))
  nnx.replace_by_pure_dict(state, tree)
  return nnx.merge(graph, state)
