"""Thinking and answer of rows whose delimiters merge with their text.

Oracle: the account of budget forcing in plain Python, which is told where the
thinking begins and ends while it writes; what is tested has the row alone.
"""

import functools

import numpy as np
import pytest

from posttrain.text import thinking
from tests.sampler import test_budget_text, texts
from tests.sampler.forcing import Limits


class Told(texts.Account):
  """An account that notes places in its text.

  Attributes:
    stop, answer: where the thinking ends and the answer begins; None before.
  """

  stop = answer = None

  def __init__(self, *args):
    self.forced = []  # Where each forced string begins.
    super().__init__(*args)

  @property
  def size(self):
    return len(self.strings.text(token.id for token in self.tokens))

  def force(self, ids, counts=False):
    self.forced.append(self.size)
    super().force(ids, counts)

  def at_maximum(self):
    """The last strings forced are a newline, perhaps, `end` and the answer."""
    before = len(self.forced)
    outcome = super().at_maximum()
    if outcome is None:
      first, *_ = self.forced[before:]
      self.answer = self.forced[-1]
      begun = len(self.strings.end) - (self.answer - self.forced[-2])
      self.stop = first - begun
    return outcome

  def thought(self):
    run = "".join(token.text for token in self.tokens[self.run:])
    found = texts.first_end(run, self.strings)
    size = self.size
    outcome = super().thought()
    if outcome is None and self.row.closed == "natural":
      whole = found and run[slice(*found)] == self.strings.end
      self.answer = size - len(run) + found[1] if whole else self.size
      self.stop = self.answer - len(self.strings.end)
    return outcome


def expected(account, text, begin):
  """Thinking and answer of a row; None if it was cut as it closed."""
  if begin < 0:
    return "", text
  if account.row.closed == "open":
    return text[begin:], ""
  if account.answer is None:
    return None
  return text[begin:account.stop], text[account.answer:]


@pytest.mark.parametrize("index", range(len(test_budget_text.CASES)))
def test_thinking_and_answer_are_those_of_the_account(index):
  strings = test_budget_text.CASES[index]
  ids = strings.tables().ids
  rng = np.random.default_rng(index)
  model = test_budget_text.writer(strings, index)
  closed = 0
  for i in range(400):
    prompt = rng.integers(2, strings.vocab_size, 2).tolist()
    in_thinking = bool(rng.random() < 0.7)
    account = Told(
        functools.partial(model, i), prompt, strings, Limits(
            maximum=int(rng.integers(-1, 9)), waits=int(rng.integers(0, 4)),
            tokens=int(rng.integers(1, 40)), steps=int(rng.integers(-1, 4))))
    row = account(in_thinking)
    found = thinking.split(
        row.tokens, [1 if s == "sampled" else 2 for s in row.sources], ids,
        in_thinking=in_thinking, is_open=row.closed == "open",
        length=row.thinking)
    text = strings.text(row.tokens)
    begin = 0 if in_thinking else -1
    if not in_thinking and strings.start and strings.start in text:
      begin = text.index(strings.start) + len(strings.start)
    want = expected(account, text, begin)
    if want is None:
      continue
    part = lambda span, tokens=tuple(row.tokens): "".join((
        *map(chr, span.before), strings.text(tokens[span.tokens]),
        *map(chr, span.after)))
    assert (part(found.thinking), part(found.answer)) == want
    closed += account.answer is not None
  assert closed > 150
