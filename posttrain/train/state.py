"""What training carries from step to step, and its plain-dict form."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain.model.transformer import Transformer
from posttrain.train import spikes as spikes_lib
from posttrain.train import trainable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Parameters, optimizer state and the number of updates made (int32).

  Attributes:
    trained: the part of the model that updates move (`partition.split`).
    opt_state: of that part alone.
    step: scalar int32.
    frozen: the other part; None where a compiled update moves the rest.
    losses: the last ones, for a `spikes.Rule`; None without a rule.
  """

  trained: Transformer
  opt_state: Any
  step: jax.Array
  frozen: Any
  losses: Any = None

  @property
  def model(self) -> Transformer:
    """Both parts, without a copy."""
    return trainable.join(self.trained, self.frozen)


def create(
    model: Transformer, optimizer: optax.GradientTransformation,
    trained: Collection[str] | None = None,
    spikes: spikes_lib.Rule | None = None,
) -> TrainState:
  """Step 0. The optimizer state takes the layout of the parameters.

  Args:
    trained: paths of the parameters that updates move; None: all.
    spikes: the rule of the updates, if they have one.
  """
  moving, frozen = trainable.split(
      model, trainable.paths(model) if trained is None else trained)
  # The step too is born under jit, on the whole mesh: of an array on one
  # device, hosts cannot save parts.
  opt_state, step, losses = jax.jit(
      lambda model: (optimizer.init(model), jnp.zeros((), jnp.int32),
                     spikes and spikes.start()))(moving)
  return TrainState(
      trained=moving, opt_state=opt_state, step=step, frozen=frozen,
      losses=losses)


def skip(state: TrainState) -> TrainState:
  """One step further without an update: there was nothing to learn from."""
  return dataclasses.replace(state, step=state.step + 1)


def to_checkpoint(state: TrainState) -> dict:
  """All that moves, as `to_dict` has it: what a checkpoint holds."""
  seen = {} if state.losses is None else {"losses": state.losses}
  return {"model": to_dict(state.trained), "opt_state": to_dict(
      state.opt_state), "step": state.step, **seen}


def from_checkpoint(like: TrainState, tree: dict) -> TrainState:
  """The state `like` with the arrays of `to_checkpoint`'s result."""
  return dataclasses.replace(
      like, trained=from_dict(like.trained, tree["model"]),
      opt_state=from_dict(like.opt_state, tree["opt_state"]),
      step=tree["step"], losses=tree.get("losses"))


def to_dict(tree: Any) -> dict:
  """Any pytree as nested plain dicts of its leaves, for checkpoints."""
  nested: dict = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    *parents, last = trainable.path_name(path).split("/")
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
    for name in trainable.path_name(path).split("/"):
      node = node[name]
    return node

  return jax.tree_util.tree_map_with_path(leaf, like)
