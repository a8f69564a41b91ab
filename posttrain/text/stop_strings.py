"""Stop strings: searched in the text of a row, as it grows."""

import dataclasses
from collections.abc import Sequence

from posttrain.text import symbols


@dataclasses.dataclass(frozen=True)
class Stop:
  """Place of a stop string in a row's tokens.

  Attributes:
    end: index behind the token that completes the string.
    begin: index of the token in which the string begins.
    head: symbols of that token before the string.
  """

  end: int
  begin: int
  head: int


class Matcher:
  """Searches the text of one row for stop strings, as it grows.

  A string may begin and end inside tokens. What counts is the text: the row
  ends with the first token that completes one of its strings, and the chunk in
  which the host finds the string changes nothing. If several strings end at
  the same place, the longest counts.
  """

  def __init__(
      self, strings: Sequence[symbols.Symbols],
      tokens: Sequence[symbols.Symbols],
  ):
    """Takes the strings, one or more, and the symbols of each token."""
    self._strings = tuple(map(symbols.as_text, strings))
    self._tokens = tokens
    self._searched = 0  # Tokens known not to complete a string.
    self._tail = ""  # Their last symbols, in which a string may have begun.

  def find(self, tokens: Sequence[int]) -> Stop | None:
    """Finds the stop string that is completed first.

    Args:
      tokens: all tokens so far that cannot be retracted any more.
    """
    new = [symbols.as_text(self._tokens[token])
           for token in tokens[self._searched:]]
    text = self._tail + "".join(new)
    found = [(at + len(string), -len(string)) for string in self._strings
             if (at := text.find(string)) >= 0]
    if not found:
      self._searched = len(tokens)
      longest = max(map(len, self._strings)) - 1
      self._tail = text[len(text) - min(longest, len(text)):]
      return None
    place, length = min(found)
    begin = end = self._searched
    at = len(self._tail)
    while at < place:
      at += len(new[end - self._searched])
      end += 1
    begin = end
    while at > place + length:
      begin -= 1
      at -= len(self._tokens[tokens[begin]])
    return Stop(end, begin, place + length - at)

  def settled(self, tokens: Sequence[int]) -> int:
    """Returns how many of the tokens have no text of a string that is begun."""
    return symbols.before_begun(tokens, self._tokens, self._strings)
