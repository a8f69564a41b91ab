"""Logical axis names to mesh axes; the only module that names mesh axes.

Five kinds of parallelism are axes of one mesh:

  data     data parallelism: replicas, each with all parameters
  fsdp     fully sharded data parallelism: parameters at rest are split, and
           gathered where they are used
  expert   expert parallelism: each device holds some of the experts
  context  context parallelism: each device holds a part of the length
  tensor   tensor parallelism: heads, feed-forward and vocabulary are split

The mesh is Explicit: an array's sharding is part of its type. An operation
whose output layout is ambiguous is a trace-time error, on any machine, so a
layout can be checked without the devices it is meant for.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

# From the slowest network to the fastest. The first axis alone goes across
# slices, since data parallelism sends one gradient per update. The last axis
# has its neighbours on the torus, since tensor parallelism sends activations
# in every layer.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
ALWAYS = ("fsdp", "tensor")  # In every mesh; the others if larger than 1.

# A logical axis with several mesh axes is split over all of them that the
# mesh has. "expert" and "context" split the parameters at rest, as "fsdp"
# does, so that no device keeps a copy that another one has. "data" does not:
# each replica holds all parameters.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),  # In training and in logprobs of whole sequences.
    # The sampler's batch. A row stays on one device, since its KV cache would
    # otherwise be exchanged for every token; so "context" splits rows here.
    "rows": ("data", "fsdp", "expert", "context"),
    "slots": (),  # Slots of the KV cache, see "rows".
    # Weights at rest; a layer's are gathered when that layer is computed.
    "embed": ("fsdp", "expert", "context"),
    "vocab": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),  # Never gathered: tokens come to them.
    "expert_embed": ("fsdp", "context"),  # As "embed", of experts' weights.
    "router": (),  # Every device computes the choice among all experts.
    "layers": (),
    "groups": (),  # Query heads of one kv head; completions of one prompt.
    "head_dim": (),
    # In attention under context parallelism (Ulysses) the length is whole, and
    # the heads are split over "context" in its place.
    "kv_heads_of_length": ("tensor", "context"),
    "groups_of_length": ("context",),
    "act_embed": (),
    "rank": (),  # The low rank of a LoRA adapter.
}


def make_mesh(
    fsdp: int = -1, tensor: int = 1, devices=None, *, data: int = 1,
    expert: int = 1, context: int = 1, in_order: bool = False,
    section: str = "mesh",
) -> jax.sharding.Mesh:
  """Makes an Explicit mesh over `devices`, by default all of them.

  It has the axes "fsdp" and "tensor", and each of the others if its size is
  above 1: a program that uses two axes is compiled for two.

  Args:
    fsdp, tensor, data, expert, context: sizes; at most one is -1, "the
      remaining devices".
    in_order: keep the order of `devices` rather than follow the links of the
      torus; needed for devices that form no whole torus.
    section: the config's section that the sizes are from, for messages.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or the
      first axis cannot go across the slices.
  """
  devices = jax.devices() if devices is None else devices
  asked = dict(zip(
      MESH_AXES, (data, fsdp, expert, context, tensor), strict=True))
  sizes = asked.copy()
  wildcards = [name for name, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(wildcards) == 1 and fixed > 0 and len(devices) % fixed == 0:
    sizes[wildcards[0]] = len(devices) // fixed
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
    raise ValueError(_does_not_fit(asked, len(devices), section))
  sizes = {name: size for name, size in sizes.items()
           if name in ALWAYS or size > 1}
  grid = (np.array(devices).reshape(tuple(sizes.values())) if in_order
          else _grid(sizes, devices))
  return jax.sharding.Mesh(
      grid, tuple(sizes),
      axis_types=(AxisType.Explicit,) * len(sizes))


def _does_not_fit(
    asked: Mapping[str, int], count: int, section: str) -> str:
  """Explains why sizes do not multiply to the number of devices."""
  names = [name for name, size in asked.items() if name in ALWAYS or size != 1]
  found = [f"{section}.{name}={asked[name]}" for name in names]
  here = f"{count} device{'s' if count > 1 else ''}"
  text = f"{', '.join(found[:-1])} and {found[-1]} do not fit {here}: "
  fixed = math.prod(size for size in asked.values() if size != -1)
  if -1 in asked.values():
    return text + (f"sizes beside -1 must multiply to a divisor of {count}, "
                   f"and give {fixed}.")
  text += f"they multiply to {fixed}. "
  for name in names:
    if asked[name] and not count % max(1, fixed // asked[name]):
      return text + f'Set {section}.{name}=-1 for "all remaining devices".'
  return text + f"Make them smaller: they must multiply to {count}."


def mesh_of(sizes: Mapping[str, Any], devices=None) -> jax.sharding.Mesh:
  """Makes the mesh that trains, from the config's section `mesh`."""
  return roles_of(sizes, devices)[0]


