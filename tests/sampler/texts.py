"""Budget forcing on text, in plain Python, written from the rules.

A text is a Python string with a character for each symbol; control tokens are
characters from 256 on. The account searches whole texts: it has no states, no
tables and no tape. Tokens are made by a vocabulary of any merges.
"""

import dataclasses
import functools

import numpy as np

from posttrain.sampler import budget
from posttrain.text import delimiters, thinking
from tests.sampler.forcing import Full, Limits, Row


@dataclasses.dataclass(frozen=True)
class Texts:
  """Thinking strings as text, and a vocabulary: the text of each token."""

  vocabulary: tuple[str, ...]
  end: str = ""
  start: str = ""
  delimiters: tuple[str, ...] = ()
  newline: str = ""
  final_answer: str = ""
  waits: tuple[str, ...] = ("",)
  step: str = ""
  stop_ids: tuple[int, ...] = ()

  @property
  def vocab_size(self):
    return len(self.vocabulary)

  @property
  def ways_out(self):
    return dict.fromkeys((self.end, *self.delimiters))

  def spell(self, text):
    """The fewest tokens, the first of as many; () if there are none."""
    best = [()]
    for end in range(1, len(text) + 1):
      best.append(min((
          (*best[end - len(piece)], i) for i, piece in enumerate(
              self.vocabulary) if text[:end].endswith(piece)
          and len(piece) <= end and best[end - len(piece)] is not None),
          key=len, default=None))
    return best[-1] or ()

  def text(self, ids):
    return "".join(self.vocabulary[i] for i in ids)

  def tables(self):
    return self._tables

  @functools.cached_property
  def _tables(self):
    parse = lambda text: tuple(map(ord, text))
    spell = lambda symbols: self.spell("".join(map(chr, symbols)))
    ids = thinking.ThinkingIds(
        start=self.spell(self.start), end=self.spell(self.end),
        newline=self.spell(self.newline),
        final_answer=self.spell(self.final_answer),
        wait=self.spell(self.waits[0]),
        more_waits=tuple(map(self.spell, self.waits[1:])),
        strings=delimiters.Strings(
            parse(self.start), parse(self.end),
            tuple(map(parse, self.ways_out)), parse(self.step)),
        tokens=[parse(text) for text in self.vocabulary])
    return budget.BudgetTables.build(
        ids, spell, self.stop_ids,
        np.array([text.endswith("\n") for text in self.vocabulary]))


def first_end(text, strings):
  """The first delimiter in a text: its begin and end; None if there is none.

  That is the one that ends first, and of those the longest.
  """
  found = [(at + len(d), at) for d in strings.ways_out
           if (at := text.find(d)) >= 0]
  if not found:
    return None
  end, begin = min(found)
  return begin, end


def count_steps(text, step):
  """Occurrences that do not overlap, as `str.count` has them."""
  return text.count(step) if step else 0


@dataclasses.dataclass(eq=False)
class Token:
  """Token of the completion.

  `text` is what it adds to the thinking; None outside of it.
  """

  id: int
  source: str
  text: str | None = None
  counts: bool = False


