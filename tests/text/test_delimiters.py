"""Delimiters as text. Oracle: a search of the whole text in plain Python.

The oracle sees one string, a character for each symbol, and knows nothing of
tokens, states or tables. Texts are cut into tokens in any way that the
vocabulary allows.
"""

import dataclasses
import functools
import random

import numpy as np
import pytest

from posttrain.interop import gguf_tokenizer, smollm2
from posttrain.text import delimiters, symbols
from tests.text import build

# start, end, further delimiters, step. Strings in which one is the beginning,
# the end or the middle of another, and which overlap with themselves.
STRINGS = (
    ("<think>", "</think>", (), "\n\n"),
    ("<think>", "</think>", ("<|im_start|>answer", "<|im_start|>"), "\n\n"),
    ("<think>", "</think>", ("</", "think"), "."),
    ("<think>", "</think>", ("</think", "hin"), ""),
    ("<think>", "</think>\n", ("</think>", "k>\n\n"), "\n"),
    ("<|im_start|>think", "<|im_start|>answer", ("<|im_start|>", "\n"), "t"),
    ("", "</think>", ("<|im_end|>",), "\n\n"),
    ("aa", "aab", ("ab", "aaab", "baa"), "aa"),
    ("aba", "abab", ("bb", "babb"), "aba"),
    ("<think>", "Wait", ("ait", "it."), "Wa"),
    ("<think>", "> <", ("</think> and", " "), "/think"),
    ("é", "中文", ("🙂", "文。"), "é"),
)
PIECES = (
    "<think>", "</think>", "</think", "</", "<", ">", "think", "hink>", "\n",
    "\n\n", ".", " ", ".</", "></", " </", ">\n", "answer", "Wait", "ait.",
    "it", "a", "aa", "ab", "aab", "aba", "abab", "bb", "b", "é", "中文", "中",
    "🙂", "。", "<|im_start|>", "<|im_end|>", "so 18", "x")


@dataclasses.dataclass(frozen=True)
class Found:
  """What a text has: places are indices of symbols; -1 for none."""

  begin: int
  delimiter: int = -1
  first: int = -1  # Of the delimiter.
  end: int = -1
  steps: tuple[int, ...] = ()  # Where each ends.


def search(text: str, strings, in_thinking: bool) -> Found:
  """Searches a whole text."""
  start, end, others, step = strings
  begin = 0
  if not in_thinking:
    begin = text.find(start) + len(start) if start and start in text else -1
  if begin < 0:
    return Found(-1)
  ends = []
  for i, d in enumerate((end, *others)):
    at = text.find(d, begin)
    if at >= 0:
      # The earliest end, and of those the longest.
      ends.append((at + len(d), -len(d), i))
  stop, length, which = min(ends, default=(len(text) + 1, 0, -1))
  steps, at = [], begin
  while step and 0 <= (at := text.find(step, at)) < stop - len(step):
    at += len(step)
    steps.append(at)
  if which < 0:
    return Found(begin, steps=tuple(steps))
  return Found(begin, which, stop + length, stop, tuple(steps))


class Cutter:
  """Cuts texts into tokens of a vocabulary, at random."""

  def __init__(self, tokens):
    self._ids = {}
    for i, token in enumerate(tokens):
      self._ids.setdefault(token, []).append(i)
    self._longest = min(max(map(len, tokens)), 24)

  def cut(self, text, rng):
    """Any way to spell the symbols, longer tokens more often."""
    ids, at = [], 0
    while at < len(text):
      fits = [size for size in range(1, self._longest + 1)
              if text[at:at + size] in self._ids]
      size = rng.choice([*fits, max(fits)])
      ids.append(rng.choice(self._ids[text[at:at + size]]))
      at += size
    return ids


def readable(text) -> str:
  return "".join(map(chr, text))


def check(machine, tokens, ids, strings, in_thinking):
  """Runs the tables over tokens, and compares each step with the search."""
  text = readable(s for i in ids for s in tokens[i])
  end, ends = strings[1], (strings[1], *strings[2])
  found = search(text, strings, in_thinking)
  state = machine.think if in_thinking else delimiters.PRE
  at = 0
  heads = {(int(t), int(n)): spelt for t, n, spelt in zip(
      machine.head_token, machine.head_symbols, machine.heads, strict=True)}
  places = []
  for token in ids:
    before, at = at, at + len(tokens[token])
    places.append(before)
    event = machine.event[state, token]
    within = lambda place, low=before, high=at: low < place <= high
    assert machine.symbols[token] == at - before
    assert machine.started[event] == (
        not in_thinking and within(found.begin))
    assert machine.steps[event] == sum(map(within, found.steps))
    ended = within(found.end)
    assert machine.delimiter[event] == (found.delimiter if ended else -1)
    state = machine.next[state, token]
    if ended:
      delimiter = ends[found.delimiter]
      assert machine.back[event] == at - found.first
      assert machine.kept[event] == (delimiter == end or (
          end.startswith(delimiter) and at == found.end))
      assert state == delimiters.ANSWER
      # The token in which it begins, and the text of that before it.
      index = max(i for i, place in enumerate(places) if place <= found.first)
      assert len(places) - index <= machine.longest[found.delimiter]
      size = found.first - places[index]
      if size:
        spelt = heads[ids[index], size]
        assert [s for i in spelt for s in tokens[i]] == list(
            tokens[ids[index]][:size])
      if machine.kept[event] and delimiter != end:
        assert spells(machine.rest[len(delimiter)], tokens) == end[
            len(delimiter):]
    elif found.end < 0 or at < found.end:
      thought = text[found.begin:at] if 0 <= found.begin <= at else ""
      begun = max(n for n in range(len(end)) if thought.endswith(end[:n]))
      assert machine.begun[state] == begun
      assert spells(machine.rest[begun], tokens) == end[begun:]
    else:
      assert state == delimiters.ANSWER and machine.begun[state] == 0
  return found


