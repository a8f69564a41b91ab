"""Memory and time of a config on a slice that it is not compiled for.

Everything here is modelled, from shapes: to rank what might be compiled, and
to advise where a compilation ran out of memory.
"""

import dataclasses
from collections.abc import Iterator

import jax
from jax.sharding import AxisType
from ml_collections import config_dict

from posttrain import sharding
from posttrain.model.config import ModelConfig
from posttrain.plan.topology import Topology
from posttrain.stages import footprint, grpo
from posttrain.train import memory

HIGHEST_PASSES = 6  # Of the float32 head.
# Forward passes that a step makes of a layer and of the head, a backward pass
# being two; the head is always computed again.
_LAYER_PASSES = {"none": 3.0, "dots": 3.0, "full": 4.0}
_HEAD_PASSES = 4.0


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
        name: footprint.held(config[name], config.compute, model)
        for name in config.stages})


def candidates(stages: Stages, topology: Topology) -> Iterator[Candidate]:
  """Every mesh and remat policy on one topology; mesh.expert stays."""
  model, expert = stages.model, max(1, stages.config.mesh.expert)
  for tensor in range(1, topology.num_devices + 1):
    fsdp, rest = divmod(topology.num_devices, tensor * expert)
    mesh = sharding.MeshSizes(fsdp=fsdp, expert=expert, tensor=tensor)
    if rest or not divides(model, mesh, topology.num_slices):
      continue
    for remat in _LAYER_PASSES:
      yield Candidate(
          topology, fsdp, tensor, remat, peak_bytes(stages, remat, mesh),
          step_seconds(stages.config, dataclasses.replace(model, remat=remat),
                       topology, mesh))


def divides(model: ModelConfig, mesh: sharding.MeshSizes, slices: int) -> bool:
  """Whether a mesh splits the model; see `transformer.check_mesh`."""
  fsdp, expert, tensor = mesh
  split = (model.kv_heads, model.mlp, model.padded_vocab_size)
  return fsdp > 0 and not (
      model.embed % (fsdp * expert) or fsdp % slices
      or model.num_experts % expert or any(size % tensor for size in split))


def peak_bytes(
    stages: Stages, remat: str, mesh: sharding.MeshSizes) -> int:
  """Of the stage that needs most, by `train.memory`."""
  def peak(name):
    model, held = stages.held[name]
    return footprint.of_section(
        stages.config[name], stages.config.compute,
        dataclasses.replace(model, remat=remat), held, mesh).peak

  return max(map(peak, stages.config.stages))


def step_seconds(
    config: config_dict.ConfigDict, model: ModelConfig, topology: Topology,
    mesh: sharding.MeshSizes,
) -> float:
  """One SFT update, and one batch of rollouts with its updates."""
  fsdp, tensor = mesh.fsdp * mesh.expert, mesh.tensor
  total = 0.0
  for name in config.stages:
    section = config[name]
    if section.kind == "sft":
      rows = -(-section.rows // section.num_microbatches)
      total += section.num_microbatches * _microbatch(
          model, topology, rows, section.sequence_length, fsdp, tensor)
    elif section.kind == "grpo":
      total += _rollout_step(section, model, topology, fsdp, tensor)
  return total


def _microbatch(
    model: ModelConfig, topology: Topology, rows: int, length: int, fsdp: int,
    tensor: int, training: bool = True,
) -> float:
  """Forward, and backward if training: the largest of three bounds."""
  chip, size = topology.chip, memory.BYTES[model.dtype]
  tokens = -(-rows // fsdp) * length
  layer = memory.layer_parameters(model)
  active = memory.layer_parameters(model, model.experts_per_token)
  layer_passes = _LAYER_PASSES[model.remat] if training else 1.0
  head_passes = _HEAD_PASSES if training else 1.0
  attention = 4 * tokens * length * model.heads * model.head_dim
  head = 2 * tokens * model.padded_vocab_size * model.embed
  flops = (layer_passes * model.layers * (2 * tokens * active + attention)
           + head_passes * HIGHEST_PASSES * head) / tensor
  # Weights are gathered forward and backward, and gradients scattered.
  weights = model.layers * layer * size / tensor
  gathers = 3 if training else 1
  ring = (fsdp - 1) / fsdp
  sums = 2 * (tensor - 1) / tensor * (
      (1 + layer_passes) * model.layers * tokens * model.embed * size)
  gathered = gathers * weights * ring
  sent = gathered / chip.axis_rate + sums / chip.axis_rate
  if topology.num_slices > 1:
    sent += gathered / topology.num_slices / chip.dcn_rate
  # Every value is written and read once in each pass.
  values = memory.activation_bytes(
      dataclasses.replace(model, remat="none"), rows=rows, length=length,
      fsdp=fsdp, tensor=tensor)
  moved = 2 * gathers * weights + 2 * layer_passes / 3 * values
  return max(flops / chip.flops, moved / chip.hbm_rate, sent)


def _rollout_step(
    section: config_dict.ConfigDict, model: ModelConfig, topology: Topology,
    fsdp: int, tensor: int,
) -> float:
  """Completions to their maximum, logprobs where needed, and updates."""
  rows = -(-section.rows_per_microbatch // fsdp) * fsdp
  completions = section.num_groups * section.group_size
  count = -(-completions // rows)
  part = lambda training: count * _microbatch(
      model, topology, rows, section.sequence_length, fsdp, tensor, training)
  several = grpo.num_updates(section) > 1
  passes = several + (section.loss.kl_coef > 0)
  chip, rollout = topology.chip, section.rollout
  weights = model.layers * memory.layer_parameters(
      model) * memory.BYTES[model.dtype] / tensor
  head = memory.FLOAT32 * model.padded_vocab_size * model.embed / tensor
  cache = memory.cache_bytes(
      model, rows=completions, slots=rollout.max_prompt_tokens
      + rollout.max_tokens, fsdp=fsdp, tensor=tensor)
  token = (weights + head + cache / 2) / chip.hbm_rate
  return (rollout.max_tokens * token + passes * part(False)
          + section.num_epochs * part(True))
