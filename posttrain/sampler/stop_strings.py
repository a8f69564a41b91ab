"""Stop strings, found on the host in the text of a growing row.

A string may begin and end inside tokens. What counts is the text: the row
ends with the first token that completes one of its strings, and the chunk in
which the host finds the string changes nothing.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


class Matcher:
  """Searches the text of one row, which grows from call to call.

  Each call of `find` is given all tokens so far, and decodes the new ones and
  a few before them only.
  """

  def __init__(self, strings: Sequence[str], decode: Decode):
    self._strings = tuple(strings)
    self._decode = decode
    self._searched = 0  # Tokens known not to complete a string.

  def find(self, tokens: list[int]) -> int:
    """Returns how many tokens the row keeps; -1 if no string is complete.

    Args:
      tokens: all tokens so far that cannot be retracted any more.
    """
    # The whole text is not decoded anew for every chunk, only its end.
    begin = self._begin(tokens)
    complete = lambda end: self._complete(self._decode(tokens[begin:end]))
    if not complete(len(tokens)):
      self._searched = len(tokens)
      return -1
    # The first token that completes a string, whatever the chunk brought.
    return next(end for end in range(self._searched + 1, len(tokens) + 1)
                if complete(end))

  def settled(self, tokens: list[int]) -> int:
    """Returns how many of the searched tokens no stop string can cut off.

    The others spell the beginning of a stop string.
    """
    begin = self._begin(tokens)
    text = self._decode(tokens[begin:])
    open_length = max(
        (n for s in self._strings for n in range(1, len(s))
         if text.endswith(s[:n])), default=0)
    end = len(tokens)
    while end > begin and open_length and (
        len(self._decode(tokens[begin:end])) > len(text) - open_length):
      end -= 1
    return end

  def _complete(self, text: str) -> bool:
    """True if the text has one of the strings in it."""
    return any(string in text for string in self._strings)

  def _begin(self, tokens: list[int]) -> int:
    """Returns a token before which no string that is not found yet begins."""
    # A decoder may treat the first token of a text in its own way, and a
    # character may need several tokens: hence more than the longest string.
    needed = max(map(len, self._strings)) + 4
    begin = self._searched
    while begin > 0:
      begin = max(begin - needed, 0)
      if len(self._decode(tokens[begin:self._searched])) >= 2 * needed:
        break
    return begin
