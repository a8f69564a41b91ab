"""The policy's weights, to the devices that sample: programs and bytes.

`train.weight_sync` moves an array at a time. The gathers and fingerprints are
compiled here as it compiles them. What it does with arrays of one device, a
cast, a cut, a copy to another device, is no program worth a plan: its bytes
are counted. What is frozen moves before the first batch of rollouts only.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator
from typing import Any

import jax
from ml_collections import config_dict

from posttrain import sharding
from posttrain.model.transformer import Transformer
from posttrain.plan.abstract import shard_bytes
from posttrain.plan.program import SAMPLING, Program
from posttrain.plan.setup import Setup
from posttrain.rl import weight_sync
from posttrain.stages import training
from posttrain.train import fingerprint, trainable


@dataclasses.dataclass(frozen=True)
class Array:
  """One array, at rest and as the sampler wants it."""

  name: str
  sent: jax.ShapeDtypeStruct
  arrived: jax.ShapeDtypeStruct
  trained: bool

  @property
  def cast(self) -> jax.ShapeDtypeStruct:
    """At rest, in the sampler's dtype."""
    return jax.ShapeDtypeStruct(
        self.sent.shape, self.arrived.dtype, sharding=self.sent.sharding)

  @property
  def gather(self) -> tuple[Any, ...]:
    """Arrays that are alike in it take the same program."""
    return self.sent.shape, self.sent.dtype, self.sent.sharding, (
        self.arrived.dtype)


@dataclasses.dataclass(frozen=True)
class Transfer:
  """What one stage moves before each batch of rollouts.

  Attributes:
    arrays: all of the policy's.
    training, sampling: devices of each role on a host.
  """

  stage: str
  arrays: list[Array]
  training: int
  sampling: int

  def received(self, *, first: bool = False) -> int:
    """Bytes that each sampling device takes in; of all arrays, or trained."""
    return shard_bytes([
        x.arrived for x in self.arrays if x.trained or first])

  def sent(self, *, first: bool = False) -> int:
    """Bytes that a training device hands on at most.

    The sampling devices of a host are served by its training devices in turn.
    """
    return self.received(first=first) * -(-self.sampling // self.training)


def of_stage(
    setup: Setup, stage: str, model: Transformer, paths: Collection[str],
    sampling: jax.sharding.Mesh,
) -> tuple[Transfer, Transformer]:
  """What a stage moves, and the policy as the sampler has it.

  Args:
    model: on the current mesh, which trains.
    paths: of what is trained.
  """
  section = setup.config[stage]
  like = _wanted(setup, section, sampling)
  arrays = [
      Array(name, sent, arrived, name in paths)
      for (name, sent), arrived in zip(
          weight_sync.named(model), jax.tree.leaves(like), strict=True)]
  here = jax.sharding.get_mesh()
  count = lambda mesh: len(mesh.devices.flat) // len(
      {device.process_index for device in mesh.devices.flat})
  return Transfer(stage, arrays, count(here), count(sampling)), like


def _wanted(
    setup: Setup, section: config_dict.ConfigDict,
    sampling: jax.sharding.Mesh,
) -> Transformer:
  """As `stages.rollout_buffer.RolloutBuffer` asks for it."""
  with jax.set_mesh(sampling):
    like, _ = trainable.abstract(
        setup.model, training.plan(section, setup.config.compute))
  like = weight_sync.sampler_dtypes(
      like, weights_dtype=section.rollout.weights_dtype)
  return jax.tree.map(lambda x: sharding.on_mesh(x, sampling), like)


def programs(
    transfer: Transfer, beside: dict[str, Any],
) -> Iterator[Program]:
  """Gathers on the current mesh, and fingerprints on both.

  Args:
    beside: abstract arrays that are on the training devices besides the
      policy.
  """
  yield from _gathers(transfer.stage, transfer.arrays, beside)
  trained = [x for x in transfer.arrays if x.trained]
  if len(trained) < len(transfer.arrays):
    yield from _fingerprints(
        transfer, transfer.arrays, beside, calls=0, detail="first")
  yield from _fingerprints(transfer, trained, beside, calls=1)


def _gathers(
    stage: str, arrays: list[Array], beside: dict[str, Any],
) -> Iterator[Program]:
  """A program for all arrays that are alike, once for each of their slabs."""
  alike: dict[tuple, list[Array]] = {}
  for array in arrays:
    alike.setdefault(array.gather, []).append(array)
  for same in alike.values():
    x, dtype = same[0].sent, same[0].arrived.dtype
    axis, size = weight_sync.slab(x, dtype)
    slabs = x.shape[axis] // size if x.ndim else 1
    yield Program(
        stage, "gather", functools.partial(
            weight_sync.gathered.lower, x, 0, size=size, axis=axis,
            dtype=dtype), (x,), beside | {
                "policy": [y.sent for y in arrays if y != same[0]]},
        float(slabs * sum(y.trained for y in same)),
        detail=same[0].name)


def _fingerprints(
    transfer: Transfer, moved: list[Array], beside: dict[str, Any], *,
    calls: float, detail: str = "",
) -> Iterator[Program]:
  """Of what was sent, in the sampler's dtypes, and of what arrived."""
  cast, arrived = [x.cast for x in moved], [x.arrived for x in moved]
  rest = [x.sent for x in transfer.arrays
          if x not in moved or x.sent.dtype != x.arrived.dtype]
  yield Program(
      transfer.stage, "fingerprints_sent", functools.partial(
          fingerprint.fingerprints.lower, cast), (cast,),
      beside | {"policy": rest}, calls, detail=detail)
  yield Program(
      transfer.stage, "fingerprints_arrived", functools.partial(
          fingerprint.fingerprints.lower, arrived), (arrived,),
      {"policy": [x.arrived for x in transfer.arrays if x not in moved]},
      calls, detail=detail, role=SAMPLING)
