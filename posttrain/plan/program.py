"""One compiled program of a stage: how it is traced, and on what arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

# Of devices; where the roles are shared, all are of the first.
TRAINING, SAMPLING = "training", "sampling"


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program of a stage.

  Attributes:
    stage, kind: its name is `stage/kind`, with `detail` where there are
      several of a kind.
    lower: traces it, on the current mesh.
    arguments: abstract arrays, as they lie on the mesh.
    beside: abstract arrays that are on the devices while it runs.
    calls: runs in one step of its stage, modelled: of an SFT update, or of a
      batch of rollouts with all its updates; 0 where the stage has no steps.
    unknown_trips: bound of the loop over microbatches, which is an argument.
    waiting: abstract arrays that are in the hosts' memory meanwhile.
    role: of the devices that it runs on.
    note: how `calls` was modelled, where more than the config decides it.
  """

  stage: str
  kind: str
  lower: Callable[[], jax.stages.Lowered]
  arguments: Any
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
