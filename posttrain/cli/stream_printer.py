"""Stream printer: one completion on the console, as it grows."""

from typing import TextIO

import numpy as np
import rich.console
import rich.text

from posttrain.sampler import rollouts, transcript
from posttrain.telemetry import console as console_lib
from posttrain.text import thinking
from posttrain.text import tokenizer as tokenizer_lib


class StreamPrinter:
  """Prints one completion as it grows, with forced tokens marked.

  A delimiter of several tokens may be retracted for a wait, and a character may
  need several tokens: text that may still change is held back. `in_thinking`
  tells if the prompt opened thinking, which is then dimmed; None: nothing is
  dimmed.
  """

  def __init__(
      self, tokenizer: tokenizer_lib.Tokenizer, ids: thinking.ThinkingIds,
      stream: TextIO, in_thinking: bool | None = None,
  ):
    self._in_thinking = in_thinking
    self._tokenizer = tokenizer
    self._ids = ids
    # The last tokens may turn out to be a delimiter that a wait replaces.
    self._held = max((len(d) for d in ids.delimiters), default=1) - 1
    self._printed = 0
    self._console = rich.console.Console(
        file=stream, markup=False, emoji=False, highlight=False)

  def __call__(self, recorder: rollouts.Recorder, done: np.ndarray) -> None:
    tokens, provenance = recorder.tokens[0], recorder.provenance[0]
    end = len(tokens) - self._held
    if done[0]:
      # The stop token ends the text and is no part of it.
      stopped = bool(tokens) and tokens[-1] in self._tokenizer.stop_ids
      end = len(tokens) - stopped
    if end <= 0:
      return
    thought = slice(0, 0)
    if self._in_thinking is not None:
      thought = thinking.split(
          tokens[:end], provenance[:end], self._ids,
          in_thinking=self._in_thinking).thinking
    parts = transcript.segments(
        self._tokenizer, tokens[:end], provenance[:end], self._ids, thought)
    text = "".join(part for part, _ in parts)
    # U+FFFD at the end is a character whose other bytes are still to come.
    settled = len(text) if done[0] else len(text.rstrip("\ufffd"))
    position = 0
    for part, name in parts:
      begin = max(self._printed - position, 0)
      self._print(part[begin:settled - position], name)
      position += len(part)
    self._printed = max(self._printed, settled)

  def _print(self, text: str, name: str) -> None:
    if not text:
      return
    text = console_lib.printable(text)
    if self._console.is_terminal:
      self._console.print(
          rich.text.Text(text, style=console_lib.STYLES[name]), end="",
          soft_wrap=True)
    else:  # Not through Rich, which would replace tabs.
      self._console.file.write(
          text if name in ("sampled", "thinking") else f"[{name}: {text}]")
    self._console.file.flush()
