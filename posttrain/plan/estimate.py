"""Memory and time of a config on a slice that it is not compiled for.

Everything here is modelled, from shapes: to rank what might be compiled, and
to advise where a compilation ran out of memory.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
from jax.sharding import AxisType
from ml_collections import config_dict

from posttrain import sharding
from posttrain.model.config import ModelConfig
from posttrain.plan.topology import Topology
from posttrain.stages import memory_estimate
from posttrain.stages.stage import Decoding, Pass, Sizes, stage_of
from posttrain.telemetry import memory

# Forward passes that a step makes of a layer, a backward pass being two.
_LAYER_PASSES = {"none": 3.0, "dots": 3.0, "full": 4.0}
# Products of the matrix unit for one of the head: forward, and in a step, which
# computes the head again, in all. See `model.head`.
_HEAD_PASSES = {"float32": (6.0, 24.0), "bfloat16": (3.0, 8.0)}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One mesh and remat policy for a config.

  Attributes:
    bytes: per device, the largest stage's.
    seconds: bound of one step of every stage together.
  """

  topology: Topology
  fsdp: int
  tensor: int
  remat: str
  bytes: int
  seconds: float

  @property
  def fits(self) -> bool:
    return self.bytes <= self.topology.chip.hbm_bytes

  @property
  def chip_seconds(self) -> float:
    return self.seconds * self.topology.num_chips

  @property
  def assignments(self) -> list[str]:
    """Assignments of config keys."""
    return [f"mesh.fsdp={self.fsdp}", f"mesh.tensor={self.tensor}",
            f"compute.remat={self.remat}"]

  def __str__(self) -> str:
    return f"{self.topology} with {', '.join(self.assignments)}"


@dataclasses.dataclass(frozen=True)
class Stages:
  """Sizes of a config's stages by name, whatever the mesh."""

  config: config_dict.ConfigDict
  model: ModelConfig
  sizes: dict[str, Sizes]


def of_config(config: config_dict.ConfigDict, model: ModelConfig) -> Stages:
  """Traces the weights of each stage once, on one device."""
  one = jax.sharding.AbstractMesh(
      (1,), sharding.MESH_AXES[:1], axis_types=(AxisType.Explicit,))
  with jax.sharding.use_abstract_mesh(one):
    return Stages(config, model, {
        name: memory_estimate.sizes_of(config[name], config.compute, model)
        for name in config.stages})


def candidates(stages: Stages, topology: Topology) -> Iterator[Candidate]:
  """Every mesh of "fsdp" and "tensor", and remat policy, on one topology.

  The other axes stay as the config has them, those that are -1 at 1.
  """
  model = stages.model
  kept = {name: max(1, stages.config.mesh[name])
          for name in sharding.MESH_AXES if name not in sharding.ALWAYS}
  for tensor in range(1, topology.num_devices + 1):
    fsdp, rest = divmod(
        topology.num_devices, tensor * math.prod(kept.values()))
    mesh = sharding.MeshSizes(fsdp=fsdp, tensor=tensor, **kept)
    if rest or not divides(model, mesh, topology.num_slices):
      continue
    for remat in _LAYER_PASSES:
      yield Candidate(
          topology, fsdp, tensor, remat, peak_bytes(stages, remat, mesh),
          step_seconds(stages.config, dataclasses.replace(model, remat=remat),
                       topology, mesh))


def divides(model: ModelConfig, mesh: sharding.MeshSizes, slices: int) -> bool:
  """Tests if a mesh splits the model evenly, as `transformer.check_mesh`."""
  across = mesh.data if mesh.data > 1 else mesh.fsdp
  split = (model.kv_heads, model.mlp, model.padded_vocab_size)
  if mesh.fsdp < 1 or across % slices or any(
      size % mesh.tensor for size in split):
    return False
  heads = model.kv_heads // mesh.tensor
  return not (
      model.embed % mesh.parts or model.num_experts % mesh.expert
      or (heads % mesh.context and model.groups % mesh.context))