def roles_of(
    sizes: Mapping[str, Any], devices=None,
) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
  """Makes the mesh that trains and that which samples, from section `mesh`.

  With shared roles both are the same mesh. With split roles (`mesh.roles`)
  every process has devices of both: its first `sampling.devices` sample.

  Raises:
    ValueError: a process has no device left to train with, or as `make_mesh`.
  """
  make = lambda sizes, **more: make_mesh(
      **{name: sizes[name] for name in MESH_AXES if name in sizes}, **more)
  if sizes["roles"] == "shared":
    mesh = make(sizes, devices=devices)
    return mesh, mesh
  sampling, training = split_devices(
      jax.devices() if devices is None else devices,
      sizes["sampling"]["devices"])

  # A part of the devices is no torus, so no order is preferred by the links.
  return (make(sizes, devices=training, in_order=True),
          make(sizes["sampling"], devices=sampling, in_order=True,
               section="mesh.sampling"))


def split_devices(devices: Iterable[Any], count: int) -> tuple[list, list]:
  """Splits the devices into the first `count` of each process, and the others.

  Raises:
    ValueError: a process has `count` devices or fewer.
  """
  # By process and id, so that every host computes the same two lists.
  of_process: dict[int, list] = {}
  for device in sorted(devices, key=lambda d: (d.process_index, d.id)):
    of_process.setdefault(device.process_index, []).append(device)
  for process, own in of_process.items():
    if len(own) <= count:
      raise ValueError(
          f"mesh.sampling.devices={count} leaves process {process} no device "
          f"to train with: it has {len(own)}. Set it to {len(own) - 1} or "
          'less, or mesh.roles="shared".')
  hosts = of_process.values()
  return ([device for own in hosts for device in own[:count]],
          [device for own in hosts for device in own[count:]])


class MeshSizes(NamedTuple):
  """Devices along each mesh axis; 1 where the mesh lacks the axis."""

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1

  @property
  def parts(self) -> int:
    """Parts of a parameter at rest, before its split over "tensor"."""
    return self.fsdp * self.expert * self.context

  @property
  def batch(self) -> int:
    """Number of parts of a training batch's rows (data parallel degree)."""
    return self.data * self.fsdp * self.expert

  @property
  def rows(self) -> int:
    """Number of parts of the sampler's rows."""
    return self.batch * self.context


def mesh_sizes(mesh: jax.sharding.Mesh | None = None) -> MeshSizes:
  """Returns the sizes of a mesh; by default of the current one."""
  here = (mesh or jax.sharding.get_abstract_mesh()).shape
  return MeshSizes(**{name: here.get(name, 1) for name in MESH_AXES})


