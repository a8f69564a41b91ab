"""Cuts in an assistant's text, so that training shows what sampling forces.

Budget forcing puts `thinking.end` and `final_answer` into a completion as
tokens that are spelt alone, with control tokens allowed. BPE would merge the
same strings with the text around them: ".</think>" may begin with the token
".</". So the assistant's text is cut at `start`, `end` and `delimiters`, and
behind a `final_answer` that follows `end`, and each of these is spelt alone.
A string that is one added token is found by any tokenizer, and a cut there
changes no token.

Wait texts are not cut. They are words, which stand in ordinary text too, and a
cut in " Waiting" would teach a spelling that no other text has. A newline is
not cut either: it is forced where the text does not end in a line break, and a
text that does has the tokenizer's own spelling.
"""

import re
from collections.abc import Callable, Iterator

from posttrain.text import thinking as thinking_lib
from posttrain.text import tokenizer as tokenizer_lib

Ids = tuple[int, ...]


class Cuts:
  """Strings at which the assistant's text is cut; none if `end` is empty.

  Attributes:
    strings: text of each -> the ids that spell it alone.
  """

  def __init__(
      self, strings: thinking_lib.Thinking, tokenizer: tokenizer_lib.Tokenizer,
      pattern: Callable[[str], str] = re.escape,
  ):
    """Spells the strings.

    Args:
      strings: the config's section `thinking`.
      tokenizer: of the text.
      pattern: makes the regular expression of a string, as texts have it.

    Raises:
      ValueError: as `thinking.spell`.
    """
    named = [("start", strings.start), ("end", strings.end),
             *(("delimiters", text) for text in strings.delimiters)]
    ids = {text: thinking_lib.spell(name, text, tokenizer)
           for name, text in named if strings.end and text}
    # A delimiter that is a stop token is never forced, and a model should not
    # learn to write it within a turn: there it stays text.
    own = {strings.start, strings.end}
    self.strings = {text: spelt for text, spelt in ids.items()
                    if text in own or not {*spelt} & {*tokenizer.stop_ids}}
    self._end = strings.end
    self._final = strings.final_answer
    self._final_ids = thinking_lib.spell(
        "final_answer", self._final if strings.end else "", tokenizer)
    self._patterns = {text: re.compile(pattern(text))
                      for text in (*self.strings, self._final)}

  def pieces(self, text: str) -> Iterator[tuple[str, Ids | None]]:
    """Cuts a text; yields pieces, and the ids of those that are spelt alone.

    As in sampling the first string to be completed counts. One that stands
    inside of `end` is a part of it, if that is there in full.
    """
    done = 0
    for begin, stop, ids in self._found(text):
      if begin > done:
        yield text[done:begin], None
      yield text[begin:stop], ids
      done = stop
    if done < len(text):
      yield text[done:], None

  def _found(self, text: str) -> Iterator[tuple[int, int, Ids]]:
    """Yields begin, end and ids of the strings in a text, in order."""
    done = 0
    search = lambda string: self._patterns[string].search(text, done)
    matches = {string: search(string) for string in self.strings}
    while True:
      matches = {
          string: match if match.start() >= done else search(string)
          for string, match in matches.items() if match}
      there = {string: match for string, match in matches.items() if match}
      if not there:
        return
      # The earliest end; of those that end there `end`, or the longest.
      string = min(there, key=lambda string: (
          there[string].end(), string != self._end, there[string].start()))
      match, whole = there[string], there.get(self._end)
      if whole and whole.start() <= match.start():
        string, match = self._end, whole
      yield match.start(), match.end(), self.strings[string]
      done = match.end()
      final = string == self._end and self._final_ids and (
          self._patterns[self._final].match(text, done))
      if final:
        yield done, final.end(), self._final_ids
        done = final.end()
