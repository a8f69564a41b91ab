"""Byte-level BPE with GGUF's pre-type "smollm", in plain Python.

Written from llama.cpp's two splitting expressions: first every numeric
character alone (`\\p{N}`), then GPT-2's

  's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)

within what is left, where white space that nothing else takes stands alone.
"""

import itertools
import unicodedata

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def kind(char: str) -> str:
  """"L", "N", " " or "." as the expressions tell characters apart."""
  if unicodedata.category(char)[0] in "LN":
    return unicodedata.category(char)[0]
  # Unicode's White_Space property: \s. str.isspace has four more (1c-1f).
  return " " if char.isspace() and not "\x1c" <= char <= "\x1f" else "."


def run(text: str, start: int) -> int:
  end = start
  while end < len(text) and kind(text[end]) == kind(text[start]):
    end += 1
  return end


def split_words(text: str) -> list[str]:
  """GPT-2's expression on a text without numeric characters."""
  words, at = [], 0
  while at < len(text):
    contraction = next(
        (c for c in CONTRACTIONS if text.startswith(c, at)), "")
    first = at + (text[at] == " ")
    if contraction:
      end = at + len(contraction)
    elif first < len(text) and kind(text[first]) != " ":
      end = run(text, first)
    else:
      end = run(text, at)
      if end < len(text) and end - at > 1:
        end -= 1  # \s+(?!\S): the last one belongs to the next word.
    words.append(text[at:end])
    at = end
  return words


def split(text: str) -> list[str]:
  pieces, start = [], 0
  for at, char in enumerate(text):
    if kind(char) == "N":
      pieces += [*split_words(text[start:at]), char]
      start = at + 1
  return pieces + split_words(text[start:])


def byte_symbols() -> dict[int, str]:
  """GPT-2's printable stand-ins for the 256 bytes."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [byte for byte in range(256) if byte not in plain]
  return {byte: chr(byte) for byte in plain} | {
      byte: chr(256 + i) for i, byte in enumerate(rest)}


def tables(tokens: list[str], merges: list[str]) -> tuple[dict, dict]:
  """Ids of the tokens and ranks of the pairs."""
  ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
  return {token: i for i, token in enumerate(tokens)}, ranks


def encode(text: str, ids: dict, ranks: dict) -> list[int]:
  """Ids of a text without special tokens."""
  return [i for piece in split(text) for i in encode_word(piece, ids, ranks)]


def encode_word(piece: str, ids: dict, ranks: dict) -> list[int]:
  """Merges in the order of their rank."""
  symbols = byte_symbols()
  parts = [symbols[byte] for byte in piece.encode()]
  while len(parts) > 1:
    pairs = list(itertools.pairwise(parts))
    best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
    if best not in ranks:
      break
    at = pairs.index(best)
    parts[at:at + 2] = ["".join(best)]
  # SmolLM2 has no token for 21 of the 256 bytes; both readers skip them.
  return [ids[part] for part in parts if part in ids]