def platform() -> str | None:
  """Returns the current mesh's platform, such as "tpu"; None if abstract."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else None


def mesh_axes(axis: str) -> tuple[str, ...]:
  """Returns the axes of the current mesh that split a logical axis."""
  here = jax.sharding.get_abstract_mesh().axis_names
  return tuple(name for name in RULES[axis] if name in here)


def _grid(sizes: dict[str, int], devices) -> np.ndarray:
  """Arranges devices so that neighbours on an axis are neighbours on the torus.

  With several slices, the first axis alone goes across them: the network
  between slices is slower than that within one.
  """
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  (name, first), *others = sizes.items()
  within = tuple(size for _, size in others)
  if slices == 1:
    # A v5e slice of 2x4 has no axis of 8: an axis may take parts of two
    # physical axes.
    return mesh_utils.create_device_mesh(
        (first, *within), devices, allow_split_physical_axes=True)
  if first % slices:
    raise ValueError(
        f"mesh.{name}={first} cannot be split over the {slices} slices that "
        f"are here. Set mesh.{MESH_AXES[0]} or mesh.{name} to a multiple of "
        f"{slices}.")
  return mesh_utils.create_hybrid_device_mesh(
      (first // slices, *within), (slices,) + (1,) * len(within),
      devices, allow_split_physical_axes=True)


def spec(*axes: str | None) -> P:
  """Maps logical axes to a PartitionSpec of the current mesh.

  `spec("batch", "vocab", None)` is `P("fsdp", "tensor", None)` on a mesh with
  the axes "fsdp" and "tensor".
  """
  def entry(axis):

    names = () if axis is None else mesh_axes(axis)
    return names if len(names) > 1 else names[0] if names else None

  return P(*map(entry, axes))


def axis_size(axis: str) -> int:
  """Returns in how many parts the current mesh splits a logical axis."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes[name] for name in mesh_axes(axis))


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
  """Reshards `x` to logical axes, inside or outside `jit`."""
  return jax.sharding.reshard(x, spec(*axes))


def replicate(x: jax.Array) -> jax.Array:
  """Replicates `x`: every device of the current mesh holds all of it."""
  return jax.sharding.reshard(x, P())


def on_mesh(
    like: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh,
) -> jax.ShapeDtypeStruct:
  """Gives an abstract array the devices of a mesh with the same axes."""
  # A constant's type has no sharding: it is replicated.
  layout = like.sharding.spec if like.sharding else P()
  return jax.ShapeDtypeStruct(
      like.shape, like.dtype, sharding=NamedSharding(mesh, layout))


def single_device_mesh(device: Any):
  """Sets a mesh of one device, for programs on that device's arrays."""
  return jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("device",)))


def gather_fsdp(w: jax.Array) -> jax.Array:
  """All-gathers a parameter that rests split as "embed" is (FSDP).

  Its split over "tensor" stays, and that of experts over "expert". A parameter
  that is whole already is returned as it is.
  """
  at_rest = jax.typeof(w).sharding.spec
  resting = (*spec("embed"), *spec("expert_embed"))
  gathered = P(*(None if axis in resting else axis for axis in at_rest))
  return jax.sharding.reshard(w, gathered) if gathered != at_rest else w


def lengthwise(x: jax.Array, *axes: str | None) -> P:
  """Returns the layout of [B, T, ...] `x` with other axes after the first two.

  The stream of activations keeps the layout of its input: split over "batch"
  and "length" in training, over "rows" in the sampler. So the model names
  neither.
  """
  return P(*jax.typeof(x).sharding.spec[:2], *spec(*axes))


def splits_length(x: jax.Array) -> bool:
  """Tests if devices hold parts of the length of [B, T, ...] `x`."""
  return jax.typeof(x).sharding.spec[1] is not None


def whole_length(x: jax.Array) -> jax.Array:
  """All-gathers the length of [B, T, ...] `x` if it is split."""
  rows, _, *rest = jax.typeof(x).sharding.spec
  return jax.sharding.reshard(
      x, P(rows, None, *rest)) if splits_length(x) else x


def length_to_rows(x: jax.Array) -> jax.Array:
  """Views each device's part of the length as rows: [B * n, T / n, ...].

  `x` is [B, T, ...], its length split in `n`. For code that looks at one
  position at a time, such as the head. Nothing moves between devices, so the
  new rows are in the order of the devices, not of the sequences.
  """
  return _taken_as(
      x, ("batch", "length"), ("rows", None), *(None,) * (x.ndim - 2))