def spells(ids, tokens) -> str:
  return readable(s for i in ids for s in tokens[i])


def machines(tokenizer):
  """Yields the tables of all strings, with the strings as the oracle has them.
  """
  tokens = symbols.vocabulary(tokenizer)
  spell = symbols.speller(tokenizer, tokens)
  parse = functools.partial(
      symbols.parse, tokenizer=tokenizer, tokens=tokens)
  for start, end, others, step in STRINGS:
    parsed = delimiters.Strings(
        start=parse(start), end=parse(end),
        delimiters=tuple(map(parse, (end, *others))), step=parse(step))
    yield tokens, delimiters.build(parsed, tokens, spell), (
        readable(parsed.start), readable(parsed.end),
        tuple(map(readable, parsed.delimiters[1:])), readable(parsed.step))


def texts(strings, tokenizer, rng):
  """A text of pieces; control tokens, and their names as ordinary bytes."""
  start, end, others, step = strings
  own = [x for x in (start, end, *others, step) if x]
  pieces = []
  for _ in range(rng.randrange(1, 12)):
    kind = rng.random()
    if kind < 0.5:
      text = rng.choice(own)
      cut = rng.randrange(len(text) + 1)
      pieces.append(rng.choice((text, text[:cut], text[cut:])))
    elif kind < 0.9:
      pieces.append(readable(rng.choice(PIECES).encode()))
    else:
      pieces.append(chr(256 + rng.choice(
          [*tokenizer.controls.values()])))
  return tuple(map(ord, "".join(pieces)))


