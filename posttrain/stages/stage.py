"""The record by which a kind of stage describes itself.

`pipeline`, `plan`, `report`, the memory estimate and the checks ask it, and
know no kind by its name.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from posttrain.config.stages import StageSchema
from posttrain.model.transformer import Transformer
from posttrain.stages.run_context import RunContext


def _nothing(context: RunContext) -> None:
  """Checks nothing."""


@dataclasses.dataclass(frozen=True)
class Stage:
  """One kind of stage.

  Attributes:
    schema: keys and checks.
    run: (context, start) -> the trained model, or `start` of a stage that
      does not train. `start` is None where `schema.trains` is false.
    check: looks at problems and budgets before the first stage, on process
      0; raises ValueError.
    programs: yields all that the stage jits, on abstract arrays, for a plan.
    memory: sizes of what lies on a device, for `telemetry.memory.estimate`.
    work: model passes of a step, for a plan's bound of its time.
    charts: what the report shows of its metrics.
  """

  schema: StageSchema
  run: Callable[[RunContext, Transformer | None], Transformer | None]
  check: Callable[[RunContext], None] = _nothing
  programs: Callable[..., Any] | None = None
  memory: Callable[..., dict[str, Any]] | None = None
  work: Callable[..., Any] | None = None
  charts: tuple[Any, ...] = ()