def peak_bytes(
    stages: Stages, remat: str, mesh: sharding.MeshSizes) -> int:
  """Bytes of the stage that needs most, by `telemetry.memory`."""
  return max(
      memory_estimate.of_sizes(
          dataclasses.replace(sizes, model=dataclasses.replace(
              sizes.model, remat=remat)), stages.config.compute, mesh).peak
      for sizes in stages.sizes.values())


def step_seconds(
    config: config_dict.ConfigDict, model: ModelConfig, topology: Topology,
    mesh: sharding.MeshSizes,
) -> float:
  """Bound of one step of every stage together, from its passes."""
  total = 0.0
  for name in config.stages:
    work = stage_of(config[name].kind).work
    for each in work(config[name], mesh) if work else ():
      if isinstance(each, Decoding):
        total += _decoding(each, model, topology, mesh)
      else:
        total += _microbatches(each, model, topology, mesh)
  return total


def _microbatches(
    work: Pass, model: ModelConfig, topology: Topology,
    mesh: sharding.MeshSizes,
) -> float:
  """Bound of passes: of matrix unit, memory and network the largest."""
  chip, size = topology.chip, memory.BYTES[model.dtype]
  tensor, length, training = mesh.tensor, work.length, work.backward
  tokens = -(-work.rows // mesh.batch) * length / mesh.context
  layer = model.matrix_parameters(model.num_experts)
  active = model.matrix_parameters(model.experts_per_token)
  layer_passes = _LAYER_PASSES[model.remat] if training else 1.0
  head_passes = _HEAD_PASSES[model.dtype][training]
  attention = 4 * tokens * length * model.heads * model.head_dim
  head = 2 * tokens * model.padded_vocab_size * model.embed
  flops = (layer_passes * model.layers * (2 * tokens * active + attention)
           + head_passes * head) / tensor
  # Weights are gathered forward and backward, and gradients scattered.
  weights = model.layers * layer * size / tensor
  gathers = 3 if training else 1
  ring = (mesh.parts - 1) / mesh.parts
  sums = 2 * (tensor - 1) / tensor * (
      (1 + layer_passes) * model.layers * tokens * model.embed * size)
  gathered = gathers * weights * ring
  # Queries, keys, values and what is attended, in each pass.
  exchanged = (mesh.context - 1) / mesh.context * gathers * model.layers * (
      2 * tokens * (model.heads + model.kv_heads) * model.head_dim
      * size / tensor)
  sent = (gathered + sums + exchanged) / chip.axis_rate
  # Replicas add up gradients, each device of what it holds at rest.
  summed = training * 2 * (mesh.data - 1) / mesh.data * weights / mesh.parts
  if topology.num_slices == 1:
    sent += summed / chip.axis_rate
  elif mesh.data > 1:
    sent += summed / chip.dcn_rate
  else:
    sent += gathered / topology.num_slices / chip.dcn_rate
  # Every value is written and read once in each pass.
  values = memory.activation_bytes(
      dataclasses.replace(model, remat="none"), rows=work.rows, length=length,
      batch=mesh.batch, tensor=tensor, context=mesh.context)
  moved = 2 * gathers * weights + 2 * layer_passes / 3 * values
  return work.times * max(flops / chip.flops, moved / chip.hbm_rate, sent)


def _decoding(
    work: Decoding, model: ModelConfig, topology: Topology,
    mesh: sharding.MeshSizes,
) -> float:
  """Bound of decoding: what is read from memory for each token.

  That is the weights, the head, and on average half of the full cache."""
  weights = model.layers * model.matrix_parameters(model.num_experts) * (
      memory.decode_bytes(model, work.weights_dtype)) / mesh.tensor
  head = memory.FLOAT32 * model.padded_vocab_size * model.embed / mesh.tensor
  cache = memory.cache_bytes(
      model, rows=work.rows, slots=work.slots, parts=mesh.rows,
      tensor=mesh.tensor, dtype=work.cache_dtype)
  return work.steps * (weights + head + cache / 2) / topology.chip.hbm_rate
