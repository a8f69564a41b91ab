"""Logical axis names -> mesh axes. The only module that knows the mesh.

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

# From the slowest network to the fastest: of several slices the first axis
# goes across them, and neighbours on the last are neighbours on the torus.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
ALWAYS = ("fsdp", "tensor")  # In every mesh; the others if there are several.

# Where a name has several mesh axes, it is split over all of them that the
# mesh has. "expert" and "context" split the parameters at rest, as "fsdp"
# does; "data" does not: each of its parts holds all of them.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),  # Of what is trained on.
    # The sampler's batch: a row's tokens stay together, its cache with them.
    "rows": ("data", "fsdp", "expert", "context"),
    "slots": (),
    "embed": ("fsdp", "expert", "context"),  # At rest; gathered by layer.
    "vocab": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),  # Never gathered: tokens come to them.
    "expert_embed": ("fsdp", "context"),  # As "embed", of experts' weights.
    "router": (),  # Every device knows the whole choice.
    "layers": (),
    "groups": (),  # Query heads of one kv head; completions of one prompt.
    "head_dim": (),
    # While a length that is split is whole, its heads are split further.
    "kv_heads_of_length": ("tensor", "context"),
    "groups_of_length": ("context",),
    "act_embed": (),
    "rank": (),  # Of an adapter.
}


def make_mesh(
    fsdp: int = -1, tensor: int = 1, devices=None, *, data: int = 1,
    expert: int = 1, context: int = 1, in_order: bool = False,
    section: str = "mesh",
) -> jax.sharding.Mesh:
  """An Explicit mesh over `devices` (all of them by default).

  It has the axes "fsdp" and "tensor", and each of the others if there is more
  than one of it: what does not use them knows two axes only.

  Args:
    fsdp, tensor, data, expert, context: sizes; at most one is -1, "the
      remaining devices".
    in_order: take the devices as they come, and not as the torus has them:
      for those that are no whole torus.
    section: of the config, for messages.

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
  """Why sizes do not multiply to so many devices, and what would."""
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
  """The mesh that trains, of a config's section `mesh`: all devices, or a part.
  """
  return roles_of(sizes, devices)[0]


def roles_of(
    sizes: Mapping[str, Any], devices=None,
) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
  """The mesh that trains and that which samples, of a section `mesh`.

  One and the same if the roles are shared. If they are split, every process
  has devices of both: the first `sampling.devices` of its own sample.

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
  # A part is no torus, so there is no order that the links prefer.
  return (make(sizes, devices=training, in_order=True),
          make(sizes["sampling"], devices=sampling, in_order=True,
               section="mesh.sampling"))


def split_devices(devices: Iterable[Any], count: int) -> tuple[list, list]:
  """The first `count` devices of each process, and the others.

  Raises:
    ValueError: a process has no more than `count`.
  """
  of_process: dict[int, list] = {}
  for device in sorted(devices, key=lambda d: (d.process_index, d.id)):
    of_process.setdefault(device.process_index, []).append(device)
  for process, own in of_process.items():
    if len(own) <= count:
      raise ValueError(
          f"mesh.sampling.devices={count} leaves process {process} no device "
          f"to train with: it has {len(own)}. Set it to {len(own) - 1} or "
          'less, or mesh.roles="shared".')
  first, rest = [], []
  for own in of_process.values():
    first += own[:count]
    rest += own[count:]
  return first, rest


class MeshSizes(NamedTuple):
  """Devices along each axis; 1 where the mesh has no such axis."""

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1

  @property
  def parts(self) -> int:
    """Of a parameter at rest, its split over "tensor" apart."""
    return self.fsdp * self.expert * self.context

  @property
  def batch(self) -> int:
    """Parts of a training batch; `length` is split besides."""
    return self.data * self.fsdp * self.expert

  @property
  def rows(self) -> int:
    """Parts of the sampler's rows."""
    return self.batch * self.context


def mesh_sizes() -> MeshSizes:
  """Of the current mesh."""
  here = jax.sharding.get_abstract_mesh().shape
  return MeshSizes(**{name: here.get(name, 1) for name in MESH_AXES})


