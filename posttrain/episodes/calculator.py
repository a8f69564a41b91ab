"""Calculator: an episode in which the model may have sums computed.

It is a protocol of text, for any model. Where the model closes an expression,
as in "<calc>12*7</calc>", its turn ends; the value is put behind it as an
observation, " = 84", and the model goes on.
"""

from posttrain.episodes.protocol import (
  Call,
  Episode,
  Generate,
  Outcome,
  Task,
  multi_turn,
)
from posttrain.tasks import arithmetic

EVALUATE = f"{arithmetic.__name__}:{arithmetic.evaluate_last.__name__}"


@multi_turn
def calculator(
    task: Task, *, max_turns: int = 2, begin: str = "<calc>",
    end: str = "</calc>", answered: str = " = {value}",
    malformed: str = " = error",
) -> Episode:
  """Runs turns of the model, and computes what they ask for.

  Args:
    task: the problem.
    max_turns: the most turns. If the last one asks for another value, the
      episode ends with "max_turns"; or with "parse_error", if the expression
      is malformed.
    begin, end: the text around an expression.
    answered: the observation, in which {value} is replaced by the value.
    malformed: the observation if an expression cannot be computed, in which
      {reason} is replaced by what is wrong with it.
  """
  stop = {"stop_strings": (end,), "include_stop": True}
  turn = yield Generate(task.prompt, changes=stop)
  for left in reversed(range(max_turns)):
    if turn.finish_reason != "stop":
      return Outcome()
    result = yield Call(EVALUATE, (turn.text, begin, end))
    if result.status != "ok":
      return Outcome(
          reason="timeout" if result.status == "timeout" else "tool_error",
          reason_text=result.reason)
    value, reason = result.value
    if not left:
      return Outcome(reason="parse_error" if value is None else "max_turns",
                     reason_text=reason)
    said = (malformed.replace("{reason}", reason) if value is None
            else answered.replace("{value}", value))
    # An expression within the thinking is answered within it.
    turn = yield Generate(
        task.encode(said, turn), parent=turn, changes=stop | {
            "in_thinking": turn.completion.kept_in_thinking})
  raise ValueError(f"max_turns is {max_turns}, and must be 1 or more.")
