"""Logical axis names -> mesh axes. The only module that knows the mesh.

The mesh is Explicit: an array's sharding is part of its type. An operation
whose output layout is ambiguous is a trace-time error, on any machine, so a
layout can be checked without the devices it is meant for.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("fsdp", "tensor")

RULES = {
    "batch": "fsdp",
    "embed": "fsdp",  # Parameters at rest; gathered layer by layer.
    "vocab": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    "length": None,
    "groups": None,  # Query heads of one kv head; completions of one prompt.
    "head_dim": None,
    "act_embed": None,
}


def make_mesh(
    fsdp: int = -1, tensor: int = 1, devices=None,
) -> jax.sharding.Mesh:
  """A two-axis Explicit mesh over `devices` (all of them by default).

  Args:
    fsdp, tensor: sizes; at most one is -1, "the remaining devices".

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {"fsdp": fsdp, "tensor": tensor}
  wildcards = [name for name, size in sizes.items() if size == -1]
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if len(wildcards) == 1 and fixed > 0 and len(devices) % fixed == 0:
    sizes[wildcards[0]] = len(devices) // fixed
  if min(sizes.values()) < 1 or np.prod(list(sizes.values())) != len(devices):
    raise ValueError(
        f"mesh.fsdp={fsdp} and mesh.tensor={tensor} do not multiply to the "
        f"{len(devices)} devices that are here. Set one of them to -1 for "
        '"all remaining devices".')
  return jax.make_mesh(
      (sizes["fsdp"], sizes["tensor"]), MESH_AXES, devices=devices,
      axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def spec(*axes: str | None) -> P:
  """`spec("batch", "length", None)` -> `P("fsdp", None, None)`."""
  return P(*(None if axis is None else RULES[axis] for axis in axes))


def axis_size(axis: str) -> int:
  """In how many parts the current mesh splits a logical axis."""
  name = RULES[axis]
  return 1 if name is None else jax.sharding.get_abstract_mesh().shape[name]


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
  """Reshards `x`, inside or outside `jit`."""
  return jax.sharding.reshard(x, spec(*axes))


def gather_fsdp(w: jax.Array) -> jax.Array:
  """All-gathers a parameter over "fsdp"; its tensor split stays."""
  at_rest = jax.typeof(w).sharding.spec
  gathered = P(*(None if axis == "fsdp" else axis for axis in at_rest))
  return jax.sharding.reshard(w, gathered)


def put(array: np.ndarray, *axes: str | None) -> jax.Array:
  """A global array from one that every host holds whole; each takes its part.

  Args:
    array: any shape; the same on every host.
    *axes: logical names, one per dimension.
  """
  array = np.asarray(array)
  sharding = NamedSharding(jax.sharding.get_mesh(), spec(*axes))
  return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index])


def fetch(tree: Any) -> Any:
  """Whole NumPy arrays, on every host, of a tree of global arrays."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def of_first_host(array: np.ndarray) -> np.ndarray:
  """Process 0's array, on every host.

  For what each host finds out by itself and may find differently, such as a
  grader's time-out or whether a file is there.

  Args:
    array: of the same shape and dtype everywhere; at most 32 bits a number.
  """
  if jax.process_count() == 1:
    return array
  return np.asarray(multihost_utils.broadcast_one_to_all(array))
