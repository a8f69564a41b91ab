"""Thinking delimiters and wait texts, as token ids (budget forcing).

Budget forcing works on token sequences. This module encodes the strings of the
config once, and finds the thinking part in a finished completion.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from posttrain.text import delimiters as delimiters_lib
from posttrain.text import symbols
from posttrain.text import tokenizer as tokenizer_lib

FORCED = 2  # Provenance of a token that budget forcing put there.


@dataclasses.dataclass(frozen=True)
class Thinking:
  """Strings of the config's section `thinking`; an empty `end`: no thinking.

  Attributes:
    start: opens thinking; empty: a completion begins in thinking.
    end: closes thinking; a budget forces it.
    delimiters: further strings that close thinking when the model writes them.
    newline: forced before `end` unless the text already ends in a line break.
    final_answer: forced after `end` when a maximum closed the thinking.
    wait_text: replaces a delimiter, and lets the model go on.
    more_wait_texts: further wait texts; a row's waits take them in turn.
    step: ends a step of the thinking; empty: steps are not counted.
  """

  start: str = ""
  end: str = ""
  delimiters: tuple[str, ...] = ()
  newline: str = ""
  final_answer: str = ""
  wait_text: str = ""
  more_wait_texts: tuple[str, ...] = ()
  step: str = ""


@dataclasses.dataclass(frozen=True)
class ThinkingIds:
  """Strings of `Thinking` for one tokenizer: as ids to force, as text to match.

  `delimiters` has `end` first. `step_tokens` are all tokens whose text contains
  `step`.

  Attributes:
    start, end, newline, final_answer, wait, more_waits: token ids, each string
      spelt alone.
    strings: the delimiters as symbols, `end` first.
    tokens: [V] the symbols of each token.
  """

  start: tuple[int, ...] = ()
  end: tuple[int, ...] = ()
  delimiters: tuple[tuple[int, ...], ...] = ()
  newline: tuple[int, ...] = ()
  final_answer: tuple[int, ...] = ()
  wait: tuple[int, ...] = ()
  more_waits: tuple[tuple[int, ...], ...] = ()
  step: tuple[int, ...] = ()
  step_tokens: tuple[int, ...] = ()
  strings: delimiters_lib.Strings = delimiters_lib.NOTHING
  tokens: Sequence[symbols.Symbols] = dataclasses.field(
      default=(), compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Split:
  """Places of thinking and answer in a completion: `tokens[thinking]` and so
  on.

  Attributes:
    thinking: without its delimiter, and without a newline forced before that.
    answer: all tokens after the delimiter.
    closed: true if the delimiter is there.
  """

  thinking: slice
  answer: slice
  closed: bool


def resolve(
    thinking: Thinking, tokenizer: tokenizer_lib.Tokenizer) -> ThinkingIds:
  """Encodes each string once, special tokens allowed.

  Raises:
    ValueError: a string has no tokens, or unknown ones: forcing them would put
      another text into the completion.
  """
  if not thinking.end:
    return ThinkingIds()
  encode = lambda name, text: spell(name, text, tokenizer)
  end = encode("end", thinking.end)
  others = [encode("delimiters", text) for text in thinking.delimiters]
  parse = lambda text: symbols.parse(text, tokenizer)
  return ThinkingIds(
      start=encode("start", thinking.start),
      end=end,
      # Two strings may have the same ids; the compiled matcher wants each once.
      delimiters=tuple(dict.fromkeys([end, *others])),
      newline=encode("newline", thinking.newline),
      final_answer=encode("final_answer", thinking.final_answer),
      wait=encode("wait_text", thinking.wait_text),
      more_waits=tuple(encode("more_wait_texts", text)
                       for text in thinking.more_wait_texts),
      step=encode("step", thinking.step),
      step_tokens=tuple(
          i for i in range(tokenizer.vocab_size)
          if thinking.step in tokenizer.token_text(i)) if thinking.step
      else (),
      strings=delimiters_lib.Strings(
          parse(thinking.start), parse(thinking.end), tuple(dict.fromkeys(map(
              parse, (thinking.end, *thinking.delimiters)))),
          parse(thinking.step)),
      tokens=symbols.vocabulary(tokenizer))


def split(
    tokens: Sequence[int] | np.ndarray,
    provenance: Sequence[int] | np.ndarray, ids: ThinkingIds, *,
    in_thinking: bool,
) -> Split:
  """Finds thinking and answer in a completion.

  One case cannot be decided from the tokens alone: a wait text that begins with
  a line break, and is cut off by the maximum right after it, looks like a
  forced newline. The sampler's own count (`think_lengths`) has it right.

  Args:
    tokens: [n] a completion, with or without the end of text.
    provenance: [n] 1 sampled, 2 forced.
    ids: the resolved strings.
    in_thinking: true if the prompt already opened thinking.
  """
  tokens = [int(token) for token in tokens]
  n = len(tokens)
  opened = 0 if in_thinking else find(tokens, ids.start)
  if not ids.end or opened < 0:
    return Split(slice(0, 0), slice(0, n), False)
  start = opened + (0 if in_thinking else len(ids.start))
  end = find(tokens, ids.end, start)
  if end < 0:
    return Split(slice(start, n), slice(n, n), False)
  answer = slice(end + len(ids.end), n)
  ends_with = lambda part: (
      bool(part) and end - len(part) >= start
      and tuple(tokens[end - len(part):end]) == part
      and all(p == FORCED for p in provenance[end - len(part):end]))
  # A newline is forced only after a token that does not end in one. So where a
  # wait text ends in a newline, that newline is a part of the wait.
  if ends_with(ids.newline) and not any(
      map(ends_with, (ids.wait, *ids.more_waits))):
    end -= len(ids.newline)
  return Split(slice(start, end), answer, True)


def opens(prompt: Sequence[int], ids: ThinkingIds) -> bool:
  """Tests if a prompt's text ends in `start`; white space may follow it.

  With an empty `start` every prompt opens thinking.
  """
  start = ids.strings.start
  if not ids.end or not start:
    return bool(ids.end)
  text: symbols.Symbols = ()
  for token in reversed(prompt):
    text = ids.tokens[token] + text
    if len(symbols.stripped(text)) >= len(start):
      break
  at = symbols.find_last(text, start)
  return at >= 0 and not symbols.stripped(text[at + len(start):])


def opens_by_ids(
    prompt: Sequence[int], *, start: Sequence[int], end: Sequence[int],
) -> bool:
  """Tests if a prompt opens a thinking section and does not close it."""
  if not end:
    return False
  if not start:
    return True
  last = lambda part: max((i for i in range(len(prompt)) if list(
      prompt[i:i + len(part)]) == list(part)), default=-1)
  return last(start) > last(end)


def find(
    tokens: Sequence[int], part: Sequence[int], begin: int = 0) -> int:
  """Returns the first index from `begin` where `part` occurs, or -1."""
  part = list(part)
  for i in range(begin, len(tokens) - len(part) + 1):
    if list(tokens[i:i + len(part)]) == part:
      return i
  return -1


def spell(
    name: str, text: str, tokenizer: tokenizer_lib.Tokenizer,
) -> tuple[int, ...]:
  """Encodes a string of the config alone, special tokens allowed.

  Args:
    name: its key in the section `thinking`, for messages.

  Raises:
    ValueError: as `resolve`.
  """
  # These strings go on after other text, which here is "a".
  ids = tuple(tokenizer.encode(
      text, special=True, after=tokenizer.encode("a")[-1]))
  if text and not ids:
    raise ValueError(
        f"thinking.{name}={text!r} has no tokens in this vocabulary (a word "
        f'vocabulary has no whitespace). Set thinking.{name}="".')
  if tokenizer.unk_id is not None and tokenizer.unk_id in ids:
    raise ValueError(
        f"thinking.{name}={text!r} has tokens that this vocabulary does not "
        f"know. Add it to tokenizer.symbols, or change thinking.{name}.")
  return ids