def run(tokenizer, cases, seed):
  """Checks `cases` texts; counts what they had in them."""
  rng = random.Random(seed)
  counts = np.zeros(5, int)
  for tokens, machine, strings in machines(tokenizer):
    cutter = Cutter(tokens)
    for _ in range(cases // len(STRINGS)):
      text = texts(strings, tokenizer, rng)
      in_thinking = rng.random() < 0.6
      found = check(
          machine, tokens, cutter.cut(text, rng), strings, in_thinking)
      counts += [1, found.begin >= 0, found.delimiter == 0,
                 found.delimiter > 0, len(found.steps)]
  return counts


@pytest.fixture(scope="module")
def smollm2_tokenizer():
  try:
    return gguf_tokenizer.load(smollm2.read())
  except ValueError as error:
    if "make smollm2" not in str(error):
      raise
    pytest.skip(f"SmolLM2-135M is not installed; run `make smollm2` ({error})")


CASES = 12_000


def test_real_vocabulary_equals_the_search(smollm2_tokenizer):
  counts = run(smollm2_tokenizer, CASES, seed=0)
  assert (counts >= CASES * np.array([1, 0.5, 0.1, 0.1, 0.2])).all(), counts


def test_merging_vocabulary_equals_the_search():
  counts = run(build.merging(), CASES, seed=1)
  assert (counts >= CASES * np.array([1, 0.5, 0.1, 0.1, 0.2])).all(), counts


def random_vocabulary(rng, letters):
  """All letters, and longer tokens, two of them the same."""
  tokens = [(ord(letter),) for letter in letters]
  tokens += [tuple(map(ord, rng.choices(letters, k=rng.randrange(2, 6))))
             for _ in range(rng.randrange(20))]
  return [*tokens, tokens[-1], (256 + len(tokens) + 1,)]


def spellings(text, tokens):
  """All ways to spell a text, as lists of symbols."""
  if not text:
    return [[]]
  return [[token, *rest] for token in set(tokens) if text[:len(token)] == token
          for rest in spellings(text[len(token):], tokens)]


def most_tokens(text, tokens):
  """Tries every first, inner and last token."""
  whole = any(readable(text) in readable(token) for token in tokens)
  firsts = {n for n in range(1, len(text)) for token in tokens
            if token[-n:] == text[:n]}
  lasts = {n for n in range(1, len(text)) for token in tokens
           if token[:n] == text[-n:]}
  inner = [len(way) + 2 for a in firsts for b in lasts
           if a + b <= len(text)
           for way in spellings(text[a:len(text) - b], tokens)]
  return max([int(whole), *inner])


@pytest.mark.parametrize("letters", ["ab", "abc"])
def test_random_vocabularies_equal_the_search(letters):
  """Any strings, with anything in common."""
  rng = random.Random(letters)
  word = lambda least, most: tuple(map(ord, rng.choices(
      letters, k=rng.randrange(least, most + 1))))
  seen = np.zeros(3, int)
  for _ in range(120):
    tokens = random_vocabulary(rng, letters)
    ids = {token: i for i, token in enumerate(tokens)}
    ends = tuple(dict.fromkeys(word(1, 5) for _ in range(rng.randrange(1, 5))))
    strings = delimiters.Strings(word(0, 3), ends[0], ends, word(0, 3))
    machine = delimiters.build(
        strings, tokens, lambda text, ids=ids: tuple(ids[s,] for s in text))
    cutter = Cutter(tokens)
    read = (readable(strings.start), readable(ends[0]),
            tuple(map(readable, ends[1:])), readable(strings.step))
    for _ in range(40):
      text = (*word(0, 20), *([tokens[-1][0]] * rng.randrange(2)), *word(0, 9))
      found = check(machine, tokens, cutter.cut(text, rng), read,
                    rng.random() < 0.5)
      seen += [found.begin >= 0, found.delimiter >= 0, bool(found.steps)]
    assert machine.longest == tuple(most_tokens(d, tokens) for d in ends)
    begins = {d[:n] for d in ends for n in range(1, len(d) + 1)}
    assert machine.opening.tolist() == [token in begins for token in tokens]
  assert (seen > 500).all(), seen


def test_the_most_tokens_of_a_delimiter_are_those_of_a_search():
  """In vocabularies that lack letters, so that many spellings do not exist."""
  rng = random.Random(5)
  counts = []
  for _ in range(300):
    tokens = [token for token in random_vocabulary(rng, "ab")
              if len(token) > 1 or rng.random() < 0.4]
    end = tuple(map(ord, rng.choices("ab", k=rng.randrange(1, 7))))
    machine = delimiters.build(
        delimiters.Strings((), end, (end,)), tokens, lambda text: (0,))
    assert machine.longest == (most_tokens(end, tokens),)
    counts.append(machine.longest[0])
  assert set(counts) >= {0, 1, 2, 3, 4}


def test_a_word_is_one_symbol():
  """ "OK" is no part of "OKAY", and the space before it none of it."""
  tokenizer = build.words("OK OKAY x")
  tokens = symbols.vocabulary(tokenizer)
  parse = functools.partial(
      symbols.parse, tokenizer=tokenizer, tokens=tokens)
  [whole] = parse("OK")
  [end] = parse("</think>")
  machine = delimiters.build(
      delimiters.Strings(parse("<think>"), (end,), ((end,), (whole,))),
      tokens, symbols.speller(tokenizer, tokens))
  hit = machine.event[machine.think]
  assert np.flatnonzero(hit).tolist() == sorted([end - 256, whole - 256])
  assert machine.longest == (1, 1) and machine.heads == ()
  assert machine.rest == ((end - 256,),)


def test_nothing_is_matched_without_an_end():
  tokens = [(97,), (98,)]
  machine = delimiters.build(
      delimiters.Strings((97,), (), ((),), (98,)), tokens, lambda text: ())
  assert not machine.event.any() and machine.longest == ()
  assert machine.heads == machine.rest == ()


def test_a_spelling_is_the_tokenizers_own_where_it_has_one():
  tokenizer = build.merging()
  tokens = symbols.vocabulary(tokenizer)
  spell = symbols.speller(tokenizer, tokens)
  parse = functools.partial(
      symbols.parse, tokenizer=tokenizer, tokens=tokens)
  text = "so it is.</think>\n"
  assert spell(parse(text)) == tuple(tokenizer.encode(text))
  # Half of a character; control tokens by their ids, and typed ones as text.
  half = tuple("é".encode()[1:])
  assert [tokens[i] for i in spell(half)] == [half]
  control = tokenizer.controls["<|im_end|>"]
  assert spell(parse("a<|im_end|>b")) == (
      *tokenizer.encode("a"), control, *tokenizer.encode("b"))
  typed = tuple(b"<|im_end|>")
  assert spell(typed) == tuple(tokenizer.encode("<|im_end|>"))


def test_what_cannot_be_spelt_is_an_error():
  """The message names the string, the token, and what to change."""
  tokens = [tuple(b"x</"), tuple(b"think>"), tuple(b"</"), tuple(b"</thi")]
  ids = {token: i for i, token in enumerate(tokens)}
  spell = lambda text: (ids[text],) if text in ids else ()
  strings = delimiters.Strings((), tuple(b"</think>"), (tuple(b"</think>"),))
  with pytest.raises(ValueError, match=(
      r"token 0, 'x</', may begin .*'</think>'.*before that, 'x'.*"
      r"tokenizer\.symbols")):
    delimiters.build(strings, tokens, spell)
  with pytest.raises(ValueError, match=(
      r"cannot spell '</think>', the rest of thinking\.end='</think>'")):
    delimiters.build(strings, tokens[1:], spell)
