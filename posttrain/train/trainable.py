"""Trainable parameters: which are trained, and the dtype of the frozen ones.

A parameter's path is "blocks/q" or "embedding". Trained parameters are float32
and have gradients and optimizer state. Frozen ones rest in the dtype of
`compute.frozen_dtype`, and have neither. A part of a model is the same module
with None in place of the leaves of the other part.
"""

import dataclasses
import json
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from posttrain.model import lora as lora_lib
from posttrain.model import quantized, transformer
from posttrain.model.config import (
  INPUT_AXES,
  QUANTIZED,
  LoraConfig,
  ModelConfig,
)
from posttrain.model.transformer import Transformer

# The dtype of norms, biases and tables in a model whose matrices are quantised.
BESIDE_QUANTIZED = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Plan:
  """Plan of a stage's trainable and frozen weights; hashable.

  Attributes:
    lora: the LoRA adapters, or None.
    pattern: a regular expression that matches the whole path of a trained
      parameter; "": the adapters if there are some, else all parameters.
    frozen_dtype: dtype of the frozen ones: a float's, or "int8", "int4", "nf4"
      for the matrices of the blocks.
  """

  lora: LoraConfig | None = None
  pattern: str = ""
  frozen_dtype: str = "float32"

  def to_json(self) -> dict[str, Any]:
    """Converts to JSON data as a file gives it back: with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(self)))

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> "Plan":
    lora = data["lora"] and LoraConfig(**{
        **data["lora"], "targets": tuple(data["lora"]["targets"])})
    return cls(**{**data, "lora": lora})


def path_name(path) -> str:
  """Names a key path, as "blocks/q": without a trace of Flax's classes."""
  parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
  return "/".join(part for part in parts if part != "value")


def paths(model: Any) -> list[str]:
  return [path_name(path) for path, _ in jax.tree.leaves_with_path(model)]


def trained_paths(model: Transformer, plan: Plan) -> frozenset[str]:
  """Returns the paths of the parameters that the plan trains.

  Raises:
    ValueError: no parameter matches, or the plan has adapters and trains none.
  """
  # A scale belongs to its quantised matrix, and is never trained.
  here = [path for path in paths(model) if not path.endswith(quantized.SCALE)]
  adapters = [path for path in here if lora_lib.is_adapter(path)]
  if not plan.pattern:
    return frozenset(adapters or here)
  found = frozenset(p for p in here if re.fullmatch(plan.pattern, p))
  if not found:
    raise ValueError(
        f"trained={plan.pattern!r} matches no parameter as a whole. There are "
        f"{', '.join(here)}.")
  if adapters and not found.intersection(adapters):
    raise ValueError(
        f"trained={plan.pattern!r} trains no adapter, and lora.rank="
        f"{plan.lora and plan.lora.rank} makes some that would stay zero. Add "
        "blocks/.*_lora_. to the pattern, or leave lora out.")
  return found


def prepare(
    model: Transformer, plan: Plan, *, seed: int, stage: str,
) -> tuple[Transformer, frozenset[str]]:
  """Gives a model the plan's adapters and dtypes; returns the trained paths
  too.

  A model that has these adapters keeps them; other adapters are merged first.

  Args:
    model: its buffers are deleted, except those that the result shares.
    seed, stage: new adapters depend on them.
  """
  if model.config.lora != plan.lora:
    if model.config.lora is not None:
      model = _replaced(lora_lib.merged, model, consume=True)
    if plan.lora is not None:
      key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))
      model = lora_lib.add(model, plan.lora, key)
  trained = trained_paths(model, plan)
  return at_rest(model, trained, plan.frozen_dtype), trained


def abstract(
    config: ModelConfig, plan: Plan) -> tuple[Transformer, frozenset[str]]:
  """Prepares a model of this shape, on shapes instead of arrays."""
  transformer.check_mesh(config)
  trained: list[frozenset[str]] = []

  def make():
    model, names = prepare(
        Transformer(config, jax.random.key(0)), plan, seed=0, stage="")
    trained.append(names)
    return model

  return jax.eval_shape(make), trained[0]


