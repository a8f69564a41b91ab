"""Thinking delimiters and wait texts, as token ids (budget forcing).

Budget forcing works on token sequences. This module encodes the strings of the
config once, and finds the thinking part in a finished completion.
"""

import bisect
import dataclasses
import itertools
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

  Attributes:
    start, end, newline, final_answer, wait, more_waits: token ids, each string
      spelt alone.
    strings: the delimiters as symbols, `end` first.
    tokens: [V] the symbols of each token.
  """

  start: tuple[int, ...] = ()
  end: tuple[int, ...] = ()
  newline: tuple[int, ...] = ()
  final_answer: tuple[int, ...] = ()
  wait: tuple[int, ...] = ()
  more_waits: tuple[tuple[int, ...], ...] = ()
  strings: delimiters_lib.Strings = delimiters_lib.NOTHING
  tokens: Sequence[symbols.Symbols] = dataclasses.field(
      default=(), compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Span:
  """Part of a completion's text, which may begin and end inside of tokens.

  Attributes:
    tokens: slice of the tokens that lie in it whole.
    before: symbols of the token before these, behind a delimiter.
    after: symbols of the token behind these, before a delimiter.
  """

  tokens: slice
  before: symbols.Symbols = ()
  after: symbols.Symbols = ()

  @property
  def touched(self) -> slice:
    """Slice of the tokens that have any of its text."""
    return slice(self.tokens.start - bool(self.before),
                 self.tokens.stop + bool(self.after))


@dataclasses.dataclass(frozen=True)
class Split:
  """Thinking and answer of a completion.

  Attributes:
    thinking: without its delimiter, and without a newline forced before that.
    answer: all text behind the delimiter.
    closed: true if the delimiter is there.
  """

  thinking: Span
  answer: Span
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
  tokens = symbols.vocabulary(tokenizer)
  encode = lambda name, text: spell(name, text, tokenizer)

  def parse(name: str, text: str) -> symbols.Symbols:
    encode(name, text)  # Raises if the vocabulary lacks it.
    return symbols.parse(text, tokenizer, tokens)

  return ThinkingIds(
      start=encode("start", thinking.start),
      end=encode("end", thinking.end),
      newline=encode("newline", thinking.newline),
      final_answer=encode("final_answer", thinking.final_answer),
      wait=encode("wait_text", thinking.wait_text),
      more_waits=tuple(encode("more_wait_texts", text)
                       for text in thinking.more_wait_texts),
      strings=delimiters_lib.Strings(
          parse("start", thinking.start), parse("end", thinking.end),
          # The automaton wants each once.
          tuple(dict.fromkeys(parse("delimiters", text) for text in (
              thinking.end, *filter(None, thinking.delimiters)))),
          parse("step", thinking.step)),
      tokens=tokens)


def split(
    tokens: Sequence[int] | np.ndarray,
    provenance: Sequence[int] | np.ndarray, ids: ThinkingIds, *,
    in_thinking: bool, is_open: bool = False, length: int | None = None,
) -> Split:
  """Finds thinking and answer in a completion, however `end` is spelt.

  The text alone does not tell where: a wait text may have `end` in it, and what
  was retracted may have left its beginning. The sampler's record tells.

  Args:
    tokens: [n] a completion, with or without the end of text.
    provenance: [n] 1 sampled, 2 forced.
    ids: the resolved strings.
    in_thinking: true if the prompt already opened thinking.
    is_open: the thinking did not end, by the record.
    length: thinking tokens, by the record. None if there is no record: then the
      first `end` counts.
  """
  text = _Text.of([int(token) for token in tokens], list(provenance), ids)
  size = len(text.symbols)
  nothing = text.span(size, size)
  begin = 0
  if not in_thinking or not ids.end:
    begin = text.begin() if ids.end else -1
    if begin < 0:
      return Split(text.span(0, 0), text.span(0, size), False)
  if is_open:
    return Split(text.span(begin, size), nothing, False)
  if length is not None:
    return _by_record(text, begin, length)
  at = text.end_from(begin)
  if at < 0:
    return Split(text.span(begin, size), nothing, False)
  return Split(text.span(begin, text.before_newline(at, begin)),
               text.span(at + len(ids.strings.end), size), True)


def _by_record(text: "_Text", begin: int, length: int) -> Split:
  """Splits a completion whose thinking ended.

  Args:
    text: of the completion.
    begin: where the thinking begins.
    length: how many tokens have some of it.
  """
  size = len(text.symbols)
  first = bisect.bisect_right(text.edges, begin) - 1
  last = len(text.edges) - 1
  # Where the token that completed `start` was retracted, all tokens that spell
  # its head again count; or none, if the head has no text of thinking.
  again = sum(1 for _ in itertools.takewhile(
      lambda code: code == FORCED, reversed(text.provenance[:first])))
  behind = min(first + max(length - again, 0), last)
  stop, answer = text.edges[behind], text.behind_closing(behind)
  if answer < 0 and again:
    stop = text.edges[min(first + length, last)]
    answer = text.behind_closing(min(first + length, last))
  if answer < 0:
    # The model wrote `end` or its beginning, perhaps inside of a token. Some
    # text of the last thinking token is before it.
    least = begin
    if behind > first:
      least = max(begin, text.edges[behind - 1]) + 1
    at = text.end_from(least)
    answer = at + len(text.ids.strings.end) if at >= 0 else size + 1
    stop = at if at >= 0 else min(stop, text.begun_from(least))
  # Where `max_tokens` cut `end` off there is no answer.
  return Split(text.span(begin, stop), text.span(min(answer, size), size),
               answer <= size)


def settled(tokens: Sequence[int], ids: ThinkingIds) -> int:
  """Returns how many of a completion's tokens no delimiter can retract.

  The others spell the beginning of a delimiter.
  """
  if not ids.end:
    return len(tokens)
  return symbols.before_begun(
      tokens, ids.tokens, tuple(map(symbols.as_text, ids.strings.delimiters)))


@dataclasses.dataclass(frozen=True)
class _Text:
  """Text of a completion, one character for each symbol.

  Attributes:
    tokens, provenance: [n].
    ids: the resolved strings.
    symbols: the text.
    edges: [n + 1] where each token begins, and where the last one ends.
  """

  tokens: list[int]
  provenance: list[int]
  ids: ThinkingIds
  symbols: str
  edges: list[int]

  @classmethod
  def of(
      cls, tokens: list[int], provenance: list[int], ids: ThinkingIds,
  ) -> "_Text":
    # Without thinking strings nothing is cut inside of a token.
    parts = ([symbols.as_text(ids.tokens[token]) for token in tokens]
             if ids.end else [" "] * len(tokens))
    return cls(tokens, provenance, ids, "".join(parts), [
        *itertools.accumulate(map(len, parts), initial=0)])

  def begin(self) -> int:
    """Returns where the text behind the first `start` begins, or -1."""
    start = symbols.as_text(self.ids.strings.start)
    at = self.symbols.find(start) if start else -1
    return at + len(start) if at >= 0 else -1

  def end_from(self, least: int) -> int:
    """Returns the first place from `least` at which `end` stands, or -1."""
    end = symbols.as_text(self.ids.strings.end)
    at = self.symbols.find(end, least)
    while at >= 0 and not self._may_begin(at):
      at = self.symbols.find(end, at + 1)
    return at

  def begun_from(self, least: int) -> int:
    """Returns where a beginning of `end` stands that ends the text."""
    end, size = symbols.as_text(self.ids.strings.end), len(self.symbols)
    return next(
        (at for at in range(max(least, size - len(end)), size)
         if end.startswith(self.symbols[at:]) and self._may_begin(at)), size)

  def _may_begin(self, at: int) -> bool:
    """Tests if `end` may begin at a place: not inside of a forced token."""
    token = bisect.bisect_right(self.edges, at) - 1
    return self.edges[token] == at or self.provenance[token] != FORCED

  def behind_closing(self, at: int) -> int:
    """Returns where the text behind an `end` begins that was forced alone.

    A newline may stand before it. One more than the text has symbols if the
    closing is cut off; -1 if there is none.

    Args:
      at: index of the token in which it begins.
    """
    # A newline is forced only after text that does not end in one.
    ended = self.symbols[:self.edges[at]].endswith("\n")
    for newline in ((), ) if ended else (self.ids.newline, ()):
      closing = (*newline, *self.ids.end)
      found = tuple(self.tokens[at:at + len(closing)])
      codes = self.provenance[at:at + len(closing)]
      if found and closing[:len(found)] == found and set(codes) == {FORCED}:
        return (self.edges[at + len(found)] if found == closing
                else len(self.symbols) + 1)
    return -1

  def before_newline(self, end: int, begin: int) -> int:
    """Returns where thinking from `begin` ends: before a newline forced for
    the `end` at that place.
    """
    at, ids = bisect.bisect_left(self.edges, end), self.ids
    if self.edges[at] != end or self.provenance[at] != FORCED or (
        not self._forced(ids.newline, at, begin)):
      return end
    # Where a wait text ends in a newline, that newline is a part of the wait.
    is_wait = any(self._forced(wait, at, begin)
                  for wait in (ids.wait, *ids.more_waits))
    return end if is_wait else self.edges[at - len(ids.newline)]

  def _forced(self, part: tuple[int, ...], at: int, begin: int) -> bool:
    """Tests if the tokens before `at` are `part`, forced in the thinking."""
    first = at - len(part)
    return (bool(part) and first >= 0 and self.edges[first] >= begin
            and tuple(self.tokens[first:at]) == part
            and set(self.provenance[first:at]) == {FORCED})

  def span(self, begin: int, end: int) -> Span:
    """Makes the span of the symbols from `begin` to `end`."""
    first = bisect.bisect_left(self.edges, begin)
    last = bisect.bisect_right(self.edges, end) - 1
    part = lambda begin, end: symbols.of_text(self.symbols[begin:end])
    if first > last:  # Both inside of one token.
      return Span(slice(first, first), part(begin, end))
    return Span(slice(first, last), part(begin, self.edges[first]),
                part(self.edges[last], end))


def opens(prompt: Sequence[int], ids: ThinkingIds) -> bool:
  """Tests if a prompt's text ends in `start`; white space may follow it.

  With an empty `start` every prompt opens thinking.
  """
  start = symbols.as_text(ids.strings.start)
  if not ids.end or not start:
    return bool(ids.end)
  parts: list[str] = []
  size = 0  # Symbols of the parts, without the white space behind them.
  for token in reversed(prompt):
    parts.append(symbols.as_text(ids.tokens[token]))
    size += len(parts[-1] if size else parts[-1].rstrip(symbols.SPACES))
    if size >= len(start):
      break
  _, found, behind = "".join(reversed(parts)).rpartition(start)
  return bool(found) and not behind.strip(symbols.SPACES)


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
        f"vocabulary has no whitespace). Leave it out of thinking.{name}.")
  if tokenizer.unk_id is not None and tokenizer.unk_id in ids:
    raise ValueError(
        f"thinking.{name}={text!r} has tokens that this vocabulary does not "
        f"know. Add it to tokenizer.symbols, or change thinking.{name}.")
  return ids
