"""Sampling options: settings of a call besides budgets, alike in all rows."""

import dataclasses
from typing import Any

from posttrain.sampler import decode, logits_processors, requests
from posttrain.sampler.confidence import Confidence
from posttrain.sampler.requests import Request


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
  """Options of all requests of a call.

  Make it once: another function for a logits processor or a budget schedule
  compiles another program.

  Attributes:
    suppress: the tables' reflections are not sampled while a row thinks.
    draw_waits: the text of each wait is drawn; else they are taken in turn.
    logits_processor: changes the logits of every step.
    logits_processor_args: the argument that every request gives to it.
    budget_schedule: changes the budgets of every step.
    confidence: keeps running entropy and confidence; None for neither.
  """

  suppress: bool = False
  draw_waits: bool = False
  logits_processor: logits_processors.LogitsProcessor | None = None
  logits_processor_args: Any = None
  budget_schedule: decode.BudgetSchedule | None = None
  confidence: Confidence | None = None

  def apply(self, request: Request, wait_texts: int) -> Request:
    """Returns the request with these options set.

    Args:
      request: with `num_waits` and the ids that wait texts are drawn by.
      wait_texts: how many wait texts the tables have.
    """
    order = requests.drawn_waits(
        request, request.num_waits, wait_texts) if self.draw_waits else ()
    return dataclasses.replace(
        request, suppress=self.suppress, wait_order=order,
        logits_processor_args=self.logits_processor_args)


NONE = SamplingOptions()
