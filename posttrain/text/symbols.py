"""Symbols of text: bytes of ordinary tokens, and control tokens.

Text is matched by its symbols, however tokens spell it. A control token is one
symbol of its own, so that typed text never equals a control token. So is each
word of a vocabulary of words, where decoding puts the spaces between.

  V: vocabulary
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

from posttrain.text import tokenizer as tokenizer_lib

Symbols = tuple[int, ...]
SPACES = " \t\n\r\v\f"
CONTROL = 256  # The symbol of a control token is this plus its id.


@dataclasses.dataclass(frozen=True)
class SymbolTable:
  """Symbols of one tokenizer, and its way to and from token ids.

  Attributes:
    tokens: [V] symbols of each token.
    parse: reads a configured string, see `parse`.
    spell: spells symbols as ids, see `speller`.
  """

  tokens: Sequence[Symbols]
  parse: Callable[[str], Symbols]
  spell: Callable[[Symbols], tuple[int, ...]]

  @classmethod
  def of(cls, tokenizer: tokenizer_lib.Tokenizer) -> "SymbolTable":
    """Makes the table of a tokenizer; it reads the whole vocabulary."""
    tokens = vocabulary(tokenizer)
    return cls(tokens, functools.partial(
        parse, tokenizer=tokenizer, tokens=tokens), speller(tokenizer, tokens))


def vocabulary(tokenizer: tokenizer_lib.Tokenizer) -> list[Symbols]:
  """Returns the symbols of each token: its bytes, or 256 + id for a control.

  A token without bytes, and each token of a vocabulary of words, is one symbol
  of its own, too.
  """
  own = {*tokenizer.controls.values(), *tokenizer.stop_ids}
  return [
      (CONTROL + i,) if i in own or tokenizer.words
      else tuple(tokenizer.token_bytes(i)) or (CONTROL + i,)
      for i in range(tokenizer.vocab_size)]


def parse(
    text: str, tokenizer: tokenizer_lib.Tokenizer, tokens: Sequence[Symbols],
) -> Symbols:
  """Returns the symbols of a configured string, control tokens by their ids.

  They are those of the tokens that spell it, since a tokenizer may normalize
  its text. A vocabulary that cannot spell the string gives ().

  Args:
    text: the string.
    tokenizer: of the vocabulary.
    tokens: [V] its symbols, see `vocabulary`.
  """
  ids = _encode(text, tokenizer, special=True)
  return () if tokenizer.unk_id in ids else tuple(
      s for i in ids for s in tokens[i])


def speller(
    tokenizer: tokenizer_lib.Tokenizer, tokens: Sequence[Symbols],
) -> Callable[[Symbols], tuple[int, ...]]:
  """Makes a function that spells symbols as token ids, alone.

  It is the tokenizer's own spelling behind other text, where that has the same
  bytes; else the fewest ordinary tokens, longer ones first. The function
  returns () where the vocabulary cannot spell the symbols.

  Args:
    tokenizer: of the vocabulary.
    tokens: [V] its symbols, see `vocabulary`.
  """
  ids: dict[Symbols, int] = {}
  for i, symbols in enumerate(tokens):
    ids.setdefault(symbols, i)

  @functools.cache
  def fewest(symbols: Symbols) -> tuple[int, ...]:
    best: list[tuple[int, ...] | None] = [()]  # By length of the beginning.
    for end in range(1, len(symbols) + 1):
      found = [(*before, ids[symbols[begin:end]])
               for begin, before in enumerate(best)
               if before is not None and symbols[begin:end] in ids]
      best.append(min(found, key=len, default=None))
    return best[-1] or ()

  def of_bytes(symbols: Symbols) -> tuple[int, ...]:
    try:
      text = bytes(symbols).decode()
    except UnicodeDecodeError:
      return fewest(symbols)
    own = tuple(_encode(text, tokenizer))
    same = tuple(s for i in own for s in tokens[i]) == symbols
    return own if same else fewest(symbols)

  def spell(symbols: Symbols) -> tuple[int, ...]:
    spelt: list[int] = []
    for control, part in itertools.groupby(symbols, _is_control):
      run = tuple(part)
      found = tuple(s - CONTROL for s in run) if control else of_bytes(run)
      if not found:
        return ()
      spelt += found
    return tuple(spelt)

  return spell


def as_text(symbols: Symbols) -> str:
  """Writes symbols as characters, one each, to search them with."""
  return "".join(map(chr, symbols))


def of_text(text: str) -> Symbols:
  """Reads the symbols of `as_text`."""
  return tuple(map(ord, text))


def decoded(symbols: Symbols, tokenizer: tokenizer_lib.Tokenizer) -> str:
  """Decodes symbols to text; bytes that are not UTF-8 become U+FFFD."""
  return "".join(
      tokenizer.decode([s - CONTROL for s in run]) if control
      else bytes(run).decode(errors="replace")
      for control, run in itertools.groupby(symbols, _is_control))


def _is_control(symbol: int) -> bool:
  return symbol >= CONTROL


def before_begun(
    tokens: Sequence[int], of: Sequence[Symbols], strings: Sequence[str],
) -> int:
  """Returns how many first tokens have no text of a string that is begun.

  Args:
    tokens: a text.
    of: [V] symbols of each token.
    strings: as `as_text` writes them; the text may end in a beginning of one.
  """
  tail, kept = "", len(tokens)
  longest = max(map(len, strings), default=1) - 1
  while kept and len(tail) < longest:
    kept -= 1
    tail = as_text(of[tokens[kept]]) + tail
  begun = max((n for string in strings for n in range(1, len(string))
               if tail.endswith(string[:n])), default=0)
  kept, left = len(tokens), begun
  while left > 0:
    kept -= 1
    left -= len(of[tokens[kept]])
  return kept


def shown(symbols: Symbols) -> str:
  """Writes symbols for a message, control tokens by their ids."""
  parts = itertools.groupby(symbols, _is_control)
  return " + ".join(
      ", ".join(f"token {s - CONTROL}" for s in part) if control
      else repr(bytes(part).decode(errors="backslashreplace"))
      for control, part in parts)


def _encode(
    text: str, tokenizer: tokenizer_lib.Tokenizer, *, special: bool = False,
) -> list[int]:
  """Encodes a string as it goes on after other text."""
  return tokenizer.encode(
      text, special=special, after=tokenizer.encode("a")[-1])
