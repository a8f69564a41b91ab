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
from posttrain.stages import memory_estimate, rl_parts
from posttrain.telemetry import memory

# Forward passes that a step makes of a layer, a backward pass being two.
_LAYER_PASSES = {"none": 3.0, "dots": 3.0, "full": 4.0}
# Products of the matrix unit for one of the head: forward, and in a step, which
# computes the head again, in all. See `model.head`.
_HEAD_PASSES = {"float32": (6.0, 24.0), "bfloat16": (3.0, 8.0)}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to lay a config out.

  Attributes:
    bytes: per device, the largest stage's.
    seconds: bound of one step of every training stage together.
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
    """What to set in the config."""
    return [f"mesh.fsdp={self.fsdp}", f"mesh.tensor={self.tensor}",
            f"compute.remat={self.remat}"]

  def __str__(self) -> str:
    return f"{self.topology} with {', '.join(self.assignments)}"


@dataclasses.dataclass(frozen=True)
class Stages:
  """What a config's stages hold, whatever the mesh.

  Attributes:
    held: `footprint.held` of each stage, by its name.
  """

  config: config_dict.ConfigDict
  model: ModelConfig
  held: dict[str, tuple[ModelConfig, dict[str, int]]]


def of_config(config: config_dict.ConfigDict, model: ModelConfig) -> Stages:
  """Traces the weights of each stage once, on one device."""
  one = jax.sharding.AbstractMesh(
      (1,), sharding.MESH_AXES[:1], axis_types=(AxisType.Explicit,))
  with jax.sharding.use_abstract_mesh(one):
    return Stages(config, model, {
        name: memory_estimate.held(config[name], config.compute, model)
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
  """Whether a mesh splits the model; see `transformer.check_mesh`."""
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
  """Of the stage that needs most, by `train.memory`."""
  def peak(name):
    model, held = stages.held[name]
    return memory_estimate.of_section(
        stages.config[name], stages.config.compute,
        dataclasses.replace(model, remat=remat), held, mesh).peak

  return max(map(peak, stages.config.stages))


def step_seconds(
    config: config_dict.ConfigDict, model: ModelConfig, topology: Topology,
    mesh: sharding.MeshSizes,
) -> float:
  """One SFT update, and one batch of rollouts with its updates."""
  total = 0.0
  for name in config.stages:
    section = config[name]
    if section.kind == "sft":
      rows = -(-section.rows // section.num_microbatches)
      total += section.num_microbatches * _microbatch(
          model, topology, rows, section.sequence_length, mesh)
    elif section.kind == "rl":
      total += _rollout_step(section, model, topology, mesh)
  return total


def _microbatch(
    model: ModelConfig, topology: Topology, rows: int, length: int,
    mesh: sharding.MeshSizes, training: bool = True,
) -> float:
  """Forward, and backward if training: the largest of three bounds."""
  chip, size = topology.chip, memory.BYTES[model.dtype]
  tensor = mesh.tensor
  tokens = -(-rows // mesh.batch) * length / mesh.context
  layer = memory.layer_parameters(model)
  active = memory.layer_parameters(model, model.experts_per_token)
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
      dataclasses.replace(model, remat="none"), rows=rows, length=length,
      batch=mesh.batch, tensor=tensor, context=mesh.context)
  moved = 2 * gathers * weights + 2 * layer_passes / 3 * values
  return max(flops / chip.flops, moved / chip.hbm_rate, sent)


def _rollout_step(
    section: config_dict.ConfigDict, model: ModelConfig, topology: Topology,
    mesh: sharding.MeshSizes,
) -> float:
  """Completions to their maximum, logprobs where needed, and updates."""
  rows = -(-section.rows_per_microbatch // mesh.batch) * mesh.batch
  completions = section.num_groups * section.group_size
  count = -(-completions // rows)
  part = lambda training: count * _microbatch(
      model, topology, rows, section.sequence_length, mesh, training)
  several = rl_parts.num_updates(section) > 1
  passes = several + (section.loss.kl_coef > 0)
  chip, rollout = topology.chip, section.rollout
  weights = model.layers * memory.layer_parameters(
      model) * memory.decode_bytes(model, rollout.weights_dtype) / mesh.tensor
  head = memory.FLOAT32 * model.padded_vocab_size * model.embed / mesh.tensor
  cache = memory.cache_bytes(
      model, rows=completions, slots=rollout.max_prompt_tokens
      + rollout.max_tokens, parts=mesh.rows, tensor=mesh.tensor,
      dtype=rollout.cache_dtype)
  token = (weights + head + cache / 2) / chip.hbm_rate
  return (rollout.max_tokens * token + passes * part(False)
          + section.num_epochs * part(True))
