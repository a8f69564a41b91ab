"""Weight sync: copies the policy from the devices that train to the sampler's.

JAX copies arrays from one set of devices to another within one process only.
Where the roles are split, every process has devices of both roles. An array is
gathered on the devices that train, a slab at a time, and each process cuts the
parts of its own sampling devices out of its copy. So any layout can become any
other, on any number of hosts.
"""

import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from posttrain import sharding
from posttrain.model import quantized
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.train import fingerprint, trainable
from posttrain.train.trainable import path_name

SLAB_BYTES = 2**28  # Largest slab, which is whole on every training device.


class WeightSyncError(RuntimeError):
  """The sampler does not hold what the trainer sent."""


class WeightSync:
  """Gives the sampler a version of the weights; moves what has changed.

  Attributes:
    mesh: of the devices that only sample.
    seconds, bytes: of the last call, the bytes in the sampler's dtypes.
  """

  def __init__(self, like: Transformer, sampling: jax.sharding.Mesh):
    """
    Args:
      like: abstract arrays, as the sampler wants them.
      sampling: the mesh that they are to be on.
    """
    self.mesh = sampling
    self._like = jax.tree.map(
        lambda x: sharding.on_mesh(x, sampling), like)
    self._held: dict[str, tuple[jax.Array, jax.Array]] = {}
    self.seconds, self.bytes = 0.0, 0

  def __call__(self, model: Transformer) -> Transformer:
    """Copies weights to the sampling mesh; call it on the training mesh.

    Raises:
      WeightSyncError: a fingerprint differs.
    """
    started = time.monotonic()
    wanted = dict(named(self._like))
    sent, arrived = {}, {}
    for name, x in named(model):
      held = self._held.get(name)
      if held is None or held[0] is not x:  # What is frozen stays the same.
        sent[name], arrived[name] = x, moved(x, wanted[name])
        self._held[name] = x, arrived[name]
    self._check(sent, arrived)
    self.bytes = sum(x.nbytes for x in arrived.values())
    self.seconds = time.monotonic() - started
    return jax.tree.unflatten(
        jax.tree.structure(self._like),
        [self._held[name][1] for name in wanted])

  def _check(
      self, sent: dict[str, jax.Array], arrived: dict[str, jax.Array],
  ) -> None:
    with jax.set_mesh(self.mesh):
      found = fingerprint.of(arrived)
    cast = {name: x.astype(arrived[name].dtype) for name, x in sent.items()}
    for name, number in fingerprint.of(cast).items():
      if found[name] != number:
        raise WeightSyncError(
            f"The sampler's {name} has the fingerprint {found[name]:#010x}, "
            f"and {number:#010x} was sent: a copy between devices is damaged.")


def wanted(
    config: ModelConfig, plan: trainable.Plan, sampling: jax.sharding.Mesh, *,
    weights_dtype: str,
) -> Transformer:
  """Makes the policy on the sampling mesh, as abstract arrays.

  Args:
    config, plan: the model that the stage starts from, and its training.
    weights_dtype: as in `sampler_dtypes`.
  """
  with jax.set_mesh(sampling):
    like, _ = trainable.abstract(config, plan)
  like = sampler_dtypes(like, weights_dtype=weights_dtype)
  return jax.tree.map(lambda x: sharding.on_mesh(x, sampling), like)


def sampler_dtypes(
    like: Transformer, *, weights_dtype: str) -> Transformer:
  """Gives abstract arrays the dtypes in which a copy loses nothing.

  The sampler multiplies by the layers' matrices in the compute dtype, so they
  travel in it; not where it makes int8 of them, or adds adapters to them.

  Args:
    like: abstract arrays, as they are trained.
    weights_dtype: of the rollout.
  """
  config = like.config
  merged = config.lora is not None and config.lora.decode == "merged"
  if weights_dtype != "compute" or merged:
    return like

  def wanted(path, x):
    name = path_name(path)
    kept = not name.startswith("blocks/") or "_norm" in name or (
        name.endswith((quantized.SCALE, quantized.CHANNELS)))
    if kept or x.dtype != jnp.float32:
      return x
    return jax.ShapeDtypeStruct(x.shape, config.dtype, sharding=x.sharding)

  return jax.tree_util.tree_map_with_path(wanted, like)


def moved(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  """Copies an array to other devices, in another layout and dtype.

  Args:
    x: of any layout, on the current mesh.
    like: what it is to be; its sharding is of devices of the same processes.
  """
  axis, size = slab(x, like.dtype)
  indices = like.sharding.addressable_devices_indices_map(x.shape)
  parts: dict[Any, list[jax.Array]] = {device: [] for device in indices}
  for start in range(0, x.shape[axis] if x.ndim else 1, size):
    whole = gathered(x, start, size=size, axis=axis, dtype=like.dtype)
    copies = whole.addressable_shards
    for n, (device, index) in enumerate(indices.items()):
      part = _within(index, axis, start, size) if x.ndim else ()
      if part is not None:
        # In turn, so that no device's link is the only one in use.
        copy = copies[n % len(copies)]
        with sharding.single_device_mesh(copy.device):
          piece = copy.data[part]
        parts[device].append(jax.device_put(piece, device))
  return jax.make_array_from_single_device_arrays(
      x.shape, like.sharding, [
          _joined(found, axis, device) for device, found in parts.items()])


def _joined(parts: list[jax.Array], axis: int, device: Any) -> jax.Array:
  """Joins the slabs of one device's part, on that device."""
  if len(parts) == 1:
    return parts[0]
  with sharding.single_device_mesh(device):
    return jnp.concatenate(parts, axis)


def slab(
    x: jax.Array | jax.ShapeDtypeStruct, dtype: Any) -> tuple[int, int]:
  """Chooses an axis that is not split, and a slab's length along it."""
  split = jax.typeof(x).sharding.spec
  free = [n for n, names in enumerate(split) if names is None and x.shape[n]]
  if not free:
    return 0, x.shape[0] if x.ndim else 1
  axis = free[0]
  length = x.shape[axis]
  one = math.prod(x.shape) // length * jnp.dtype(dtype).itemsize
  most = max(1, SLAB_BYTES // one)
  return axis, next(n for n in range(min(most, length), 0, -1)
                    if length % n == 0)


def _within(
    index: tuple[slice, ...], axis: int, start: int, size: int,
) -> tuple[slice, ...] | None:
  """Finds the part of a slab that a device holds, or None."""
  first = max((index[axis].start or 0) - start, 0)
  stop = index[axis].stop
  last = min(size, size if stop is None else stop - start)
  if first >= last:
    return None
  return (*index[:axis], slice(first, last), *index[axis + 1:])


@functools.partial(jax.jit, static_argnames=("size", "axis", "dtype"))
def gathered(
    x: jax.Array, start: jax.Array, *, size: int, axis: int, dtype: Any,
) -> jax.Array:
  """Gathers a slab, whole on every device."""
  if x.ndim and size < x.shape[axis]:
    x = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
  return sharding.replicate(x.astype(dtype))


def named(tree: Any) -> list[tuple[str, Any]]:
  """Lists every array with its path, in order."""
  return [(path_name(path), x)
          for path, x in jax.tree.leaves_with_path(tree)]
