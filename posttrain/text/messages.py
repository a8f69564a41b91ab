"""Messages of a chat, as a row of data has them.

The content of a message is a text, or a list of parts of the form
`{"type": "text", "text": ...}`, which are joined without anything between.
Other content is an error, as a template would write it in its Python form.
"""

import reprlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Keys that data sets use for a message's reasoning; templates read the first
# two.
REASONING = ("reasoning_content", "thinking", "reasoning")


def check_text(text: str, name: str) -> str:
  """Returns the text itself, if it can be encoded.

  Raises:
    ValueError: it has half of a surrogate pair, which no encoding has.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
        f"{name} has {text[error.start]!r} at character {error.start}: half "
        "of a surrogate pair, which no text can have. Correct how it was "
        "written.") from error
  return text


def of_row(row: Mapping[str, Any]) -> list[dict]:
  """Reads the messages of a row with `messages` or a `prompt`.

  Raises:
    ValueError: the row has none or both of them, or they are malformed.
  """
  if ("messages" in row) == ("prompt" in row):
    raise ValueError(
        f"the row has {', '.join(sorted(row)) or 'no columns'}; it needs "
        "either `messages` or `prompt`.")
  if "messages" in row:
    return turns(row["messages"], None)
  return turns(row["prompt"], "user")


def turns(value: Any, role: str | None) -> list[dict]:
  """Reads messages with texts from a list of messages, or from a string.

  Args:
    value: the list, or the string.
    role: the role of a string's message; None if a string is not allowed.

  Raises:
    ValueError: it is neither, or a message lacks a role or a content.
  """
  if isinstance(value, str) and role is not None:
    return [{"role": role, "content": check_text(value, "the text")}]
  if not _is_list(value):
    raise ValueError(
        f"messages are a {type(value).__name__}, and a list is needed.")
  return [_turn(message, f"message {i}") for i, message in enumerate(value)]


def opening(text: str, start: str) -> int:
  """Returns the index of a `start` that ends a prompt, or -1.

  White space (of ASCII) may follow it.
  """
  found = text.rfind(start) if start else -1
  behind = text[found + len(start):] if found >= 0 else ""
  return -1 if behind.strip(string.whitespace) else found


def _turn(message: Any, name: str) -> dict[str, Any]:
  if not isinstance(message, Mapping) or not isinstance(
      message.get("role"), str):
    raise ValueError(f"{name} is {reprlib.repr(message)}, and needs `role` "
                     "and `content`.")
  # Parquet gives every message every column; absent ones are None.
  turn = {key: item for key, item in message.items() if item is not None}
  turn["content"] = _content(turn.get("content"), name)
  check_text(turn["role"], f"{name}'s role")
  for key in REASONING:
    if not isinstance(turn.get(key, ""), str):
      raise ValueError(f"{name} has the {key} {reprlib.repr(turn[key])}, and "
                       "a text is needed.")
    check_text(turn.get(key, ""), f"{name}'s {key}")
  return turn


def _content(content: Any, name: str) -> str:
  """Reads a message's content as one text."""
  if isinstance(content, str):
    return check_text(content, name)
  if content is None:
    raise ValueError(f"{name} has no content; a text is needed.")
  if not _is_list(content):
    raise ValueError(
        f"{name} has the content {reprlib.repr(content)}, a "
        f"{type(content).__name__}; a text, or a list of parts of "
        'type "text", is needed.')
  for part in content:
    if not isinstance(part, Mapping) or part.get("type") != "text" or (
        not isinstance(part.get("text"), str)):
      raise ValueError(
          f"{name} has the part {reprlib.repr(part)} in its content, and "
          'only {"type": "text", "text": "..."} can be used.')
  return check_text("".join(part["text"] for part in content), name)


def _is_list(value: Any) -> bool:
  return isinstance(value, (Sequence, np.ndarray)) and not isinstance(
      value, (str, bytes))
