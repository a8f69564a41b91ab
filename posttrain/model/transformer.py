"""Transformer: the one decoder-only model of training, prefill and decode.

Its layers are stacked on a leading axis. Training scans over that axis. Prefill
and decode unroll it over a KV cache of one array per layer, because a cache
that a scan carries is copied. They differ only in the `attend` closure that a
block is given.

  B: batch  T: length  D: embed  K: kv heads  G: query heads per kv head
  H: head_dim  F: mlp  L: layers  V: vocab (padded)  S: keys, or cache slots
  E: experts  k: experts per token

Not here: losses, sampling, anything that knows a stage.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from posttrain.model import (
  attention,
  blockwise_attention,
  context_parallel,
  decode_kernel,
  moe,
  splash,
)
from posttrain.model import cache as kv
from posttrain.model import head as head_lib
from posttrain.model.attention import causal_mask
from posttrain.model.block import Block, View, constant, normal
from posttrain.model.config import ModelConfig
from posttrain.sharding import (
  axis_size,
  gather_fsdp,
  lengthwise,
  mesh_axes,
  shard,
  whole_length,
)

_policies = jax.checkpoint_policies
REMAT = {
    # Blockwise and splash attention name what their backward pass reads, so
    # that it is saved, as products are, and not computed again.
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(blockwise_attention.SAVED)),
    "full": _policies.nothing_saveable,
}


def check_mesh(config: ModelConfig) -> None:
  """Raises ValueError where the current mesh cannot hold the model."""
  if config.attention == "splash":
    splash.check_devices()
  decode_kernel.check(config)
  experts = axis_size("experts")
  if experts > 1 and not config.num_experts:
    raise ValueError(
        f"mesh.expert={experts} splits experts, and the model has none. Use "
        "mesh.expert=1; mesh.fsdp splits the same things.")
  for name, axis in (
      ("kv_heads", "kv_heads"), ("mlp", "mlp"), ("embed", "embed"),
      ("num_experts", "experts"), ("padded_vocab_size", "vocab")):
    size, parts = getattr(config, name), axis_size(axis)
    if size % parts:
      key = " * ".join(f"mesh.{name}" for name in mesh_axes(axis))
      best = max(n for n in range(1, parts) if size % n == 0)
      raise ValueError(
          f"the model's {name}={size} cannot be split over {key}={parts}. "
          f"Use {key}={best}, the largest size below that divides it.")
  context_parallel.check(config)


class Transformer(nnx.Module):
  """Transformer from tokens to final hidden states; `logits` is its head.

  The module is a pytree: `jax.jit`, `jax.grad` and Optax take it as it is.
  """

  def __init__(self, config: ModelConfig, key: jax.Array):
    """Makes random float32 parameters, sharded on the current mesh."""
    self.config = config
    embedding, blocks, head = jax.random.split(key, 3)
    width = config.embed**-0.5
    table = (config.padded_vocab_size, config.embed)
    # Padding rows are 0, so that a checkpoint does not depend on them.
    real = (jnp.arange(table[0]) < config.vocab_size)[:, None]
    self.embedding = normal(embedding, table, width, "vocab", "embed")
    self.embedding[...] = jnp.where(
        shard(real, "vocab", None), self.embedding[...], 0)
    self.blocks = Block(config, blocks)
    self.final_norm = constant(
        1 - config.norm_offset, (config.embed,), "act_embed")
    if not config.tied_embeddings:
      self.head = normal(head, table[::-1], width, "embed", "vocab")

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Embeds tokens [B, T] int32: [B, T, D] in the compute dtype."""
    table = gather_fsdp(self.embedding[...].astype(self.config.dtype))
    x = table.at[tokens].get(out_sharding=lengthwise(tokens, "act_embed"))
    # The scale is rounded to the compute dtype before the product, as in
    # Gemma's code: in bfloat16 it is another number than sqrt(D).
    scale = jnp.asarray(self.config.embed**0.5, x.dtype)
    return x * scale if self.config.embedding_scale else x

  def view(
      self, kind: str, positions: jax.Array, key_positions: jax.Array,
      mask: jax.Array | None,
  ) -> View:
    """Makes the view that layers of a kind have.

    Args:
      kind: "global", "local" or "nope".
      positions, key_positions: [B, T] and [B, S] int32.
      mask: [B, T, S] bool, the keys that a global layer reads; or None.
    """
    c = self.config
    local = kind == "local"
    theta = c.rope_local_theta if local else 0.0
    # Gemma 3's local layers have a base of their own, which is not stretched.
    cos, sin = attention.rope_tables(positions, attention.frequencies(
        c.head_dim, theta or c.rope_theta,
        None if local and theta else c.rope_scaling))
    if kind == "nope":  # No rotation: SmolLM3, arXiv 2501.18795.
      cos, sin = jnp.ones_like(cos), jnp.zeros_like(sin)
    if local and mask is not None:
      queries = whole_length(positions)
      distance = queries[:, :, None] - key_positions[:, None, :]
      mask = mask & (distance < c.sliding_window)
    return View(cos=cos, sin=sin, mask=mask, window=jnp.int32(
        c.sliding_window if local else jnp.iinfo(jnp.int32).max))

  def attend(self, q, k, v, mask, **scales) -> jax.Array:
    """Computes attention by a mask [B, T, S]: the reference of all forms."""
    return attention.attend(
        q, k, v, mask, scale=self.config.attention_scale,
        softcap=self.config.attention_softcap, **scales)

  def attend_whole(
      self, q, k, v, view: View, positions: jax.Array, segment_ids: jax.Array,
      prefix_ids: jax.Array | None,
  ) -> jax.Array:
    """Computes attention of whole sequences, in the form of the config.

    Args:
      q, k, v: [B, T, K, G, H] and [B, T, K, H].
      view: of the layer; its mask is None but in the form "reference".
      positions, segment_ids, prefix_ids: [B, T] int32, see `routed`.

    Raises:
      ValueError: prefixes with splash attention, whose kernel has none.
    """
    c = self.config
    if view.mask is not None:
      return self.attend(q, k, v, view.mask)
    options: dict[str, Any] = dict(
        block=c.attention_block, scale=c.attention_scale,
        softcap=c.attention_softcap)
    if c.attention == "blocks":
      return blockwise_attention.attend(
          q, k, v, positions, segment_ids, view.window, prefix_ids, **options)
    if prefix_ids is not None:
      raise ValueError(
          f"compute.attention={c.attention!r} knows no shared prompts. Use "
          "'blocks' or 'reference', or share_prompts=False.")
    # The kernel's window is static, and a scan over layers of two kinds is one
    # program: so both kernels are in it, and each layer takes its branch.
    within = lambda window: lambda *arrays: splash.attend(
        *arrays, window=window, **options)
    near, far = within(c.sliding_window), within(None)
    kinds = {kind == "local" for kind in c.layer_kinds}
    if len(kinds) == 1:
      return (near if kinds == {True} else far)(q, k, v, segment_ids)
    return jax.lax.cond(
        view.window == c.sliding_window, near, far, q, k, v, segment_ids)

  def __call__(
      self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array,
  ) -> jax.Array:
    """Computes the hidden states [B, T, D] after the final norm.

    Args:
      tokens, positions, segment_ids: [B, T] int32, sharded over "batch" and
        "length", or over "rows". Attention is causal and stays within a
        segment; segment 0 is padding.

    Returns:
      [B, T, D] in the compute dtype.
    """
    return self.routed(tokens, positions, segment_ids)[0]

  def routed(
      self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array,
      prefix_ids: jax.Array | None = None,
  ) -> tuple[jax.Array, moe.Traffic | None]:
    """Computes hidden states as `__call__` does, and the routers' traffic.

    Args:
      tokens, positions, segment_ids: see `__call__`.
      prefix_ids: [B, T] int32, the segment that each token reads besides its
        own, and that comes before it in the row; None: there are none.

    Returns:
      [B, T, D]; and the traffic, None without experts.
    """
    config = self.config
    # Context parallelism splits the tokens, but each query reads the whole row,
    # so positions and ids of all tokens are on each device: they are small.
    keys, whole_ids, prefixes = jax.tree.map(
        whole_length, (positions, segment_ids, prefix_ids))
    mask = causal_mask(keys, whole_ids, prefixes) if (
        config.attention == "reference") else None

    def attend_fn(q, k, v, view):
      with_all = lambda q, k, v: self.attend_whole(
          q, k, v, view, keys, whole_ids, prefixes)
      return context_parallel.over_length(with_all, q, k, v), None

    kinds = tuple(dict.fromkeys(config.layer_kinds))
    views = [self.view(kind, positions, keys, mask) for kind in kinds]
    # A scan runs one program for all layers. Where they are of several kinds,
    # each picks its kind's view by its number.
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *views)
    numbers = jnp.array([kinds.index(kind) for kind in config.layer_kinds])

    def layer(x, scanned):
      block, number = scanned
      view = views[0] if len(kinds) == 1 else jax.tree.map(
          lambda each: jax.lax.dynamic_index_in_dim(
              each, number, keepdims=False), stacked)
      x, _, routing = block(x, view, attend_fn)
      return x, routing and moe.tally(routing, segment_ids > 0)

    if config.remat != "none":
      layer = jax.checkpoint(layer, policy=REMAT[config.remat])
    x, traffic = jax.lax.scan(
        layer, self.embed(tokens), (self.blocks, numbers),
        unroll=config.unroll)
    return self.normed(x), traffic

  def decode(
      self, tokens: jax.Array, positions: jax.Array, cache: kv.KVCache,
      blocks: list[Block],
  ) -> tuple[jax.Array, kv.KVCache, jax.Array | None]:
    """Runs one token per row over the cache: `extend` for a T of 1.

    Args:
      tokens, positions: [B] int32.
      cache, blocks: see `extend`.

    Returns:
      Hidden states [B, D], the cache, and the experts [B, L, k] or None.
    """
    hidden, cache, experts = self.extend(
        tokens[:, None], positions[:, None], cache, blocks)
    return hidden[:, 0], cache, None if experts is None else experts[:, 0]

  def extend(
      self, tokens: jax.Array, positions: jax.Array, cache: kv.KVCache,
      blocks: list[Block],
  ) -> tuple[jax.Array, kv.KVCache, jax.Array | None]:
    """Runs T tokens per row over the cache, and adds them to it.

    Args:
      tokens, positions: [B, T] int32; a token at position -1 is not read by
        any other, and its own output means nothing.
      cache: written from its `index` on; index + T is at most S, as the tokens
        must not wrap around its end.
      blocks: `unstacked()`, made once outside of the decode loop.

    Returns:
      Hidden states [B, T, D], the cache with T more slots in use, and the
      experts that were chosen [B, T, L, k] int32; None without experts.
    """
    # Positions are written first: the new tokens are keys of each other.
    occupied = kv.write_slots(cache.positions, positions, cache.index)
    written = occupied[:, None]
    mask = (written >= 0) & (written <= positions[:, :, None])
    kinds = self.config.layer_kinds
    views = {kind: self.view(kind, positions, occupied, mask)
             for kind in set(kinds)}
    x = self.embed(tokens)
    layers, choices = [], []
    # Unrolled, not scanned: each layer's cache is an array that is updated in
    # place, where one that a scan carries would be copied in each step.
    for kind, block, layer in zip(kinds, blocks, cache.layers, strict=True):
      def over_cache(q, k, v, view, kind=kind, layer=layer):
        new = layer.write(k, v, cache.index)
        if tokens.shape[1] == 1 and decode_kernel.chosen(self.config):
          return decode_kernel.of_layer(
              self.config, kind, q, new, occupied, positions[:, 0]), new
        return self.attend(
            q, kv.heads_first(new.k), kv.heads_first(new.v), view.mask,
            k_scale=new.k_scale, v_scale=new.v_scale), new

      x, layer, routing = block(x, views[kind], over_cache)
      layers.append(layer)
      if routing is not None:
        choices.append(routing.choice)
    return self.normed(x), kv.KVCache(
        tuple(layers), occupied,
        (cache.index + tokens.shape[1]) % cache.slots,
    ), jnp.stack(choices, 2) if choices else None

  def gathered(self, *tables: str) -> "Transformer":
    """Returns the model with these tables gathered over all axes but "vocab".

    It is for loops that read a table many times, which would gather it each
    time. A table that is not the head is cast to the compute dtype too.
    """
    other = jax.tree.map(lambda w: w, self)
    for name in tables:
      table = getattr(other, name)[...]
      if name != self.head_name:  # The head's product is float32.
        table = table.astype(self.config.dtype)
      setattr(other, name, nnx.Param(gather_fsdp(table)))
    return other

  @property
  def head_name(self) -> str:
    """Name of the table that `logits` reads."""
    return "embedding" if self.config.tied_embeddings else "head"

  def unstacked(self, weights_dtype: str = "compute") -> list[Block]:
    """Slices the layers from the stack, for decode; see `Block.for_decode`."""
    return [self.blocks.for_decode(n, weights_dtype)
            for n in range(self.config.layers)]

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Computes logits [..., V] float32 of hidden states [..., D].

    Ids beyond the vocabulary have -1e30.
    The product is float32 in the sampler and in the trainer alike, since a
    rounded head is the largest source of their disagreement (ScaleRL,
    arXiv 2510.13786).
    """
    return self.finished(head_lib.product(hidden, self.head_table()))

  def gathered_head(self) -> head_lib.Head:
    """Returns `logits` with a head that is gathered once, for many products.

    For hidden states in bfloat16 its table is cut into parts once, too.
    """
    model = self.gathered(self.head_name)
    if self.config.dtype != "bfloat16":
      return model.logits
    parts = head_lib.parts_of(model.head_table())
    return lambda hidden: model.finished(head_lib.product_of_parts(
        hidden, model.head_table(), parts))

  def head_table(self) -> jax.Array:
    """Returns the head's table [D, V], gathered over the FSDP axes."""
    if self.config.tied_embeddings:
      return gather_fsdp(self.embedding[...]).T
    return gather_fsdp(self.head[...])

  def finished(self, logits: jax.Array) -> jax.Array:
    """Soft-caps logits, and masks ids beyond the vocabulary with -1e30."""
    logits = attention.soft_cap(logits, self.config.final_softcap)
    if self.config.padded_vocab_size == self.config.vocab_size:
      return logits
    real = jnp.arange(logits.shape[-1]) < self.config.vocab_size
    return jnp.where(real, logits, attention.MASKED)

  def normed(self, x: jax.Array) -> jax.Array:
    """Applies the final norm to the residual stream x [B, T, D]."""
    return attention.rms_norm(
        x, self.final_norm[...], self.config.norm_eps, self.config.norm_offset)


def init(config: ModelConfig, seed: int) -> Transformer:
  """Makes a random model on the current mesh.

  The values depend on the seed alone, not on the mesh.

  Raises:
    ValueError: the mesh cannot hold the model.
  """
  check_mesh(config)
  return _born(config, jax.random.key(seed))


# One program per shape and mesh, however often a run asks for "init".
_born = jax.jit(Transformer, static_argnums=0)


def abstract(config: ModelConfig) -> Transformer:
  """Makes the module with shapes, dtypes and shardings in place of arrays."""
  check_mesh(config)
  # The key is made inside: outside it would need a device, and the mesh of
  # a machine that is not here has none.
  return jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))


def to_dict(model: Transformer) -> dict:
  """Makes the nested dict of arrays that checkpoints and interop read."""
  return nnx.to_pure_dict(nnx.state(model))


def from_dict(config: ModelConfig, tree: dict) -> Transformer:
  """Makes the module of a nested dict of arrays (see `to_dict`)."""
  graph, state = nnx.split(abstract(config))
  nnx.replace_by_pure_dict(state, tree)
  return nnx.merge(graph, state)
