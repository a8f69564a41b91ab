"""Delimiters as text: an automaton over the bytes of tokens, as tables.

Byte-level BPE merges across the edges of a delimiter: ".</think>" may begin
with the token ".</". So delimiters are matched on text, however it is spelt;
for the symbols of the text see `symbols`.

A row's state says which beginnings of the strings its text ends in. A token
takes it to the next state, and may complete a string: an event. Both are tables
[states, V], which the decode loop is given as arguments.

  V: vocabulary  E: events  N: heads
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from posttrain.text.symbol_automaton import Machine, Tokens
from posttrain.text.symbols import Symbols, shown

# States that rows begin in: past the thinking, where nothing matches, and
# before it, where only `start` does. Thinking begins in `Automaton.think`.
ANSWER, PRE = 0, 1


@dataclasses.dataclass(frozen=True)
class Strings:
  """Strings to match, as symbols; see `thinking.Thinking`.

  `delimiters` has `end` among them. `start` and `step` may be empty.
  """

  start: Symbols
  end: Symbols
  delimiters: tuple[Symbols, ...]
  step: Symbols = ()


NOTHING = Strings((), (), ())


@dataclasses.dataclass(frozen=True)
class Automaton:
  """Automaton of one tokenizer and its strings, as NumPy arrays.

  Attributes:
    next: [states, V] int8 or int16, the state behind each token. In PRE a token
      that completes `start` leads to the state that its text behind `start`
      gives from `think` on.
    event: [states, V] int8 or int16, 0 for none, else an index below.
    started: [E] bool, the token completes `start`.
    behind: [E] int32, symbols of the token behind `start`, if it completes it.
    delimiter: [E] int32, the delimiter that the token completes, first in text
      (of those that end there, the longest); -1 for none. Text behind it in the
      token is not looked at.
    back: [E] int32, symbols from the delimiter's begin to the token's end.
    kept: [E] bool, the delimiter is `end`, or a beginning of `end` with no text
      behind it in the token: it may stay where it is.
    steps: [E] int32, steps of thinking that the token ends, before a delimiter.
    symbols: [V] int32, symbols of each token, 1 or more.
    begun: [states] int32, symbols of `end` that the text ends in: its longest
      beginning, never the whole.
    opening: [V] bool, tokens that are wholly a beginning of a delimiter.
    head_token, head_symbols: [N] int32, a token, and how many of its first
      symbols stand before a delimiter that may begin in it.
    heads: [N] the token ids that spell those symbols.
    rest: rest[d] are the token ids that spell `end` from symbol d on, each
      spelt alone; d from 0 to below the length of `end`.
    think: the state in which thinking begins.
    longest: for each delimiter the most tokens that it may be spelt in, its
      first and last token (which may have other text too) included.
  """

  next: np.ndarray
  event: np.ndarray
  started: np.ndarray
  behind: np.ndarray
  delimiter: np.ndarray
  back: np.ndarray
  kept: np.ndarray
  steps: np.ndarray
  symbols: np.ndarray
  begun: np.ndarray
  opening: np.ndarray
  head_token: np.ndarray
  head_symbols: np.ndarray
  heads: tuple[tuple[int, ...], ...]
  rest: tuple[tuple[int, ...], ...]
  think: int
  longest: tuple[int, ...]


def build(
    strings: Strings, tokens: Sequence[Symbols],
    spell: Callable[[Symbols], tuple[int, ...]],
) -> Automaton:
  """Builds the tables; for 26 states and 152k tokens in about a second.

  Args:
    strings: to match; with `end` empty nothing is matched.
    tokens: [V] symbols of each token.
    spell: spells symbols as token ids, alone; () if there is no spelling.

  Raises:
    ValueError: a head, or a rest of `end`, has no spelling.
  """
  if not strings.end:
    strings = NOTHING
  machine = Machine(strings.start, strings.delimiters, strings.step)
  flat = Tokens.of(tokens)
  state, steps, behind = machine.run(flat)
  after = np.where(state < len(machine.states), state, ANSWER)
  event, events = _events(strings, machine, tokens, state, steps, behind)
  reached = _reached(after, (PRE, machine.think))
  head_token, head_symbols = _heads(
      machine, flat, after[reached], event[reached], events)
  heads = []
  for token, size in zip(head_token, head_symbols, strict=True):
    heads.append(spell(tokens[token][:size]))
    if not heads[-1]:
      raise ValueError(_no_head(strings, int(token), tokens[token], size))
  begun = np.array([
      machine.begun(key, strings.end) for key in machine.states], np.int32)
  begins = {len(d) for d in strings.delimiters if strings.end[:len(d)] == d}
  known = set(tokens)
  return Automaton(
      next=_small(after), event=_small(event), symbols=flat.lengths,
      begun=begun, opening=_opening(strings.delimiters, tokens),
      head_token=head_token, head_symbols=head_symbols, heads=tuple(heads),
      rest=_rest(strings.end, {0, *begun[reached].tolist(), *begins}, spell),
      think=machine.think, longest=tuple(
          _longest(d, known, flat) for d in strings.delimiters), **events)


def _events(
    strings: Strings, machine: Machine, tokens: Sequence[Symbols],
    state: np.ndarray, steps: np.ndarray, behind: np.ndarray,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Numbers what tokens complete: [states, V] int32, and columns [E]."""
  size = len(machine.states)
  pre = np.array([key[0] == "pre" for key in machine.states])
  done = np.zeros(len(strings.delimiters), bool)
  started = pre[:, None] & ~np.append(pre, done)[state]
  at = np.flatnonzero(started | (state >= size) | (steps > 0))
  d = np.maximum(state.ravel()[at] - size, -1)  # -1: none.
  lengths = np.array([*map(len, strings.delimiters), 0])
  is_end = np.array([*(x == strings.end for x in strings.delimiters), False])
  begins_end = np.array([
      *(strings.end[:len(x)] == x for x in strings.delimiters), False])
  behind, opened = behind.ravel()[at], np.zeros(at.size, np.int32)
  for i in np.flatnonzero(started.ravel()[at]):
    row, token = np.unravel_index(at[i], state.shape)
    opened[i] = machine.behind_start(machine.states[row], tokens[token])
  rows = np.stack([
      started.ravel()[at], d, lengths[d] + behind,
      is_end[d] | begins_end[d] & (behind == 0), steps.ravel()[at], opened])
  # One number for each column of `rows`, as that sorts faster than rows do.
  packed = np.ravel_multi_index(
      rows + np.array([0, 1, 0, 0, 0, 0])[:, None],
      rows.max(axis=1, initial=0) + np.array([1, 2, 1, 1, 1, 1]))
  _, first, which = np.unique(
      packed, return_index=True, return_inverse=True)
  event = np.zeros(state.size, np.int32)
  event[at] = which + 1
  none = np.array([0, -1, 0, 0, 0, 0])[:, None]
  columns = np.concatenate([none, rows[:, first]], axis=1)
  return event.reshape(state.shape), {
      "started": columns[0] > 0, "delimiter": columns[1].astype(np.int32),
      "back": columns[2].astype(np.int32), "kept": columns[3] > 0,
      "steps": columns[4].astype(np.int32),
      "behind": columns[5].astype(np.int32)}


