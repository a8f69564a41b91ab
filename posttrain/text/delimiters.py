"""Delimiters as text: an automaton over the bytes of tokens, as tables.

Byte-level BPE merges across the edges of a delimiter: ".</think>" may begin
with the token ".</". So delimiters are matched on text, however it is spelt.
The symbols of the text are the bytes of ordinary tokens; a control token is one
symbol of its own, so that typed text never equals a control token.

A row's state says which beginnings of the strings its text ends in. A token
takes it to the next state, and may complete a string: an event. Both are tables
[states, V], which the decode loop is given as arguments.

  V: vocabulary  E: events  N: heads
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from posttrain.text import tokenizer as tokenizer_lib

Symbols = tuple[int, ...]

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


@dataclasses.dataclass(frozen=True)
class Automaton:
  """Automaton of one tokenizer and its strings, as NumPy arrays.

  Attributes:
    next: [states, V] int8 or int16, the state behind each token. In PRE a token
      that completes `start` leads to the state that its text behind `start`
      gives from `think` on.
    event: [states, V] int8 or int16, 0 for none, else an index below.
    started: [E] bool, the token completes `start`.
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


def vocabulary(tokenizer: tokenizer_lib.Tokenizer) -> list[Symbols]:
  """Returns the symbols of each token: its bytes, or 256 + id for a control.
  """
  raise NotImplementedError


def parse(text: str, tokenizer: tokenizer_lib.Tokenizer) -> Symbols:
  """Returns the symbols of a configured string, control tokens by their ids.
  """
  raise NotImplementedError


def build(
    strings: Strings, tokens: Sequence[Symbols],
    spell: Callable[[Symbols], tuple[int, ...]],
) -> Automaton:
  """Builds the tables; for 26 states and 152k tokens in about a second.

  Args:
    strings: to match; with `end` empty nothing is matched.
    tokens: [V] symbols of each token.
    spell: spells symbols as token ids, alone.

  Raises:
    ValueError: a head, or a rest of `end`, has no spelling.
  """
  raise NotImplementedError
