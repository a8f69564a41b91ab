"""Weight sync, to the devices that only sample: programs and bytes.

`rl.weight_sync` moves an array at a time. The gathers and fingerprints are
compiled here as it compiles them. Casts and cuts of one array and copies to
another device are no programs worth a plan: their bytes are counted. Frozen
weights move before the first batch of rollouts only.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator
from typing import Any

import jax

from posttrain.model.transformer import Transformer
from posttrain.programs.program import SAMPLING, Program, shard_bytes
from posttrain.rl import weight_sync
from posttrain.train import fingerprint


@dataclasses.dataclass(frozen=True)
class Array:
  """One array, at rest and as the sampler wants it."""

  name: str
  sent: jax.ShapeDtypeStruct
  arrived: jax.ShapeDtypeStruct
  trained: bool

  @property
  def cast(self) -> jax.ShapeDtypeStruct:
    """The array at rest, in the sampler's dtype."""
    return jax.ShapeDtypeStruct(
        self.sent.shape, self.arrived.dtype, sharding=self.sent.sharding)


@dataclasses.dataclass(frozen=True)
class Transfer:
  """Arrays that one stage moves before each batch of rollouts.

  Attributes:
    arrays: all of the policy's.
    training, sampling: devices of each role on a host.
  """

  stage: str
  arrays: list[Array]
  training: int
  sampling: int

  def received(self, *, first: bool = False) -> int:
    """Bytes that each sampling device takes in; of trained arrays, or all."""
    return shard_bytes([
        x.arrived for x in self.arrays if x.trained or first])

  def sent(self, *, first: bool = False) -> int:
    """Bytes that a training device hands on at most.

    The sampling devices of a host are served by its training devices in turn.
    """
    return self.received(first=first) * -(-self.sampling // self.training)

  @property
  def bytes(self) -> dict[str, int]:
    """Bytes before each batch of rollouts, and before the first."""
    return {
        "received": self.received(), "sent": self.sent(),
        "received_first": self.received(first=True),
        "sent_first": self.sent(first=True)}


def of_policy(
    stage: str, model: Transformer, paths: Collection[str],
    like: Transformer,
) -> Transfer:
  """Plans the transfer of a policy from the current mesh, which trains.

  Args:
    model: the policy as the training devices hold it.
    paths: of what is trained.
    like: the policy as the sampling devices want it, see
      `weight_sync.wanted`.
  """
  arrays = [
      Array(name, sent, arrived, name in paths)
      for (name, sent), arrived in zip(
          weight_sync.named(model), jax.tree.leaves(like), strict=True)]
  sampling = arrays[0].arrived.sharding.mesh
  count = lambda mesh: len(mesh.devices.flat) // len(
      {device.process_index for device in mesh.devices.flat})
  return Transfer(
      stage, arrays, count(jax.sharding.get_mesh()), count(sampling))


def programs(
    transfer: Transfer, beside: dict[str, Any],
) -> Iterator[Program]:
  """Yields gathers on the current mesh, and fingerprints on both.

  Args:
    beside: abstract arrays that are on the training devices besides the
      policy.
  """
  alike: dict[tuple, list[Array]] = {}
  for array in transfer.arrays:
    alike.setdefault((array.sent, array.arrived.dtype), []).append(array)
  for (x, dtype), same in alike.items():  # One program, run for each slab.
    axis, size = weight_sync.slab(x, dtype)
    slabs = x.shape[axis] // size if x.ndim else 1
    yield Program(
        transfer.stage, "gather", functools.partial(
            weight_sync.gathered.lower, x, 0, size=size, axis=axis,
            dtype=dtype), (x,), SAMPLING, beside | {
                "policy": [y.sent for y in transfer.arrays if y != same[0]]},
        float(slabs * sum(y.trained for y in same)),
        detail=same[0].name)
  trained = [x for x in transfer.arrays if x.trained]
  if len(trained) < len(transfer.arrays):
    yield from _fingerprints(
        transfer, transfer.arrays, beside, calls=0, detail="first")
  yield from _fingerprints(transfer, trained, beside, calls=1)


def _fingerprints(
    transfer: Transfer, moved: list[Array], beside: dict[str, Any], *,
    calls: float, detail: str = "",
) -> Iterator[Program]:
  """Yields fingerprints of what was sent and of what arrived.

  Both are in the sampler's dtypes.
  """
  cast, arrived = [x.cast for x in moved], [x.arrived for x in moved]
  rest = [x.sent for x in transfer.arrays
          if x not in moved or x.sent.dtype != x.arrived.dtype]
  yield Program(
      transfer.stage, "fingerprints_sent", functools.partial(
          fingerprint.fingerprints.lower, cast), (cast,),
      SAMPLING, beside | {"policy": rest}, calls, detail=detail)
  yield Program(
      transfer.stage, "fingerprints_arrived", functools.partial(
          fingerprint.fingerprints.lower, arrived), (arrived,),
      SAMPLING, {"policy": [
          x.arrived for x in transfer.arrays if x not in moved]},
      calls, detail=detail, role=SAMPLING)
