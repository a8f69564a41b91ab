"""Train state: what is carried from step to step; its dict form, host offload.

Host offload keeps arrays in the hosts' memory while they are not needed. A
sharding says which devices hold the parts of an array; its memory kind says if
they are in the devices' own memory or, pinned, in that of their hosts. Each
host keeps the parts of its own devices. Moving changes no bit.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from posttrain.model.transformer import Transformer
from posttrain.train import spikes as spikes_lib
from posttrain.train import trainable

HOST = "pinned_host"  # The kind of memory that keeps what is offloaded.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Parameters, optimizer state and the number of updates made (int32).

  Attributes:
    trained: the trained part of the model (`trainable.split`).
    opt_state: the optimizer's state, for that part alone.
    step: scalar int32.
    frozen: the frozen part; None inside a compiled update, to which it is an
      argument of its own.
    losses: [window] float32, the last losses for a `spikes.Rule`; None without
      a rule.
  """

  trained: Transformer
  opt_state: Any
  step: jax.Array
  frozen: Any
  losses: Any = None

  @property
  def model(self) -> Transformer:
    """Joins both parts, without a copy."""
    return trainable.join(self.trained, self.frozen)


def create(
    model: Transformer, optimizer: optax.GradientTransformation,
    trained: Collection[str] | None = None,
    spikes: spikes_lib.Rule | None = None,
) -> TrainState:
  """Makes the state of step 0, in the layout of the parameters.

  Args:
    trained: paths of the trained parameters; None: all.
    spikes: the rule for loss spikes; None: no rule.
  """
  moving, frozen = trainable.split(
      model, trainable.paths(model) if trained is None else trained)
  # The step is made under jit too, so that it is on the whole mesh: hosts
  # cannot save an array together that is on a single device.
  opt_state, step, losses = jax.jit(
      lambda model: (optimizer.init(model), jnp.zeros((), jnp.int32),
                     spikes and spikes.start()))(moving)
  return TrainState(
      trained=moving, opt_state=opt_state, step=step, frozen=frozen,
      losses=losses)


def skip(state: TrainState) -> TrainState:
  """Advances the step without an update: there was nothing to learn from."""
  return dataclasses.replace(state, step=state.step + 1)


def to_checkpoint(state: TrainState) -> dict:
  """Returns the parts that change, as nested dicts: a checkpoint's content."""
  seen = {} if state.losses is None else {"losses": state.losses}
  return {"model": to_dict(state.trained), "opt_state": to_dict(
      state.opt_state), "step": state.step, **seen}


def from_checkpoint(like: TrainState, tree: dict) -> TrainState:
  """Returns the state `like` with the arrays of a checkpoint."""
  return dataclasses.replace(
      like, trained=from_dict(like.trained, tree["model"]),
      opt_state=from_dict(like.opt_state, tree["opt_state"]),
      step=tree["step"], losses=tree.get("losses"))


def to_dict(tree: Any) -> dict:
  """Converts a pytree to nested plain dicts of its leaves, for checkpoints."""
  return traverse_util.unflatten_dict({
      trainable.path_name(path): leaf
      for path, leaf in jax.tree.leaves_with_path(tree)}, sep="/")


def from_dict(like: Any, nested: dict) -> Any:
  """Returns the pytree `like` with the leaves of nested dicts.

  Raises:
    KeyError: a leaf of `like` is not in `nested`.
  """
  flat = traverse_util.flatten_dict(nested, sep="/")
  return jax.tree_util.tree_map_with_path(
      lambda path, _: flat[trainable.path_name(path)], like)


def check_offload(names: Collection[str]) -> None:
  """Raises ValueError if the backend cannot keep arrays on the host.

  Args:
    names: content of `compute.offload`; empty if nothing is offloaded.
  """
  device = jax.local_devices()[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if names and HOST not in kinds:
    raise ValueError(
        f"compute.offload={tuple(names)} needs memory of the kind {HOST!r}; "
        f"{device.device_kind} ({device.platform}) has {', '.join(kinds)}. "
        "Leave compute.offload out.")


def to_host(tree: Any, *, but: Any = ()) -> Any:
  """Copies arrays to the hosts' memory.

  Args:
    tree: any tree of arrays.
    but: arrays of this tree are left where they are.
  """
  # By identity: a reference shares its frozen weights with the policy, which
  # needs them on the devices.
  shared = {id(x) for x in jax.tree.leaves(but)}
  return jax.tree.map(
      lambda x: x if id(x) in shared else _moved(x, HOST), tree)


def to_devices(tree: Any) -> Any:
  """Copies arrays to the devices' memory, unless they are there."""
  return jax.tree.map(
      lambda x: _moved(x, "device") if x.sharding.memory_kind == HOST else x,
      tree)


def _moved(x: jax.Array, kind: str) -> jax.Array:
  return jax.device_put(x, x.sharding.with_memory_kind(kind))
