"""Renderers: rows of data to tokens, for SFT, rollouts and sampling alike.

A row has `prompt` and `completion` (strings, or lists of messages), or
`messages`. A prompt is encoded by itself and the completion after it, so that a
training example begins with exactly the tokens that the sampler is given. The
assistant's text is cut where sampling forces, see `posttrain.text.cuts`.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from posttrain.text import chat, cuts
from posttrain.text import messages as messages_lib
from posttrain.text import thinking as thinking_lib
from posttrain.text import tokenizer as tokenizer_lib

PLAIN = "plain"

Row = Mapping[str, Any]


class Renderer(Protocol):
  """Turns rows into tokens.

  Attributes:
    tokenizer: encodes the rendered text.
    hash: sha256 of the template and the tokenizer; kept in checkpoints, so that
      weights are not used with another template than they were trained with.
      The thinking strings are not in it: they say how a run samples, and
      weights may be sampled with another `final_answer` than they learnt from.
  """

  tokenizer: tokenizer_lib.Tokenizer
  hash: str

  def prompt_tokens(self, row: Row) -> list[int]: ...

  def example_tokens(self, row: Row) -> tuple[np.ndarray, np.ndarray]: ...


class PlainRenderer:
  """Renders without a template: [BOS] + prompt, completion + EOS.

  A prompt that ends in `thinking.start` opens the thinking; `start` is then
  spelt alone.
  """

  def __init__(
      self, tokenizer: tokenizer_lib.Tokenizer,
      strings: thinking_lib.Thinking | None = None):
    self.tokenizer = tokenizer
    self.hash = _hash(PLAIN, tokenizer)
    self._start = strings.start if strings else ""
    self._cuts = cuts.Cuts(strings or thinking_lib.Thinking(), tokenizer)

  def prompt_tokens(self, row: Row) -> list[int]:
    """Tokenizes `prompt`.

    Raises:
      ValueError: the row has messages, or a prompt that is not a string.
    """
    prompt = _require_text(row, "prompt")
    bos = self.tokenizer.bos_id
    ids = [] if bos is None else [bos]
    at = messages_lib.opening(prompt, self._start)
    if self._start not in self._cuts.strings or at < 0:
      return ids + self.tokenizer.encode(prompt)
    ids += self.tokenizer.encode(prompt[:at])
    ids += self._cuts.strings[self._start]
    behind = prompt[at + len(self._start):]
    return ids + self.tokenizer.encode(behind, after=ids[-1])

  def example_tokens(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes prompt and completion; completion and EOS are in the loss.

    Returns:
      Tokens [n] int32 and loss mask [n] bool.

    Raises:
      ValueError: as `prompt_tokens`, or no token precedes the completion, from
        which its first token could be predicted.
    """
    prompt = self.prompt_tokens(row)
    if not prompt:
      raise ValueError(
          "the prompt has no tokens and the tokenizer no BOS, so nothing "
          "predicts the first token of the completion. Give it a prompt.")
    completion: list[int] = []
    for text, ids in self._cuts.pieces(_require_text(row, "completion")):
      completion += ids or self.tokenizer.encode(
          text, after=completion[-1] if completion else None)
    # EOS is in the loss: the model has to learn to stop.
    completion.append(self.tokenizer.eos_id)
    return (
        np.array(prompt + completion, np.int32),
        np.repeat([False, True], [len(prompt), len(completion)]))


class ChatRenderer:
  """Renders messages with a chat template; a `prompt` string is a user's turn.
  """

  def __init__(
      self, template: chat.ChatTemplate, tokenizer: tokenizer_lib.Tokenizer):
    self.tokenizer = tokenizer
    self.template = template
    self.hash = _hash(template.source, tokenizer)

  def prompt_tokens(
      self, row: Row, sampled: chat.Sampled = MappingProxyType({}),
  ) -> list[int]:
    """Tokenizes the messages and the generation prompt.

    Args:
      sampled: as `ChatTemplate.prompt_tokens` takes it, by the numbers of the
        row's messages.

    Raises:
      ValueError: as `ChatTemplate.prompt_tokens`, or the row is malformed.
    """
    return self.template.prompt_tokens(messages_lib.of_row(row), sampled)

  def example_tokens(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes a conversation, with its loss mask.

    With `messages` alone every assistant turn is in the loss; with a
    `completion`, only the completion is.

    Returns:
      Tokens [n] int32 and loss mask [n] bool.

    Raises:
      ValueError: as `ChatTemplate.example_tokens`, or the row is malformed.
    """
    messages = messages_lib.of_row(row)
    completed = "completion" in row
    if completed:
      messages += messages_lib.turns(row["completion"], "assistant")
    tokens, mask = self.template.example_tokens(messages, last_only=completed)
    return np.array(tokens, np.int32), np.array(mask, bool)


def make_renderer(
    tokenizer: tokenizer_lib.Tokenizer, chat_template: str = "",
    strings: thinking_lib.Thinking | None = None) -> Renderer:
  """Makes the renderer that the config asks for.

  Args:
    tokenizer: also has the template, unless another one is named.
    chat_template: "" for the tokenizer's own, "plain" for none, or the path
      of a Jinja file.
    strings: the config's section `thinking`, at which the assistant's text is
      cut; None: it is cut nowhere.

  Raises:
    ValueError: the tokenizer has no template or cannot spell a string, or the
      file does not exist.
  """
  if chat_template == PLAIN:
    return PlainRenderer(tokenizer, strings)
  if chat_template:
    path = pathlib.Path(chat_template).expanduser()
    # Unlike `Path.is_file`, this is False for a name that is too long.
    if not os.path.isfile(path):
      what = "is a directory" if os.path.isdir(path) else "does not exist"
      raise ValueError(
          f'chat_template: {str(path)[:200]} {what}. Set chat_template to a '
          'Jinja file, "" (the tokenizer\'s own) or "plain".')
    source, name = path.read_text(encoding="utf-8"), f"the template {path}"
  elif tokenizer.chat_template is None:
    raise ValueError(
        'the tokenizer has no chat template. Set chat_template="plain" for '
        "bare prompts and completions, or to the path of a Jinja file.")
  else:
    source, name = tokenizer.chat_template, "the tokenizer's chat template"
  return ChatRenderer(
      chat.ChatTemplate(source, tokenizer, name, strings), tokenizer)


def _hash(template: str, tokenizer: tokenizer_lib.Tokenizer) -> str:
  # JSON keeps the two apart: plain concatenation could give one hash to two
  # pairs.
  contents = json.dumps([template, tokenizer.fingerprint()])
  return hashlib.sha256(contents.encode()).hexdigest()


def _require_text(row: Row, key: str) -> str:
  if key not in row:
    raise ValueError(
        f"the row has {', '.join(sorted(row)) or 'no columns'} and no "
        f'`{key}`, which chat_template="plain" needs.')
  if not isinstance(row[key], str):
    raise ValueError(
        f"`{key}` is a {type(row[key]).__name__}, and "
        'chat_template="plain" needs a string.')
  return messages_lib.check_text(row[key], f"`{key}`")