def rows_to_length(x: jax.Array) -> jax.Array:
  """Undoes `length_to_rows`."""
  return _taken_as(
      x, ("rows", None), ("batch", "length"), *(None,) * (x.ndim - 2))


def _taken_as(x: jax.Array, before, after, *rest: str | None) -> jax.Array:
  """Gives an array another layout and shape over the same buffers."""
  return jax.shard_map(
      lambda x: x, in_specs=spec(*before, *rest),
      out_specs=spec(*after, *rest))(x)


def per_shard(function: Callable[..., Any], *arrays: jax.Array) -> Any:
  """Calls `function` on each device's own parts (`shard_map`).

  For code that is not written for sharded axes, and combines no two parts.

  Args:
    function: takes and gives arrays; its results have the layout of the first.
    *arrays: any shapes, with equal layouts along the axes that `function`
      combines.
  """
  specs = tuple(jax.typeof(x).sharding.spec for x in arrays)
  # The check is about the results of collectives; nothing here is one.
  return jax.shard_map(
      function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def abstract(array: np.ndarray, *axes: str | None) -> jax.ShapeDtypeStruct:
  """Describes the array that `put` would make, for devices elsewhere."""
  return jax.ShapeDtypeStruct(
      array.shape, array.dtype,
      sharding=NamedSharding(jax.sharding.get_mesh(), spec(*axes)))


def put(array: np.ndarray, *axes: str | None) -> jax.Array:
  """Makes a global array of one that every host holds; each takes its part.

  Args:
    array: any shape; the same on every host.
    *axes: logical names, one per dimension.
  """
  array = np.asarray(array)
  sharding = NamedSharding(jax.sharding.get_mesh(), spec(*axes))
  return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index])


# Module state, as the wait is a property of the process: `telemetry.stragglers`
# and the connections between hosts read it from other threads.
_waited = 0.0
_waits_since: float | None = None


@contextlib.contextmanager
def waiting() -> Iterator[None]:
  """Counts the time within as a wait for devices, and so for other hosts."""
  global _waited, _waits_since
  _waits_since = start = time.monotonic()
  try:
    yield
  finally:
    _waits_since = None
    _waited += time.monotonic() - start


def waits() -> float:
  """Returns the seconds of the current `waiting`; 0 outside of one."""
  since = _waits_since
  return 0.0 if since is None else time.monotonic() - since


def waited() -> float:
  """Returns the seconds in `waiting` so far; the rest is this host's own."""
  return _waited


def fetch(tree: Any) -> Any:
  """Fetches a tree of global arrays as whole NumPy arrays, on every host."""
  with waiting():
    if jax.process_count() == 1:
      return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def of_first_host(array: np.ndarray) -> np.ndarray:
  """Broadcasts process 0's array to every host.

  For what each host finds out by itself and may find differently, such as a
  grader's time-out or the existence of a file.

  Args:
    array: the same shape and dtype on every host, with numbers of at most 32
      bits: JAX would cut wider ones.
  """
  if jax.process_count() == 1:
    return array
  with waiting(), _all_devices():
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def of_all_hosts(array: np.ndarray) -> np.ndarray:
  """All-gathers every process's array, along a new first axis."""
  with _all_devices():
    return np.asarray(multihost_utils.process_allgather(array))


def _all_devices():
  """Sets a mesh of all devices, as all processes take part in the collective.

  The current mesh may have a part of the devices only (`mesh.roles`).
  """
  return jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()), ("devices",)))


def settle(tree: Any) -> None:
  """Waits for arrays where programs on different devices cannot overlap.

  Processes on CPUs send the messages of all programs over one connection each
  (gloo), and those of two programs at once get mixed up. Accelerators have a
  queue for each device.
  """
  if jax.process_count() > 1 and platform() == "cpu":
    with waiting():
      jax.block_until_ready(tree)


def on_any_host(flag: bool) -> bool:
  """Tests if a flag is true on one host at least; every host has to call it."""
  if jax.process_count() == 1:
    return flag
  with waiting():
    return bool(of_all_hosts(np.array(flag)).any())