def platform() -> str | None:
  """Of the current mesh's devices, such as "tpu"; None where it has none."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else None


def mesh_axes(axis: str) -> tuple[str, ...]:
  """The axes of the current mesh that split a logical axis."""
  here = jax.sharding.get_abstract_mesh().axis_names
  return tuple(name for name in RULES[axis] if name in here)


def _grid(sizes: dict[str, int], devices) -> np.ndarray:
  """Devices where neighbours on an axis are neighbours on the torus.

  Of several slices, the first axis alone goes across them: the network
  between slices is slower than that within one.
  """
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  (name, first), *others = sizes.items()
  within = tuple(size for _, size in others)
  if slices == 1:
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
  """`spec("batch", "vocab", None)` -> `P("fsdp", "tensor", None)`."""
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


def whole(x: jax.Array) -> jax.Array:
  """All of it on every device of the current mesh."""
  return jax.sharding.reshard(x, P())


def on_mesh(
    like: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh,
) -> jax.ShapeDtypeStruct:
  """Abstract arrays, made for a mesh like this one, on its devices."""
  return jax.ShapeDtypeStruct(
      like.shape, like.dtype,
      sharding=NamedSharding(mesh, like.sharding.spec))


def alone(device: Any):
  """A mesh of one device: for what is done with its own arrays only."""
  return jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("device",)))


def gather_fsdp(w: jax.Array) -> jax.Array:
  """All-gathers a parameter where it rests split as "embed" is.

  Its tensor split stays, and that of the experts over "expert". What is
  whole already stays as it is.
  """
  at_rest = jax.typeof(w).sharding.spec
  resting = (*spec("embed"), *spec("expert_embed"))
  gathered = P(*(None if axis in resting else axis for axis in at_rest))
  return jax.sharding.reshard(w, gathered) if gathered != at_rest else w


def lengthwise(x: jax.Array, *axes: str | None) -> P:
  """The layout of [B, T, ...] `x`, with other axes behind the first two.

  What is computed along the stream of activations lies as the stream does:
  split over "batch" and "length" in training, over "rows" in the sampler.
  """
  return P(*jax.typeof(x).sharding.spec[:2], *spec(*axes))


def splits_length(x: jax.Array) -> bool:
  """Whether devices hold parts of the length of [B, T, ...] `x`."""
  return jax.typeof(x).sharding.spec[1] is not None


def whole_length(x: jax.Array) -> jax.Array:
  """[B, T, ...], its length gathered if it was split."""
  rows, _, *rest = jax.typeof(x).sharding.spec
  return jax.sharding.reshard(
      x, P(rows, None, *rest)) if splits_length(x) else x


def length_to_rows(x: jax.Array) -> jax.Array:
  """[B, T, ...] -> [B * n, T / n, ...]: each device's part is rows of its own.

  For what looks at one position only. Nothing moves, so that the rows come in
  the order of the devices.
  """
  return _taken_as(
      x, ("batch", "length"), ("rows", None), *(None,) * (x.ndim - 2))


def rows_to_length(x: jax.Array) -> jax.Array:
  """Back from `length_to_rows`."""
  return _taken_as(
      x, ("rows", None), ("batch", "length"), *(None,) * (x.ndim - 2))


def _taken_as(x: jax.Array, before, after, *rest: str | None) -> jax.Array:
  """The array of the same parts in another layout: of another shape."""
  return jax.shard_map(
      lambda x: x, in_specs=spec(*before, *rest),
      out_specs=spec(*after, *rest))(x)


def per_shard(function: Callable[..., Any], *arrays: jax.Array) -> Any:
  """`function` of each device's own parts.

  For code that is not written for sharded axes, and mixes no two parts.

  Args:
    function: its results are laid out as the first array is.
    *arrays: laid out alike wherever `function` combines them.
  """
  specs = tuple(jax.typeof(x).sharding.spec for x in arrays)
  # Nothing here is a collective, which is what the check is about.
  return jax.shard_map(
      function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


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


_waited = 0.0
_waits_since: float | None = None


@contextlib.contextmanager
def waiting() -> Iterator[None]:
  """Around what waits for devices, and so for the other hosts."""
  global _waited, _waits_since
  _waits_since = start = time.monotonic()
  try:
    yield
  finally:
    _waits_since = None
    _waited += time.monotonic() - start


def waits() -> float:
  """Seconds of the `waiting` that this host is in now; 0 if it is in none."""
  since = _waits_since
  return 0.0 if since is None else time.monotonic() - since


def waited() -> float:
  """Seconds within `waiting` so far; the rest is this host's own time."""
  return _waited


def fetch(tree: Any) -> Any:
  """Whole NumPy arrays, on every host, of a tree of global arrays."""
  with waiting():
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
  with waiting(), _all_devices():
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def of_all_hosts(array: np.ndarray) -> np.ndarray:
  """Every process's array, on every host, along a new first axis."""
  with _all_devices():
    return np.asarray(multihost_utils.process_allgather(array))


def _all_devices():
  """The mesh may be of a part of them, and all processes are to meet."""
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
  """Whether it is true on one host at least; every host has to ask."""
  if jax.process_count() == 1:
    return flag
  with waiting():
    return bool(of_all_hosts(np.array(flag)).any())
