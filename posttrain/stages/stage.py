"""The record by which a kind of stage describes itself.

`pipeline`, `plan`, `report`, the memory estimate and the checks ask it, and
know no kind by its name.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from posttrain.config.stages import StageSchema
from posttrain.model.transformer import Transformer
from posttrain.stages.run_context import RunContext
from posttrain.tasks import loading


def _nothing(context: RunContext) -> None:
  """Checks nothing."""


def _trained(context: RunContext) -> int | None:
  """The last step of a finished training stage."""
  summary = context.workdir.finished(context.name, "step")
  return summary["step"] if summary else None


@dataclasses.dataclass(frozen=True)
class Stage:
  """One kind of stage.

  Attributes:
    schema: keys and checks.
    run: (context, start) -> the trained model, or `start` of a stage that
      does not train, for which it may be None.
    check: looks at problems and budgets before the first stage, on process
      0; raises ValueError.
    finished: the number of the last row of metrics of a stage that has
      finished, or None; on process 0. A WorkdirError names a damaged file.
    programs: yields all that the stage jits, on abstract arrays, for a plan.
    memory: sizes of what lies on a device, for `telemetry.memory.estimate`.
    work: model passes of a step, for a plan's bound of its time.
    charts: what the report shows of its metrics.
  """

  schema: StageSchema
  run: Callable[[RunContext, Any], Transformer | None]
  check: Callable[[RunContext], None] = _nothing
  finished: Callable[[RunContext], int | None] = _trained
  programs: Callable[..., Any] | None = None
  memory: Callable[..., dict[str, Any]] | None = None
  work: Callable[..., Any] | None = None
  charts: tuple[Any, ...] = ()


def stage_of(kind: str) -> Stage:
  """Finds the record of a kind: a shipped one's, or `file.py:STAGE`'s."""
  if ":" in kind:
    return loading.load(kind, "Stage")
  return importlib.import_module(f"posttrain.stages.{kind}").STAGE