class Account:
  """One row: `model` is a function from the tokens so far to ids, best first.

  With `answer` false it stops where the answer begins.
  """

  def __init__(
      self, model, prompt, strings, limits: Limits, answer: bool = True):
    self.writes_answer = answer
    self.model, self.prompt = model, list(prompt)
    self.strings, self.limits = strings, limits
    self.tokens: list[Token] = []
    self.row = Row([], [])
    self.choices: list[int] = []  # Of every step; -1 where one was forced.
    self.run = 0  # Index of the first token that may be matched.

  def __call__(self, in_thinking: bool) -> Row:
    row = self.row
    try:
      row.finish = self.write(in_thinking)
    except Full:
      row.finish = "length"
    row.tokens = [token.id for token in self.tokens]
    row.sources = [token.source for token in self.tokens]
    row.thinking = sum(token.counts for token in self.tokens)
    return row

  @property
  def thinking(self) -> int:
    return sum(token.counts for token in self.tokens)

  def piece(self, token: int) -> str:
    return self.strings.vocabulary[token]

  def check(self):
    if len(self.tokens) >= self.limits.tokens:
      raise Full

  def sample(self, banned=lambda token: False) -> int:
    context = self.prompt + [token.id for token in self.tokens]
    token = next(t for t in self.model(context) if not banned(t))
    self.choices.append(token)
    return token

  def force(self, ids, counts=False):
    for token in ids:
      self.choices.append(-1)
      self.tokens.append(Token(token, "forced", counts=counts))
      self.check()

  def write(self, in_thinking: bool) -> str:
    strings, row = self.strings, self.row
    outcome = None
    if strings.end and in_thinking:
      outcome = self.think()
    elif strings.end:
      outcome = self.open()
    while not outcome and self.writes_answer:
      token = self.sample()
      row.answer += 1
      self.tokens.append(Token(token, "sampled"))
      if token in strings.stop_ids:
        return "budget" if row.closed == "budget" else "eos"
      self.check()
    return outcome

  def open(self):
    """Writes until thinking begins."""
    strings, text = self.strings, ""
    start = strings.start or "\0"  # Which no text has.

    def banned(token):
      _, found, behind = (text + self.piece(token)).partition(start)
      return bool(found and self.limits.minimum > 0
                  and first_end(behind, strings))

    while True:
      token = self.sample(banned)
      self.row.answer += 1
      self.tokens.append(Token(token, "sampled"))
      if token in strings.stop_ids:
        return "eos"
      text += self.piece(token)
      _, found, behind = text.partition(start)
      if found:
        self.row.answer, self.run = 0, len(self.tokens) - 1
        self.tokens[-1].text = behind
        outcome = self.thought()
        return self.think() if outcome == "on" else outcome
      self.check()

  def think(self):
    """Thinks; returns how the row ended if it ended in its thinking."""
    self.run, outcome = max(self.run, 0), "on"
    if not self.tokens:
      outcome = self.at_maximum()
    while outcome == "on":
      token = self.sample(self.banned)
      self.after_wait = False
      self.tokens.append(Token(token, "sampled", self.piece(token)))
      outcome = self.thought()
    return outcome

  after_wait = False

  def banned(self, token: int) -> bool:
    """Rules 2 and 3 for a token that might be sampled."""
    strings, piece = self.strings, self.piece(token)
    short = self.thinking < self.limits.minimum
    if token in strings.stop_ids and (short or self.after_wait):
      return True
    if self.after_wait and any(d.startswith(piece) for d in strings.ways_out):
      return True
    run = self.tokens[self.run:]
    before = "".join(t.text for t in run)
    found = first_end(before + piece, strings)
    if not found:
      return False
    if self.after_wait:
      return True
    if not self.limits.minimum:
      return False
    # All that would be left of the earlier tokens.
    at, left = 0, self.thinking
    for t in run:
      left -= bool(t.text) and at >= found[0]
      at += len(t.text)
    return left < self.limits.minimum

  def thought(self):
    """Goes on behind a sampled token of thinking; "on": the thinking does.

    None: it has ended, and the answer follows.
    """
    strings, limits, row = self.strings, self.limits, self.row
    run = self.tokens[self.run:]
    text = "".join(token.text for token in run)
    earlier = text[:len(text) - len(run[-1].text)]
    found = first_end(text, strings)
    last = run[-1]
    if not found:
      if last.id in strings.stop_ids:
        return "eos"
      last.counts = bool(last.text)
      row.steps += (count_steps(text, strings.step)
                    - count_steps(earlier, strings.step))
      self.check()
      return self.at_maximum()
    begin, end = found
    # A step that ends with the delimiter does not count.
    row.steps += (count_steps(text[:end - 1], strings.step)
                  - count_steps(earlier, strings.step))
    at, first, head = 0, None, ""
    for token in run:
      behind = at + len(token.text)
      if behind > begin and first is None:
        first, head = token, text[at:begin]
      if first is not None:
        token.counts = token is first and bool(head)
      at = behind
    delimiter = text[begin:end]
    if row.waits >= limits.waits:
      row.closed = "natural"
      whole = delimiter == strings.end
      if whole or (strings.end.startswith(delimiter) and end == len(text)):
        self.check()
        self.force(() if whole else strings.spell(
            strings.end[len(delimiter):]))
        return None
    # All text of the first token that is not the delimiter's.
    piece = self.piece(first.id)
    kept = piece[:len(piece) - len(first.text)] + head
    del self.tokens[self.tokens.index(first):]
    self.run = len(self.tokens)
    if row.closed == "natural":
      self.force(strings.spell(kept), counts=bool(head))
      self.force(strings.spell(strings.end))
      return None
    return self.wait(kept, bool(head))

  def wait(self, kept, counts):
    strings, row = self.strings, self.row
    order = self.limits.order or range(len(strings.waits))
    text = strings.waits[order[row.waits % len(order)]]
    row.waits += 1
    self.after_wait = True
    # What stood before the delimiter is never cut by a maximum.
    self.force(strings.spell(kept), counts)
    self.run = len(self.tokens)
    for token in strings.spell(text):
      outcome = self.at_maximum()
      if outcome != "on":
        return outcome
      self.force([token], True)
      self.run = len(self.tokens)
    return self.at_maximum()

  def at_maximum(self):
    """Closes or ends the row at its maximum; "on" below it."""
    strings, limits, row = self.strings, self.limits, self.row
    if not (0 <= limits.maximum <= self.thinking
            or 0 <= limits.steps <= row.steps):
      return "on"
    if limits.truncate:
      return "length"
    run = self.tokens[self.run:]
    text = "".join(token.text for token in run)
    begun = max(n for n in range(len(strings.end))
                if text.endswith(strings.end[:n]))
    at = 0
    for token in run:
      token.counts &= at < len(text) - begun
      at += len(token.text)
    row.closed = "budget"
    last = [*self.prompt, *(token.id for token in self.tokens)][-1]
    if not begun and not self.piece(last).endswith("\n"):
      self.force(strings.spell(strings.newline))
    self.force(strings.spell(strings.end[begun:]))
    self.force(strings.spell(strings.final_answer))
    return None
