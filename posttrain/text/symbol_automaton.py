"""Automaton over single symbols, and what tokens make of it.

  V: vocabulary
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from posttrain.text.symbols import Symbols


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Symbols of all tokens, one behind the other.

  Attributes:
    symbols: [all] int32.
    begins, lengths: [V] int64 and int32, where each token's symbols are.
  """

  symbols: np.ndarray
  begins: np.ndarray
  lengths: np.ndarray

  @classmethod
  def of(cls, tokens: Sequence[Symbols]) -> "Tokens":
    lengths = np.fromiter(map(len, tokens), np.int32, len(tokens))
    symbols = np.fromiter(
        itertools.chain.from_iterable(tokens), np.int32, lengths.sum())
    return cls(symbols, np.cumsum(lengths, dtype=np.int64) - lengths, lengths)


class Machine:
  """Automaton over single symbols.

  A state is "answer"; or "pre" and how much of `start` the text ends in; or
  "think", the longest beginning of a delimiter that the text ends in
  (Aho-Corasick), and how much of `step` it ends in.

  Attributes:
    states: all of them, those of `Automaton.next`.
    think: index of the one in which thinking begins.
  """

  def __init__(
      self, start: Symbols, delimiters: Sequence[Symbols], step: Symbols):
    self._start, self._step = start, step
    self._delimiters = tuple(delimiters)
    self._prefixes = {d[:n] for d in delimiters for n in range(len(d))} | {()}
    self._alphabet = sorted({*start, *step, *itertools.chain(*delimiters)})
    think = ("think", (), 0)
    self.states: list[tuple] = [("answer",), ("pre", 0), think]
    self.think = 2
    index = {key: i for i, key in enumerate(self.states)}
    moves = []
    for key in self.states:  # It grows as states are found.
      moves.append([self._move(key, symbol) for symbol in (
          -1, *self._alphabet)])  # -1: a symbol that is in no string.
      for to, _ in moves[-1]:
        if not isinstance(to, int) and to not in index:
          index[to] = len(self.states)
          self.states.append(to)
    size = len(self.states)
    # Behind the states is one for each delimiter, in which a token stays that
    # has completed it.
    self._next = np.array(
        [[size + to if isinstance(to, int) else index[to] for to, _ in row]
         for row in moves]
        + [[size + d] * (len(self._alphabet) + 1)
           for d in range(len(delimiters))], np.int32)
    self._steps = np.zeros_like(self._next)
    self._steps[:size] = [[steps for _, steps in row] for row in moves]

  def _move(self, key: tuple, symbol: int) -> tuple:
    """Returns the next state, or the delimiter's index; and steps ended."""
    if key[0] == "answer":
      return key, 0
    if key[0] == "pre":
      found = _grown(self._start, key[1], symbol)
      done = found == len(self._start) > 0
      return (("think", (), 0) if done else ("pre", found)), 0
    text = (*key[1], symbol)
    ended = max((d for d in self._delimiters if text[-len(d):] == d),
                key=len, default=None)
    if ended is not None:
      return self._delimiters.index(ended), 0
    node = next(text[i:] for i in range(len(text) + 1)
                if text[i:] in self._prefixes)
    found = _grown(self._step, key[2], symbol)
    if found == len(self._step) > 0:  # Steps do not overlap.
      return ("think", node, 0), 1
    return ("think", node, found), 0

  def begins(self, key: tuple) -> list[int]:
    """Lists the lengths of all beginnings of delimiters a state ends in."""
    node = key[1] if key[0] == "think" else ()
    return [n for n in range(1, len(node) + 1)
            if node[-n:] in self._prefixes]

  def begun(self, key: tuple, end: Symbols) -> int:
    """Returns the longest beginning of `end` that a state ends in."""
    return max((n for n in self.begins(key) if key[1][-n:] == end[:n]),
               default=0)

  def behind_start(self, key: tuple, token: Symbols) -> int:
    """Returns the symbols of a token behind the `start` that it completes."""
    found = key[1]
    for place, symbol in enumerate(token):
      found = _grown(self._start, found, symbol)
      if found == len(self._start):
        return len(token) - place - 1
    return 0

  def run(self, flat: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs all tokens from all states.

    Returns:
      [states, V] int32 each: the state behind the token, `len(states)` and
      more where it has completed a delimiter; steps that it ended before; and
      its symbols behind the delimiter.
    """
    size, classes = len(self.states), self._next.shape[1]
    lookup = np.zeros(max(flat.symbols.max(), 255) + 1, np.int32)
    # A string may name a control token that this vocabulary lacks.
    known = [s for s in self._alphabet if s < lookup.size]
    lookup[known] = np.searchsorted(self._alphabet, known) + 1
    kinds = lookup[flat.symbols]
    # States as offsets of their rows, and both counts in one number.
    moves = self._next.ravel() * classes
    counts = self._steps.ravel() << 16
    counts[size * classes:] = 1
    order = np.argsort(-flat.lengths, kind="stable")
    state = np.empty((order.size, size), np.int32)
    count = np.zeros((order.size, size), np.int32)
    for first in range(0, order.size, _BLOCK):
      block = order[first:first + _BLOCK]  # The longest token comes first.
      now = np.tile(np.arange(size) * classes, (block.size, 1))
      gained = np.zeros(now.shape, np.int32)
      for place in range(flat.lengths[block[0]]):
        n = np.searchsorted(-flat.lengths[block], -place)
        at = now[:n] + kinds[flat.begins[block[:n]] + place, None]
        gained[:n] += counts[at]
        now[:n] = moves[at]
      state[block], count[block] = now // classes, gained
    count = np.ascontiguousarray(count.T)
    return np.ascontiguousarray(state.T), count >> 16, count & 0xffff


_BLOCK = 4096  # Tokens; with 26 states their arrays fit a core's cache.


def _grown(string: Symbols, length: int, symbol: int) -> int:
  """Returns how much of a string a text ends in, one symbol later."""
  text = (*string[:length], symbol)
  return next(n for n in range(min(len(text), len(string)), -1, -1)
              if n == 0 or text[-n:] == string[:n])
