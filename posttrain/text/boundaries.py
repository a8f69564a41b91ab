"""Delimiter boundaries: where a tokenizer merges delimiters with other text.

The sampler and `thinking.split` search for a delimiter by its token ids. If it
is not one added token, BPE may merge across its edges: ".</think>" begins with
the token ".</" in many vocabularies, and the ids of "</think>" are not there. A
model writes what it has learnt, and SFT renders its examples in the same way.

Wait texts and the like are forced and never searched for: they may merge.
"""

from collections.abc import Iterator

from posttrain.text import thinking as thinking_lib
from posttrain.text import tokenizer as tokenizer_lib

# Text before and after delimiters, as models write it.
BEFORE = ("", " ", ".", "\n", "a", "1")
AFTER = ("", " ", "\n", "\n\n", "a", "1")


def warning(
    strings: thinking_lib.Thinking, tokenizer: tokenizer_lib.Tokenizer,
) -> str:
  """Describes the delimiters that are not always found, and the remedy; or "".
  """
  named = [("start", strings.start), ("end", strings.end),
           *(("delimiters", text) for text in strings.delimiters)]
  missed = {
      f"thinking.{name}={text!r}": example for name, text in named
      if strings.end and text
      and (example := next(_merged(text, tokenizer), None)) is not None}
  if not missed:
    return ""
  example = list(missed.values())[-1]
  parts = ", ".join(repr(tokenizer.token_text(i)) for i in _encode(
      example, tokenizer))
  return (
      f"{' and '.join(missed)} {'is' if len(missed) == 1 else 'are'} looked "
      "for by token ids, and this tokenizer merges across the edges: "
      f"{example!r} is written as {parts}. What the model thinks is not told "
      "from its answer there: budgets, waits and grading go wrong. Make each "
      "an added token (tokenizer.symbols, where the run trains its own), or "
      "set another string that stands alone in this tokenizer; "
      'thinking.end="" if the model does not think.')


def _merged(
    text: str, tokenizer: tokenizer_lib.Tokenizer) -> Iterator[str]:
  """Yields contexts in which the ids of a text are not those of it alone."""
  own = _encode(text, tokenizer)
  for before in BEFORE:
    for after in AFTER:
      if _one_word(before, text) or _one_word(text, after):
        continue  # A longer word, which is not the delimiter.
      found = _encode(before + text + after, tokenizer)
      if tokenizer.unk_id is not None and tokenizer.unk_id in found:
        continue  # A vocabulary of words cannot write this.
      if thinking_lib.find(found, own) < 0:
        yield before + text + after


def _one_word(left: str, right: str) -> bool:
  return bool(left and right) and (left[-1] + right[0]).isalnum()


def _encode(text: str, tokenizer: tokenizer_lib.Tokenizer) -> list[int]:
  """Encodes a text as in a completion: after other text, which here is "a"."""
  return tokenizer.encode(
      text, special=True, after=tokenizer.encode("a")[-1])
