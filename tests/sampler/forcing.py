"""Budget forcing in plain Python, written from the rules and not the code.

One row at a time, in the order in which a person would tell it: the model
writes until its thinking starts, thinks in rounds, is closed, answers. The
model is a function from the row so far to token ids, best first; a banned id
makes way for the next.
"""

import dataclasses

import numpy as np

from posttrain.sampler import budget
from posttrain.text import thinking


@dataclasses.dataclass(frozen=True)
class Strings:
  """Thinking strings as ids, with what the tokenizer adds."""

  start: tuple = ()
  end: tuple = ()
  delimiters: tuple = ()
  newline: tuple = ()
  final_answer: tuple = ()
  wait: tuple = ()
  more_waits: tuple = ()
  stop_ids: tuple = ()
  ends_newline: frozenset = frozenset()
  reflections: tuple = ()
  step: tuple = ()
  vocab_size: int = 8

  def tables(self):
    flags = lambda ids: np.isin(np.arange(self.vocab_size), list(ids))
    return budget.BudgetTables.of_ids(
        thinking.ThinkingIds(
            self.start, self.end, self.newline, self.final_answer, self.wait,
            self.more_waits),
        self.stop_ids, flags(self.ends_newline), flags(self.reflections),
        delimiters=self.delimiters, step=self.step)


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of one row."""

  maximum: int = -1
  minimum: int = 0
  waits: int = 0
  tokens: int = 1000
  truncate: bool = False
  order: tuple = ()  # Of the wait texts; () for all in turn.
  suppress: bool = False
  steps: int = -1


@dataclasses.dataclass
class Row:
  """Row that the account ends with."""

  tokens: list
  sources: list  # "sampled" or "forced".
  finish: str = ""  # "eos", "budget" or "length".
  closed: str = "open"  # "open", "natural" or "budget".
  thinking: int = 0
  answer: int = 0
  waits: int = 0
  steps: int = 0
  # Where the thinking begins, and what follows its delimiter; None: nowhere.
  think_at: int | None = dataclasses.field(default=None, compare=False)
  answer_at: int | None = dataclasses.field(default=None, compare=False)
  # Index in the completion -> ids that its last choice there had to leave out.
  bans: dict = dataclasses.field(default_factory=dict, compare=False)


class Full(Exception):
  """The row has all the tokens that it may have."""


def ends_in(tokens, string):
  return len(string) > 0 and tuple(tokens[-len(string):]) == tuple(string)


def reference(model, prompt, in_thinking, strings, limits):
  """The finished row of a model, a prompt, strings and limits."""
  row = Row([], [])
  try:
    row.finish = write(row, model, list(prompt), in_thinking, strings, limits)
  except Full:
    row.finish = "length"
  return row


def write(row, model, prompt, in_thinking, strings, limits):
  def add(token, source):
    row.tokens.append(token)
    row.sources.append(source)

  def check():
    if len(row.tokens) >= limits.tokens:
      raise Full

  def best(banned=()):
    row.bans[len(row.tokens)] = frozenset(banned)
    return next(t for t in model(prompt + row.tokens) if t not in banned)

  def force(string):
    for token in string:
      add(token, "forced")
      check()

  thinks = len(strings.end) > 0
  if thinks and not in_thinking:
    while not ends_in(row.tokens, strings.start):
      token = best()
      row.answer += 1
      add(token, "sampled")
      if token in strings.stop_ids:
        return "eos"
      if ends_in(row.tokens, strings.start):
        row.answer, row.think_at = 0, len(row.tokens)
      check()
  if thinks:
    row.think_at = len(row.tokens)
    outcome = think(row, best, add, check, force, prompt, strings, limits)
    if outcome:
      return outcome
  while True:
    token = best()
    row.answer += 1
    add(token, "sampled")
    if token in strings.stop_ids:
      return "budget" if row.closed == "budget" else "eos"
    check()


def think(row, best, add, check, force, prompt, strings, limits):
  """Returns how the row ended, if it ended inside its thinking."""
  ways_out = set(strings.delimiters) | {strings.end}
  fresh = []  # Sampled since thinking began or a wait.
  stepped = []  # The same, since a step ended: steps do not overlap.
  after_wait = False
  while True:
    if (0 <= limits.maximum <= row.thinking
        or 0 <= limits.steps <= row.steps):
      if limits.truncate:
        return "length"
      begun = max(n for n in range(len(strings.end))
                  if n == 0 or ends_in(fresh, strings.end[:n]))
      row.thinking -= begun
      row.closed = "budget"
      last = (prompt + row.tokens)[-1]
      if begun == 0 and last not in strings.ends_newline:
        force(strings.newline)
      force(strings.end[begun:])
      row.answer_at = len(row.tokens)
      force(strings.final_answer)
      return None

    banned = set(strings.reflections if limits.suppress else ())
    if after_wait:
      # One token is never more than the first of a delimiter.
      banned |= set(strings.stop_ids) | {d[0] for d in ways_out}
    if row.thinking < limits.minimum:
      banned |= set(strings.stop_ids)
    for d in ways_out:
      # All that would be left of the thinking, were it to end here.
      left = row.thinking - (len(d) - 1)
      if ends_in([*fresh, d[-1]], d) and left < limits.minimum:
        banned.add(d[-1])
    token = best(banned)
    after_wait = False
    add(token, "sampled")
    fresh.append(token)
    found = [d for d in ways_out if ends_in(fresh, d)]
    if not found:
      if token in strings.stop_ids:
        return "eos"
      row.thinking += 1
      stepped.append(token)
      if ends_in(stepped, strings.step):
        row.steps += 1
        stepped = []
      check()
      continue

    delimiter = max(found, key=len)
    row.thinking -= len(delimiter) - 1
    if row.waits < limits.waits:
      texts = (strings.wait, *strings.more_waits)
      turns = limits.order or range(len(texts))
      text = texts[turns[row.waits % len(turns)]]
      row.waits += 1
      del row.tokens[-len(delimiter):], row.sources[-len(delimiter):]
      fresh, stepped, after_wait = [], [], True
      for token in text:
        if 0 <= limits.maximum <= row.thinking:
          break
        row.thinking += 1
        force([token])
      continue
    row.closed = "natural"
    if strings.end[:len(delimiter)] == delimiter:
      check()
      force(strings.end[len(delimiter):])
    else:
      del row.tokens[-len(delimiter):], row.sources[-len(delimiter):]
      force(strings.end)
    row.answer_at = len(row.tokens)
    return None