def at_rest(
    model: Transformer, trained: Collection[str], dtype: str, *,
    copied: Collection[str] = (), consume: bool = True,
) -> Transformer:
  """Casts trained leaves and adapters to float32, all others to `dtype`.

  Matrices of the blocks may be quantised, one at a time, so that there is never
  a second copy of the model.

  Args:
    copied: paths that the result must not share with `model`.
    consume: delete the arrays that are replaced.

  Returns:
    A model that shares every array whose dtype was right already.
  """
  # A float dtype applies to all frozen leaves; a quantised one to matrices
  # only.
  kind = dtype if dtype in QUANTIZED else ""
  other = lora_lib.with_config(model, quantized=kind)
  here = [name for name in INPUT_AXES if hasattr(model.blocks, name)]
  for name in here:
    wanted = "" if f"blocks/{name}" in trained else kind
    _set_stored(other, model, name, wanted, consume)

  def settle(path, w):
    path = path_name(path)
    # Quantised matrices and their scales are as they should be already.
    if jnp.issubdtype(w.dtype, jnp.integer) or path.endswith(quantized.SCALE):
      return w
    float32 = path in trained or lora_lib.is_adapter(path)
    to = jnp.dtype(
        "float32" if float32 else BESIDE_QUANTIZED if kind else dtype)
    if w.dtype != to:
      return _replaced(lambda w: w.astype(to), w, consume=consume)
    # The optimizer consumes the trained buffers, so a reference needs its own.
    return jnp.copy(w) if path in copied else w

  return jax.tree_util.tree_map_with_path(settle, other)


def _set_stored(
    other: Transformer, model: Transformer, name: str, wanted: str,
    consume: bool,
) -> None:
  """Makes a matrix of `other` quantised as `wanted`, from that of `model`."""
  scale_name, w = name + quantized.SCALE, getattr(model.blocks, name)[...]
  found = model.config.quantized if model.blocks.is_quantized(name) else ""
  if found == wanted:
    return
  if found:
    w = _replaced(
        quantized.dequantize_stack, w,
        getattr(model.blocks, scale_name)[...], name, found, consume=consume)
    delattr(other.blocks, scale_name)
  if wanted:
    if model.config.num_experts and name in ("gate", "up", "down"):
      raise ValueError(
          f"compute.frozen_dtype={wanted!r} does not quantise experts yet. Use "
          "float32 or bfloat16.")
    w, scale = _replaced(
        quantized.quantize_stack, w, name, wanted, consume=consume)
    setattr(other.blocks, scale_name, nnx.Param(scale))
  setattr(other.blocks, name, nnx.Param(w))


def reference(
    model: Transformer, trained: Collection[str], dtype: str) -> Transformer:
  """Copies the model as the reference (for KL); frozen leaves are shared.

  The trained leaves are copies, since updates consume the originals.
  """
  return at_rest(model, (), dtype, copied=trained, consume=False)


def split(
    model: Transformer, trained: Collection[str],
) -> tuple[Transformer, Transformer]:
  """Splits a model into its trained part and its frozen part."""
  part = lambda inside: jax.tree_util.tree_map_with_path(
      lambda path, w: w if (path_name(path) in trained) == inside else None,
      model)
  return part(True), part(False)


def join(trained: Transformer, frozen: Transformer) -> Transformer:
  """Joins the two parts of a model; the result shares their arrays."""
  return jax.tree.map(
      lambda a, b: b if a is None else a, trained, frozen,
      is_leaf=lambda x: x is None)


def _replaced(function: Callable, *args: Any, consume: bool) -> Any:
  """Calls the function, and deletes its arguments' arrays if `consume`.

  JAX would free them only when the last Python reference is gone, and callers
  up the stack still hold the model.
  """
  made = function(*args)
  if consume:
    for array in jax.tree.leaves(args):
      if isinstance(array, jax.Array) and not isinstance(
          array, jax.core.Tracer):
        array.delete()
  return made
