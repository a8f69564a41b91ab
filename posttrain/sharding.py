"""Logical axis names -> mesh axes. The only module that knows the mesh.

The mesh is Explicit: an array's sharding is part of its type. An operation
whose output layout is ambiguous is a trace-time error, on any machine, so a
layout can be checked without the devices it is meant for.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("fsdp", "expert", "tensor")

# Where a name has two mesh axes, the rows of "expert" are rows like others
# outside of the experts: it splits the batch and the parameters at rest too.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("fsdp", "expert"),
    "embed": ("fsdp", "expert"),  # At rest; gathered layer by layer.
    "vocab": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),  # Never gathered: tokens come to them.
    "expert_embed": ("fsdp",),  # As "embed", of the experts' weights.
    "expert_batch": ("fsdp",),  # The tokens that one split of experts sees.
    "router": (),  # Every device knows the whole choice.
    "layers": (),
    "length": (),
    "groups": (),  # Query heads of one kv head; completions of one prompt.
    "head_dim": (),
    "act_embed": (),
    "rank": (),  # Of an adapter.
}


def make_mesh(
    fsdp: int = -1, tensor: int = 1, devices=None, *, expert: int = 1,
) -> jax.sharding.Mesh:
  """An Explicit mesh over `devices` (all of them by default).

  It has the axes "fsdp" and "tensor", and "expert" between them if there is
  more than one of it: what has no experts knows two axes only.

  Args:
    fsdp, tensor, expert: sizes; at most one is -1, "the remaining devices".

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  asked = dict(zip(MESH_AXES, (fsdp, expert, tensor), strict=True))
  sizes = asked.copy()
  wildcards = [name for name, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(wildcards) == 1 and fixed > 0 and len(devices) % fixed == 0:
    sizes[wildcards[0]] = len(devices) // fixed
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
    found = [f"mesh.{name}={size}" for name, size in asked.items()
             if name != "expert" or size != 1]
    raise ValueError(
        f"{', '.join(found[:-1])} and {found[-1]} do not multiply to the "
        f"{len(devices)} devices that are here. Set one of them to -1 for "
        '"all remaining devices".')
  sizes = {name: size for name, size in sizes.items()
           if name != "expert" or size > 1}
  return jax.sharding.Mesh(
      _grid(tuple(sizes.values()), devices), tuple(sizes),
      axis_types=(AxisType.Explicit,) * len(sizes))


class MeshSizes(NamedTuple):
  """Devices along each axis; 1 where the mesh has no such axis."""

  fsdp: int
  expert: int
  tensor: int


def mesh_sizes() -> MeshSizes:
  """Of the current mesh."""
  size = lambda name: jax.sharding.get_abstract_mesh().shape.get(name, 1)
  return MeshSizes(
      fsdp=size("fsdp"), expert=size("expert"), tensor=size("tensor"))


def mesh_axes(axis: str) -> tuple[str, ...]:
  """The axes of the current mesh that split a logical axis."""
  here = jax.sharding.get_abstract_mesh().axis_names
  return tuple(name for name in RULES[axis] if name in here)


def _grid(sizes: tuple[int, ...], devices) -> np.ndarray:
  """Devices where neighbours on an axis are neighbours on the torus.

  Of several slices, the first axis alone goes across them: the network
  between slices is slower than that within one.
  """
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(
        sizes, devices, allow_split_physical_axes=True)
  if sizes[0] % slices:
    raise ValueError(
        f"mesh.{MESH_AXES[0]}={sizes[0]} cannot be split over {slices} "
        "slices. Use a multiple of it.")
  return mesh_utils.create_hybrid_device_mesh(
      (sizes[0] // slices, *sizes[1:]), (slices,) + (1,) * len(sizes[1:]),
      devices, allow_split_physical_axes=True)


def spec(*axes: str | None) -> P:
  """`spec("batch", "length", None)` -> `P("fsdp", None, None)`."""
  def entry(axis):
    names = () if axis is None else mesh_axes(axis)
    return names if len(names) > 1 else names[0] if names else None

  return P(*map(entry, axes))


def axis_size(axis: str) -> int:
  """In how many parts the current mesh splits a logical axis."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes[name] for name in mesh_axes(axis))


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
  """Reshards `x`, inside or outside `jit`."""
  return jax.sharding.reshard(x, spec(*axes))


def gather_fsdp(w: jax.Array) -> jax.Array:
  """All-gathers a parameter where it rests split as "embed" is.

  Its tensor split stays, and that of the experts over "expert".
  """
  at_rest = jax.typeof(w).sharding.spec
  resting = (*spec("embed"), *spec("expert_embed"))
  gathered = P(*(None if axis in resting else axis for axis in at_rest))
  return jax.sharding.reshard(w, gathered)


def per_shard(function: Callable[..., Any], *arrays: jax.Array) -> Any:
  """`function` of each device's own parts.

  For elementwise code that is not written for sharded axes.

  Args:
    function: its results are laid out as the first array is.
    *arrays: of one rank, laid out alike wherever `function` combines them.
  """
  specs = tuple(jax.typeof(x).sharding.spec for x in arrays)
  return jax.shard_map(
      function, in_specs=specs, out_specs=specs[0])(*arrays)


def abstract(array: np.ndarray, *axes: str | None) -> jax.ShapeDtypeStruct:
  """What `put` would make, without making it: for devices elsewhere."""
  return jax.ShapeDtypeStruct(
      array.shape, array.dtype,
      sharding=NamedSharding(jax.sharding.get_mesh(), spec(*axes)))


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
