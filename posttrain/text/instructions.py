"""Instructions for an amount of thinking: s1's conditional control.

The texts are those of s1's tasks (https://arxiv.org/abs/2501.19393, appendix
E). They ask; only budgets enforce. A model that was not trained on them may get
worse by them, as s1's did (its table 14).
"""

from collections.abc import Mapping
from typing import Any

from posttrain.text import messages as messages_lib

TEXTS = {
    "tokens": "Think for up to {n} tokens.",
    "steps": "Think for up to {n} steps.",
    "short": "Answer after a short amount of thinking. Do not spend excessive "
    "time double-checking your work.",
    "long": "Answer after a long amount of thinking. If you feel like you are "
    "finished early, spend the extra time trying to double-check your work "
    "until you are absolutely sure that you have the correct answer.",
}
CLASSES = ("short", "long")


def with_amount(text: str, amount: int) -> str:
  """Fills in the `{n}` of a text."""
  return text.replace("{n}", str(amount))


def ask(
    row: Mapping[str, Any], text: str, think_start: str = "",
) -> dict[str, Any]:
  """Appends a text to the question of a row, after a blank line.

  Args:
    row: has a `prompt` or `messages`, see `posttrain.text.render`.
    text: the instruction.
    think_start: opens thinking. If a bare prompt ends in it, the text goes
      before it, so that the prompt still opens thinking.

  Raises:
    ValueError: no message is the user's, or one is malformed.
  """
  key = "messages" if "messages" in row else "prompt"
  value = row[key]
  if isinstance(value, str):
    # A bare prompt that opens the thinking ends in `start`, which must stay
    # last: the sampler reads from it that thinking is open.
    at = messages_lib.opening(value, think_start)
    if at < 0:
      return {**row, key: f"{value}\n\n{text}"}
    question = value[:at].rstrip()
    rest = value[len(question):]
    return {**row, key: f"{question}\n\n{text}{rest}"}
  return {**row, key: _ask_last(messages_lib.turns(value, None), text)}


def _ask_last(messages: list[dict[str, Any]], text: str) -> list[Any]:
  """Appends to the last message of the user."""
  for i in range(len(messages) - 1, -1, -1):
    message = messages[i]
    if message["role"] == "user":
      asked = {**message, "content": f"{message['content']}\n\n{text}"}
      return [*messages[:i], asked, *messages[i + 1:]]
  raise ValueError(
      "an instruction goes after the user's message, and there is none "
      f"among {len(messages)}.")