def _reached(after: np.ndarray, first: Sequence[int]) -> np.ndarray:
  """Returns [states] bool, those that whole tokens lead to."""
  reached = np.zeros(len(after), bool)
  todo = list(first)
  while todo:
    state = todo.pop()
    if not reached[state]:
      reached[state] = True
      todo += np.flatnonzero(np.bincount(
          after[state], minlength=len(after))).tolist()
  return reached


def _heads(
    machine: Machine, flat: Tokens, after: np.ndarray, event: np.ndarray,
    events: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
  """Finds tokens in which a delimiter may begin, and their symbols before it.

  Args:
    after, event: [reached states, V].
    events: columns [E].

  Returns:
    [N] int32 each, ordered.
  """
  # Delimiters that the token itself completes, and those that it begins.
  _, token = np.nonzero(event)
  which = event[event > 0]
  ended = events["delimiter"][which] >= 0
  pairs = [np.stack([token[ended], events["back"][which[ended]]])]
  begins = [machine.begins(key) for key in machine.states]
  row, token = np.nonzero(np.array([bool(x) for x in begins])[after])
  state = after[row, token]
  for key, lengths in enumerate(begins):
    for length in lengths:
      of_key = np.unique(token[state == key])
      pairs.append(np.stack([of_key, np.full(of_key.size, length)]))
  token, back = np.concatenate(pairs, axis=1)
  size = flat.lengths[token] - back
  found = np.unique(np.stack([token, size])[:, size > 0], axis=1)
  return found[0].astype(np.int32), found[1].astype(np.int32)


def _opening(
    delimiters: Sequence[Symbols], tokens: Sequence[Symbols]) -> np.ndarray:
  """Returns [V] bool, tokens that are wholly a beginning of a delimiter."""
  begins = {d[:n] for d in delimiters for n in range(1, len(d) + 1)}
  return np.fromiter((token in begins for token in tokens), bool, len(tokens))


def _rest(
    end: Symbols, needed: set[int],
    spell: Callable[[Symbols], tuple[int, ...]],
) -> tuple[tuple[int, ...], ...]:
  """Spells what is left of `end` from each symbol on.

  Raises:
    ValueError: there is no spelling, and a text may have come so far.
  """
  rest = tuple(spell(end[d:]) for d in range(len(end)))
  for d in sorted(needed & set(range(len(end)))):
    if not rest[d]:
      raise ValueError(
          f"This vocabulary cannot spell {shown(end[d:])}, the rest of "
          f"thinking.end={shown(end)} where its beginning is written. Change "
          "thinking.end, or make it an added token (tokenizer.symbols, where "
          "the run trains its own).")
  return rest


def _no_head(
    strings: Strings, token: int, symbols: Symbols, size: int) -> str:
  tail = symbols[size:]
  named = next(d for d in strings.delimiters
               if d[:len(tail)] == tail[:len(d)])
  return (
      f"The token {token}, {shown(symbols)}, may begin the thinking delimiter "
      f"{shown(named)}, and this vocabulary cannot spell its text before that, "
      f"{shown(symbols[:size])}. Change thinking.end or thinking.delimiters, "
      "or make the delimiter an added token (tokenizer.symbols, where the run "
      "trains its own).")


def _longest(
    delimiter: Symbols, known: set[Symbols], flat: Tokens) -> int:
  """Returns the most tokens that a delimiter is spelt in; 0: it never is.

  Its first token may have text before it, and its last one text behind it.

  Args:
    delimiter: its symbols.
    known, flat: all tokens.
  """
  size, text = len(delimiter), np.array(delimiter)
  # Does a token end in its first n symbols, or begin with those from n on?
  edge = lambda part, begins: _any_equal(part, begins, flat)
  last = flat.begins + flat.lengths
  most = [0] * size  # Tokens of the first n symbols; 0: none.
  for n in range(1, size):
    inner = [most[m] + 1 for m in range(1, n)
             if most[m] and delimiter[m:n] in known]
    most[n] = max([*inner, int(edge(text[:n], last - n))])
  ends = [most[n] + 1 for n in range(1, size)
          if most[n] and edge(text[n:], flat.begins)]
  return max([*ends, int(_any_inside(text, flat))])


def _any_equal(part: np.ndarray, begins: np.ndarray, flat: Tokens) -> bool:
  """Tests if any token has `part` at `begins` [V]."""
  fits = begins[flat.lengths >= part.size]
  for i, symbol in enumerate(part):
    fits = fits[flat.symbols[fits + i] == symbol]
  return bool(fits.size)


def _any_inside(part: np.ndarray, flat: Tokens) -> bool:
  """Tests if any token has `part` in it."""
  at = np.arange(flat.symbols.size - part.size + 1)
  for i, symbol in enumerate(part):
    at = at[flat.symbols[at + i] == symbol]
  token = lambda place: np.searchsorted(flat.begins, place, "right")
  return bool((token(at) == token(at + part.size - 1)).any())


def _small(table: np.ndarray) -> np.ndarray:
  return table.astype(np.int8 if table.max() < 128 else np.int16)
