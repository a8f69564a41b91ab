"""What training carries from step to step, and its plain-dict form."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Parameters, optimizer state and the number of updates made (int32)."""

  model: Transformer
  opt_state: Any
  step: jax.Array


def create(
    model: Transformer, optimizer: optax.GradientTransformation,
) -> TrainState:
  """Step 0. The optimizer state takes the layout of the parameters."""
  # The step too is born under jit, on the whole mesh: of an array on one
  # device, hosts cannot save parts.
  opt_state, step = jax.jit(
      lambda model: (optimizer.init(model), jnp.zeros((), jnp.int32)))(model)
  return TrainState(model=model, opt_state=opt_state, step=step)


def skip(state: TrainState) -> TrainState:
  """One step further without an update: there was nothing to learn from."""
  return dataclasses.replace(state, step=state.step + 1)


def _names(path) -> tuple[str, ...]:
  """("model", "blocks", "q"): no trace of Flax's or Optax's classes."""
  parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
  return tuple(part for part in parts if part != "value")


def to_dict(tree: Any) -> dict:
  """Any pytree as nested plain dicts of its leaves, for checkpoints."""
  nested: dict = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    *parents, last = _names(path)
    node = nested
    for name in parents:
      node = node.setdefault(name, {})
    node[last] = leaf
  return nested


def from_dict(like: Any, nested: dict) -> Any:
  """The pytree `like` with the leaves of `to_dict`'s result.

  Raises:
    KeyError: a leaf of `like` is not in `nested`.
  """
  def leaf(path, _):
    node = nested
    for name in _names(path):
      node = node[name]
    return node

  return jax.tree_util.tree_map_with_path(leaf, like)
