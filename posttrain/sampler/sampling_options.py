"""What steers a call of the sampler besides its budgets, alike in all rows."""

import dataclasses
from typing import Any

from posttrain.sampler import decode, logits_processors, requests
from posttrain.sampler.requests import Request


@dataclasses.dataclass(frozen=True)
class Steering:
  """Make it once: another hook or policy is another program.

  Attributes:
    suppress: the tables' reflections are not sampled while a row thinks.
    draw_waits: each wait's text is drawn; else they are taken in turn.
    hook: changes the logits of every step.
    argument: what every request gives to the hook.
    policy: changes the budgets of every step.
  """

  suppress: bool = False
  draw_waits: bool = False
  hook: logits_processors.Hook | None = None
  argument: Any = None
  policy: decode.Policy | None = None

  def of(self, request: Request, wait_texts: int) -> Request:
    """The request under this steering, of so many texts of a wait."""
    order = requests.drawn_waits(
        request, request.num_waits, wait_texts) if self.draw_waits else ()
    return dataclasses.replace(
        request, suppress=self.suppress, hook=self.argument, wait_order=order)


NONE = Steering()
