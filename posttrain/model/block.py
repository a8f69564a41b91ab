"""Transformer block: the one layer that training, prefill and decode all run.

Parameters carry a leading layer axis that a scan slices. The three differ only
in the `attend` closure that a block is given.

  B: batch  T: length  S: keys  D: embed  K: kv heads
  G: query heads per kv head  H: head_dim  F: mlp  L: layers
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from posttrain.model import attention, moe, quantized
from posttrain.model.attention import rotate
from posttrain.model.config import (
    HEADS,
    INPUT_AXES,
    KV_HEADS,
    MATRIX_AXES,
    LoraConfig,
    ModelConfig,
    check_sampling_dtype,
)
from posttrain.sharding import gather_fsdp, lengthwise, spec

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True)}


def normal(key: jax.Array, shape: tuple[int, ...], std: float, *axes: str):
  """Makes a normal-initialised parameter, sharded from the start."""
  return nnx.Param(
      jax.random.normal(key, shape, out_sharding=spec(*axes)) * std)


def constant(value: float, shape: tuple[int, ...], *axes: str) -> nnx.Param:
  """Makes a parameter with one value, float32, sharded from the start."""
  return nnx.Param(
      jnp.full(shape, value, jnp.float32, out_sharding=spec(*axes)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
  """View of the sequence that layers of one kind have.

  Attributes:
    cos, sin: [B, T, H/2] float32, `rope_tables` of queries and new keys.
    mask: [B, T, S] bool, the keys that a query reads; None where attention
      finds them by itself.
    window: int32 scalar, how many keys back a query sees, its own included.
  """

  cos: jax.Array
  sin: jax.Array
  mask: jax.Array | None
  window: jax.Array


# Given q [B,T,K,G,H], k, v [B,T,K,H] of the new tokens and what the layer
# sees: the attention output [B,T,K,G,H] and whatever the caller wants to keep
# (keys, a cache).
Attend = Callable[
    [jax.Array, jax.Array, jax.Array, View], tuple[jax.Array, Any]]


def _contract(
    equation: str, out: Any, x: jax.Array, w: jax.Array) -> jax.Array:
  """Computes an einsum of x and w; `out` is the result's sharding."""
  return jnp.einsum(equation, x, w, out_sharding=out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def contract_in_layout(
    equation: str, out: Any, x: jax.Array, w: jax.Array) -> jax.Array:
  """Computes an einsum whose gradient for `w` comes in the layout of `w`.

  JAX multiplies the cotangent by x and transposes the result. On a CPU the
  cotangent is transposed instead, element by element, together with the
  operations fused into it, which is most of an MLP's backward pass. With x
  first, the transposed operand is the smaller one.

  Args:
    equation: of two operands, such as "btd,df->btf".
    out: the result's sharding; None where it follows from the operands'.
    x, w: the operands.
  """
  return _contract(equation, out, x, w)


def _contract_backward(equation, out, operands, cotangent):
  """Computes the gradients of `contract_in_layout` for x and w."""
  del out
  x, w = operands
  inputs, matrix, result = equation.replace("->", ",").split(",")
  like = lambda operand: jax.typeof(operand).sharding.spec
  return (
      _contract(f"{result},{matrix}->{inputs}", like(x), cotangent, w),
      _contract(f"{inputs},{result}->{matrix}", like(w), x, cotangent))


contract_in_layout.defvjp(
    lambda equation, out, x, w: (_contract(equation, out, x, w), (x, w)),
    _contract_backward)


class Block(nnx.Module):
  """Transformer block: all layers, or one where the layer axis is sliced."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    """Makes random float32 parameters of all layers, sharded at rest.

    A matrix that a family does not have is absent, and so are norms; see
    `ModelConfig` for the fields that decide.
    """
    c = config
    self.config = config
    keys = iter(jax.random.split(key, 8 if c.num_experts else 7))
    sizes = dict(
        layers=c.layers, embed=c.embed, act_embed=c.embed,
        expert_embed=c.embed, experts=c.num_experts, router=c.num_experts,
        kv_heads=c.kv_heads, groups=c.groups, head_dim=c.head_dim, mlp=c.mlp)
    shape = lambda axes: tuple(sizes[axis] for axis in axes)
    # A scale is stored as its distance from `norm_offset`, as Gemma's is.
    norm = lambda *axes: constant(
        1 - c.norm_offset, shape(("layers", *axes)), "layers", *axes)
    if c.norm_placement != "post":
      self.attn_norm, self.mlp_norm = norm("act_embed"), norm("act_embed")
    if c.norm_placement != "pre":
      self.attn_post_norm = norm("act_embed")
      self.mlp_post_norm = norm("act_embed")
    if c.qk_norm == "head":
      self.q_norm, self.k_norm = norm("head_dim"), norm("head_dim")
    if c.qk_norm == "full":
      self.q_norm, self.k_norm = norm(*HEADS), norm(*KV_HEADS)
    # Residual branches start small, so that depth does not grow the stream.
    width, residual = c.embed**-0.5, (2 * c.layers) ** -0.5
    stds = {"o": residual * (c.heads * c.head_dim) ** -0.5,
            "down": residual * c.mlp**-0.5}
    for name, axes in MATRIX_AXES.items():
      if c.num_experts and "mlp" in axes:
        inner = {"embed": "expert_embed", "mlp": "mlp"}
        axes = ("experts", *(inner[axis] for axis in axes))
      axes = ("layers", *axes)
      setattr(self, name, normal(
          next(keys), shape(axes), stds.get(name, width), *axes))
    if c.num_experts:
      axes = ("layers", "embed", "router")
      self.router = normal(next(keys), shape(axes), width, *axes)
    for name in "qkv" if c.qkv_bias else "":
      axes = ("layers", *MATRIX_AXES[name][1:])
      setattr(self, f"{name}_bias", constant(0, shape(axes), *axes))

  def weight(self, name: str, dtype: str = "") -> jax.Array:
    """Returns the weight of this name, gathered over the FSDP axes.

    Args:
      name: of a parameter.
      dtype: "" for the compute dtype.
    """
    # Cast first: half the bytes are gathered in bfloat16.
    w, dtype = getattr(self, name)[...], dtype or self.config.dtype
    if not self.is_quantized(name):
      return gather_fsdp(w.astype(dtype))
    return quantized.dequantize(
        w, getattr(self, name + quantized.SCALE)[...], self.config.quantized,
        quantized.embed_axis(name), dtype)

  def is_quantized(self, name: str) -> bool:
    """Returns True if the matrix of this name rests in 8 or 4 bits."""
    return hasattr(self, name + quantized.SCALE)

  def adapter(self, name: str) -> LoraConfig | None:
    """Returns the LoRA settings of the matrix of this name, or None."""
    lora = self.config.lora
    return lora if lora is not None and name in lora.targets else None

  def product(
      self, equation: str, x: jax.Array, name: str, *axes: str) -> jax.Array:
    """Multiplies x by the weight of this name, and adds its adapter's product.

    Args:
      equation: of the two and the result, such as "btd,df->btf".
      x: [B, T, ...] in the compute dtype.
      name: of a matrix.
      *axes: the result's logical axes behind [B, T], where the contracted axis
        is split, so that the layout does not follow from the operands.
    """
    out = lengthwise(x, *axes) if axes else None
    contract = contract_in_layout if (
        self.config.gradients == "in_layout") else _contract
    multiply = lambda x: contract(equation, out, x, self.weight(name))
    channels = getattr(self, name + quantized.CHANNELS, None)
    # int8 weights of the decode loop, which takes no gradient: the scales of
    # the outputs multiply the product.
    if channels is not None:
      whole = multiply
      multiply = lambda x: (whole(x) * channels[...]).astype(x.dtype)
    if self.config.remat == "none":
      # The backward pass then keeps the weight as it is at rest, and not every
      # layer's cast and gathered copy of it. It gathers again, which costs no
      # product. The other remat policies do the same for the whole layer;
      # both would gather once more.
      multiply = jax.checkpoint(multiply)
    y, lora = multiply(x), self.adapter(name)
    if lora is None:
      return y
    # x A B is two products of rank r: the matrix's letters are cut into those
    # of x, which A reads, and those of the result, which B makes.
    terms, result = equation.split("->")
    inputs, matrix = terms.split(",")
    cut = INPUT_AXES[name]
    low = jnp.einsum(
        f"{inputs},{matrix[:cut]}r->btr", x, self.weight(f"{name}_lora_a"),
        out_sharding=lengthwise(x, "rank"))
    return y + jnp.einsum(
        f"btr,r{matrix[cut:]}->{result}", low * lora.scale,
        self.weight(f"{name}_lora_b"), out_sharding=out)

  def merged(self) -> "Block":
    """Merges one layer's adapters into their matrices, and dequantises.

    Returns:
      A layer without adapters or scales; the matrices that had them are
      float32, the others the same arrays.
    """
    plain = jax.tree.map(lambda w: w, self)
    for name in INPUT_AXES:
      quantised, lora = self.is_quantized(name), self.adapter(name)
      if not quantised and lora is None:
        continue
      w = self.weight(name, "float32")
      if quantised:
        delattr(plain, name + quantized.SCALE)
      if lora is not None:
        a, b = (self.weight(f"{name}_lora_{x}", "float32") for x in "ab")
        w += lora.scale * jax.lax.dot_general(
            a, b, (((a.ndim - 1,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST)
        for x in "ab":
          delattr(plain, f"{name}_lora_{x}")
      setattr(plain, name, nnx.Param(w))
    plain.config = dataclasses.replace(self.config, lora=None, quantized="")
    return plain

  def for_decode(self, layer: int, weights_dtype: str = "compute") -> "Block":
    """Slices one layer from the stack, cast and gathered over the FSDP axes.

    Args:
      layer: its number.
      weights_dtype: of the matrices: "compute", as they are if they rest in
        integers and in the compute dtype else; "int8", with a scale for each
        output.

    Raises:
      ValueError: int8 experts, or an unknown dtype.
    """
    check_sampling_dtype("weights_dtype", weights_dtype)
    block = jax.tree.map(lambda w: w[layer], self)
    if self.config.lora is not None and self.config.lora.decode == "merged":
      block = block.merged()
    if weights_dtype == "int8":
      block = block.with_channels()

    def ready(path, w):
      # Norms are float32 in training too, and small.
      stored = jnp.issubdtype(w.dtype, jnp.integer) or any(
          name in jax.tree_util.keystr(path)
          for name in (quantized.SCALE, quantized.CHANNELS, "_norm"))
      return gather_fsdp(w if stored else w.astype(self.config.dtype))

    return jax.tree_util.tree_map_with_path(ready, block)

  def with_channels(self) -> "Block":
    """Quantises one layer's matrices to int8 with a scale for each output.

    Raises:
      ValueError: the model has experts.
    """
    if self.config.num_experts:
      raise ValueError(
          "weights_dtype='int8' does not quantise experts yet, and the model "
          f"has {self.config.num_experts}. Use weights_dtype='compute'.")
    block = jax.tree.map(lambda w: w, self)
    for name, inputs in INPUT_AXES.items():
      if self.is_quantized(name):
        w = self.weight(name, "float32")
        delattr(block, name + quantized.SCALE)
      else:
        w = getattr(self, name)[...]
      values, scale = quantized.per_output(w, inputs)
      setattr(block, name, nnx.Param(values))
      setattr(block, name + quantized.CHANNELS, nnx.Param(scale))
    block.config = dataclasses.replace(self.config, quantized="")
    return block

  def norm(self, name: str, x: jax.Array) -> jax.Array:
    """Applies the RMSNorm of this name; returns x where the layer has none."""
    if not hasattr(self, name):
      return x
    c = self.config
    return attention.rms_norm(
        x, getattr(self, name)[...], c.norm_eps, c.norm_offset)

  def project(self, x: jax.Array, rope) -> tuple[jax.Array, ...]:
    """Projects x [B, T, D] to q [B, T, K, G, H], and k and v [B, T, K, H].

    Queries and keys are normed, where the model has such norms, and then
    rotated by `rope`.
    """
    c = self.config
    q = self.product("btd,dkgh->btkgh", x, "q")
    k = self.product("btd,dkh->btkh", x, "k")
    v = self.product("btd,dkh->btkh", x, "v")
    if c.qkv_bias:
      q = q + self.weight("q_bias")
      k = k + self.weight("k_bias")
      v = v + self.weight("v_bias")
    q, k = self.norm("q_norm", q), self.norm("k_norm", k)
    return rotate(q, rope), rotate(k, rope), v

  def feed_forward(
      self, x: jax.Array) -> tuple[jax.Array, moe.Routing | None]:
    """Runs the MLP or the experts on x [B, T, D].

    Returns:
      [B, T, D], and the routing; None without experts.
    """
    c = self.config
    if c.num_experts:
      return moe.feed_forward(
          x, *map(self.weight, ("router", "gate", "up", "down")),
          chosen=c.experts_per_token, normalize=c.normalize_router,
          form=c.moe, activation=ACTIVATIONS[c.activation])
    gate = self.product("btd,df->btf", x, "gate")
    up = self.product("btd,df->btf", x, "up")
    activated = ACTIVATIONS[c.activation](gate) * up
    return self.product("btf,fd->btd", activated, "down", "act_embed"), None

  def __call__(self, x: jax.Array, view: View, attend_fn: Attend):
    """Runs one layer on the residual stream x [B, T, D].

    Returns:
      [B, T, D]; what `attend_fn` keeps; and the routing or None.
    """
    q, k, v = self.project(self.norm("attn_norm", x), (view.cos, view.sin))
    attended, kept = attend_fn(q, k, v, view)
    attended = self.product("btkgh,kghd->btd", attended, "o", "act_embed")
    x = x + self.norm("attn_post_norm", attended)
    fed, routing = self.feed_forward(self.norm("mlp_norm", x))
    return x + self.norm("mlp_post_norm", fed), kept, routing
