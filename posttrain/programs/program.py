"""One compiled program of a stage: how it is traced, and on what arrays.

The weights and optimizer states are shapes, as the current mesh would hold
them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from posttrain import weights
from posttrain.model import transformer
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer

# Roles of devices. Where the roles share their devices, all train.
TRAINING, SAMPLING = "training", "sampling"
# A forward pass alone. The phases of a step are this one and both roles'.
SCORING = "scoring"


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program of a stage.

  Attributes:
    stage, kind: its name is `stage/kind`, with `detail` where there are
      several of a kind.
    lower: traces it, on the current mesh.
    arguments: abstract arrays, as they lie on the mesh.
    phase: TRAINING (an update), SCORING or SAMPLING. It decides which keys
      make the program smaller.
    beside: abstract arrays that are on the devices while it runs.
    calls: modelled number of runs in one step of its stage. A step is one
      update of SFT, or one batch of rollouts with all its updates; 0 where
      the stage has no steps.
    unknown_trips: iterations at most of the loop whose bound is an argument:
      over microbatches, or over rows to copy.
    waiting: abstract arrays that are in host memory meanwhile (host offload).
    role: of the devices that it runs on.
    note: how `calls` was modelled, where more than the config decides it.
  """

  stage: str
  kind: str
  lower: Callable[[], jax.stages.Lowered]
  arguments: Any
  phase: str = TRAINING
  beside: dict[str, Any] = dataclasses.field(default_factory=dict)
  calls: float = 0.0
  unknown_trips: int | None = None
  detail: str = ""
  waiting: dict[str, Any] = dataclasses.field(default_factory=dict)
  role: str = TRAINING
  note: str = ""

  @property
  def name(self) -> str:
    return f"{self.stage}/{self.kind}" + (
        f"[{self.detail}]" if self.detail else "")


def shard_bytes(tree: Any) -> int:
  """Bytes of one device's part of abstract or real arrays."""
  return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree))


def model_of(config: ModelConfig) -> Transformer:
  """Parameters in float32, as the current mesh would hold them."""
  return weights.on_mesh(transformer.abstract(config))
