"""LoRA: low-rank adapters of a block's matrices (arXiv 2106.09685).

A matrix `q` with an adapter has two more arrays, stacked over layers as it is:
`q_lora_a` [L, in.., r] and `q_lora_b` [L, r, out..]. The product gains
scale * (x A) B in the compute dtype (`Block.product`). B starts at zero, so
that a new adapter changes nothing. A model with its adapters off is another
module over the same arrays, not a second copy.

  L: layers  r: rank
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from posttrain.model.block import constant
from posttrain.model.config import INPUT_AXES, MATRIX_AXES, LoraConfig
from posttrain.model.transformer import Transformer
from posttrain.sharding import spec


def is_adapter(name: str) -> bool:
  """Returns True if a parameter's name or path is an adapter's."""
  return name.endswith(("_lora_a", "_lora_b"))


def with_config(model: Transformer, **fields) -> Transformer:
  """Makes another module over the same arrays, with these config fields."""
  other = jax.tree.map(lambda w: w, model)
  other.config = dataclasses.replace(model.config, **fields)
  other.blocks.config = other.config
  return other


def add(model: Transformer, lora: LoraConfig, key: jax.Array) -> Transformer:
  """Adds new float32 adapters to a model; all other arrays are shared.

  A is uniform within 1 / sqrt(inputs), as in PEFT, and depends on the key and
  the matrix's name alone; B is zero.

  Raises:
    ValueError: a target is no matrix that can have an adapter.
  """
  assert model.config.lora is None
  other = with_config(model, lora=lora)
  for index, name in enumerate(INPUT_AXES):
    if name not in lora.targets:
      continue
    shape, axes = _shape(model, name), MATRIX_AXES[name]
    cut = INPUT_AXES[name]
    bound = math.prod(shape[1:1 + cut]) ** -0.5
    a = jax.random.uniform(
        # By the name's index, so that A does not depend on the other targets.
        jax.random.fold_in(key, index), (*shape[:1 + cut], lora.rank),
        minval=-bound, maxval=bound,
        out_sharding=spec("layers", *axes[:cut], "rank"))
    setattr(other.blocks, f"{name}_lora_a", nnx.Param(a))
    setattr(other.blocks, f"{name}_lora_b", constant(
        0, (shape[0], lora.rank, *shape[1 + cut:]),
        "layers", "rank", *axes[cut:]))
  return other


def _shape(model: Transformer, name: str) -> tuple[int, ...]:
  """Returns the shape of a stacked matrix as it was before quantisation."""
  w = getattr(model.blocks, name)
  if w.ndim != 1 + len(MATRIX_AXES[name]):
    raise ValueError(
        f"lora.targets has {name!r}, which in this model is one matrix per "
        "expert. Name attention's (q, k, v, o) only.")
  sizes = {"embed": model.config.embed}  # Two numbers of it share a byte.
  return (w.shape[0], *(
      sizes.get(axis, size) for axis, size in zip(
          MATRIX_AXES[name], w.shape[1:], strict=True)))


def without(model: Transformer) -> Transformer:
  """Takes the adapters off a model; all other arrays are shared."""
  other = with_config(model, lora=None)
  for name in list(vars(other.blocks)):
    if is_adapter(name):
      delattr(other.blocks, name)
  return other


@jax.jit
def merged(model: Transformer) -> Transformer:
  """Merges all adapters into their matrices: a float32 model without LoRA.

  Nothing in it is quantised, either.
  """
  def layer(block):
    whole = block.merged()
    for name in INPUT_AXES:
      w = getattr(whole, name)
      at_rest = jax.typeof(getattr(block, name)[...]).sharding.spec
      w[...] = jax.sharding.reshard(w[...], at_rest)
    return whole

  other = with_config(model, lora=None, quantized="")
  # Layer by layer, as each is gathered in float32 to be merged.
  other.blocks = jax.lax.map(layer, model.blocks)
  return jax.tree.map(lambda w: w.astype(jnp.float32), other)
