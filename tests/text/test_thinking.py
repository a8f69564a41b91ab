"""Oracles: completions whose parts are known because they were put there.

In those of merging tokens, sampled text is cut into tokens in any way, over the
edges of delimiters; forced strings are spelt alone.
"""

import dataclasses
import functools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.text import symbols, thinking
from posttrain.text import tokenizer as tokenizer_lib
from tests.text import build, families, test_delimiters

IDS = build.alone(
    start=(1, 2), end=(3, 4), delimiters=((3, 4), (5,)), newline=(6,),
    final_answer=(7,), wait=(8, 6))
OTHER = st.lists(st.integers(10, 15), max_size=5)


def parts(tokens, provenance, *, in_thinking):
  found = thinking.split(tokens, provenance, IDS, in_thinking=in_thinking)
  assert found.thinking == thinking.Span(found.thinking.tokens)
  return (tokens[found.thinking.tokens], tokens[found.answer.tokens],
          found.closed)


@given(before=OTHER, thought=OTHER, answer=OTHER, newline=st.booleans(),
       closed=st.booleans(), in_thinking=st.booleans())
def test_split_finds_the_parts(
    before, thought, answer, newline, closed, in_thinking):
  head = [] if in_thinking else [*before, 1, 2]
  tokens = head + thought
  provenance = [1] * len(tokens)
  if closed:
    tail = [6] * newline + [3, 4] + answer
    tokens += tail
    provenance += [2] * (newline + 2) + [1] * len(answer)
  assert parts(tokens, provenance, in_thinking=in_thinking) == (
      thought, answer if closed else [], closed)


def test_a_newline_that_was_sampled_is_thinking():
  assert parts([10, 6, 3, 4], [1, 1, 2, 2], in_thinking=True) == (
      [10, 6], [], True)


def test_the_newline_of_a_wait_is_thinking():
  """None is forced behind it, because the text ends in one already."""
  assert parts([10, 8, 6, 3, 4], [1, 2, 2, 2, 2], in_thinking=True) == (
      [10, 8, 6], [], True)


def test_without_a_start_there_is_no_thinking():
  assert parts([10, 11], [1, 1], in_thinking=False) == ([], [10, 11], False)
  found = thinking.split(
      [10], [1], thinking.ThinkingIds(), in_thinking=True)
  assert (found.thinking.tokens, found.answer.tokens) == (
      slice(0, 0), slice(0, 1))


def test_resolve_encodes_and_puts_end_first():
  tokenizer = build.chatml()
  ids = thinking.resolve(thinking.Thinking(
      start="<think>", end="</think>", delimiters=("</think>", "<|im_end|>"),
      newline="\n", final_answer="The answer is", wait_text="Wait"), tokenizer)
  token = lambda text: tuple(tokenizer.encode(text, special=True))
  assert ids.strings.delimiters == (
      tuple(b"</think>"), (256 + tokenizer.eos_id,))
  assert ids.end == token("</think>") and len(ids.end) == 1
  assert tokenizer.decode(ids.final_answer) == "The answer is"
  empty = thinking.Thinking(end="</think>", delimiters=("",))
  assert thinking.resolve(empty, tokenizer).strings.delimiters == (
      tuple(b"</think>"),)
  unused = thinking.Thinking(start="<think>", newline="\n", wait_text="Wait")
  assert thinking.resolve(unused, tokenizer) == thinking.ThinkingIds()


def test_what_cannot_be_forced_is_an_error():
  words = build.words()
  make = lambda **fields: thinking.resolve(
      thinking.Thinking(**{"end": "</think>", **fields}), words)
  with pytest.raises(ValueError, match=r"out of thinking\.newline"):
    make(newline="\n")
  with pytest.raises(ValueError, match=r"tokenizer\.symbols"):
    make(wait_text="Hold on")


@pytest.mark.parametrize("prompt, is_open", [
    ("x<think>", True), ("<think>\n", True), ("a.<think> \n\n", True),
    ("<think>a", False), ("<think></think>", False), ("", False),
    ("think>", False), ("<think><think>", True), ("<think", False),
    ("what is <think> for?\n", False), ("</think>x<think>\n", True)])
@pytest.mark.parametrize("tokenizer", [build.merging(), build.chatml()])
def test_a_prompt_that_ends_in_start_opens_thinking(
    prompt, is_open, tokenizer):
  strings = thinking.Thinking(start="<think>", end="</think>")
  ids = thinking.resolve(strings, tokenizer)
  encoded = tokenizer.encode(prompt)
  assert thinking.opens(encoded, ids) == is_open
  by_letters = [tokenizer.encode(letter)[0] for letter in prompt]
  assert thinking.opens(by_letters, ids) == is_open
  # A control token behind it is no white space.
  assert not thinking.opens([*encoded, tokenizer.eos_id], ids)
  line = dataclasses.replace(strings, start="<think>\n")
  assert thinking.opens(encoded, thinking.resolve(line, tokenizer)) == (
      is_open and "<think>\n" in prompt)
  always = thinking.resolve(dataclasses.replace(strings, start=""), tokenizer)
  assert thinking.opens(encoded, always)
  assert not thinking.opens(encoded, thinking.ThinkingIds())


def test_a_long_blank_prompt_takes_no_time():
  """Its end is looked at each time that rows are admitted."""
  tokenizer = build.merging()
  ids = thinking.resolve(
      thinking.Thinking(start="<think>\n", end="</think>"), tokenizer)
  blank = tokenizer.encode(" ") * 20_000
  began = time.process_time()
  assert not thinking.opens(tokenizer.encode("<think>") + blank, ids)
  assert thinking.opens(tokenizer.encode("<think>\n") + blank, ids)
  assert time.process_time() - began < 1  # It is 10 ms.


def test_strings_are_matched_as_they_are_forced(tmp_path):
  """Qwen's tokenizers compose characters, so that the two could differ."""
  tokenizer = tokenizer_lib.load(families.write(tmp_path, "qwen3"))
  ids = thinking.resolve(thinking.Thinking(
      start="e\u0301", end="fin e\u0301.", step="e\u0301"), tokenizer)
  found = ids.strings
  assert bytes(found.start).decode() == bytes(found.step).decode() == "\xe9"
  assert found.end == tuple(s for i in ids.end for s in ids.tokens[i])


class Writer:
  """Writes a completion part by part, and knows what it writes.

  Attributes:
    tokens, codes: of the completion, codes 1 sampled and 2 forced.
    thinking: the text of the thinking.
    begin: place of the thinking in the text, -1 before it.
    length: tokens that have some text of the thinking.
  """

  def __init__(self, cutter, table, begin):
    self.cutter, self.table = cutter, table
    self.tokens, self.codes = [], []
    self.thinking, self.begin, self.length = "", begin, 0
    self.size = 0

  def write(self, before, thought, behind, code, ids=None):
    """Writes one run: text before the thinking, in it, and behind it."""
    text = before + thought + behind
    if ids is None:
      ids = self.cutter.cut(tuple(map(ord, text)))
    assert spelt(ids, self.table) == text
    if before:
      self.begin = self.size + len(before)
    stop = self.size + len(before) + len(thought)
    for token in ids:
      first = self.size
      self.size += len(self.table[token])
      self.length += max(first, self.begin) < min(self.size, stop)
      self.tokens.append(token)
      self.codes.append(code)
    self.thinking += thought


def spelt(ids, table) -> str:
  return "".join(chr(s) for i in ids for s in table[i])


def a_run(rng, end, pieces):
  """Text in which `end` does not occur."""
  while True:
    text = "".join(rng.choice(pieces) for _ in range(rng.randrange(4)))
    if end not in text:
      return text


def begun(text, end) -> int:
  return max(n for n in range(len(end)) if text.endswith(end[:n]))


MERGING = build.merging()
KINDS = ("open", "natural", "replaced", "closed", "begun", "cut")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end, newline", [
    ("</think>", "\n"), ("</think>\n", "\n"), ("aba", ""), ("aab", "\n"),
    ("\n\n", "\n"), (". </", "")])
def test_split_is_exact_however_the_end_is_spelt(kind, end, newline):
  rng = random.Random(f"{kind} {end}")
  ids = thinking.resolve(thinking.Thinking(
      start="<think>", end=end, newline=newline, wait_text="Wait",
      final_answer="So"), MERGING)
  cutter = test_delimiters.Cutter(ids.tokens)
  cutter.cut = functools.partial(cutter.cut, rng=rng)
  spell = symbols.speller(MERGING, ids.tokens)
  force = lambda text: spell(tuple(map(ord, text)))
  pieces = [end[:1], end[:2], end[1:], end[:-1], "x", "<", ".", " ", ">", "\n",
            "<think>"]
  inside = 0
  for _ in range(250):
    in_thinking = rng.random() < 0.5
    out = Writer(cutter, ids.tokens, 0 if in_thinking else -1)
    before = "" if in_thinking else a_run(
        rng, "<think>", [*pieces[:-1], end]) + "<think>"
    # Rounds of thinking, each of which a wait ends. Where that has no text,
    # two sampled runs meet: nothing is matched across them.
    for _ in range(rng.randrange(3)):
      out.write(before, a_run(rng, end, pieces), "", 1)
      before = ""
      wait = rng.choice(("", "Wait", "Wait" + end, ">" + end[:1]))
      out.write("", wait, "", 2, force(wait) if wait else ())
    last, answer = a_run(rng, end, pieces), rng.choice(("", "\n18", end, "a"))
    # What the model has begun to write at a maximum is no thinking.
    own = begun(last, end)
    text = last[:len(last) - own]
    if kind == "open":
      out.write(before, last, "", 1)
    elif kind == "natural":
      if end in (last + end)[:-1]:
        continue
      out.write(before, last, end + answer, 1)
    elif kind == "replaced":
      head = rng.randrange(len(last) + 1) if last and rng.random() < 0.5 else 0
      out.write(before, last[:len(last) - head], "", 1)
      if head:
        out.write("", last[len(last) - head:], "", 2)
      out.write("", "", end, 2, force(end))
    else:
      if own:
        out.write(before, text, end[:own], 1)
      else:
        out.write(before, last, "", 1)
        if newline and not spelt(out.tokens, ids.tokens).endswith("\n"):
          out.write("", "", newline, 2, force(newline))
      if bool(own) != (kind == "begun") and kind != "cut":
        continue
      out.write("", "", end[own:], 2, force(end[own:]))
    if kind == "cut":
      whole = len(force(end[own:]))
      left = len(out.tokens) - rng.randrange(1, whole + 1)
      del out.tokens[left:], out.codes[left:]
      answer = ""
    elif kind in ("replaced", "closed", "begun"):
      # It may not fit. Then "\n\n" cannot be told from one that is cut off.
      final = rng.choice(("", "So")) if end != "\n\n" else "So"
      out.write("", "", final, 2, force(final) if final else ())
      out.write("", "", answer, 1)
      answer = final + answer
    found = thinking.split(
        out.tokens, out.codes, ids, in_thinking=in_thinking,
        is_open=kind == "open", length=out.length)
    part = lambda span, tokens=out.tokens: "".join(map(chr, span.before)) + (
        spelt(tokens[span.tokens], ids.tokens)) + "".join(
            map(chr, span.after))
    assert part(found.thinking) == out.thinking, (
        out.tokens, out.codes, out.length, in_thinking, found)
    assert part(found.answer) == ("" if kind == "open" else answer)
    assert found.closed == (kind not in ("open", "cut"))
    inside += bool(found.thinking.after)
  assert kind not in ("natural", "begun") or "think" not in end or inside > 4


def test_a_head_with_the_end_of_start_is_spelt_again():
  """Its token ">x</" was retracted for a wait, and ">" and "x" forced."""
  ids = thinking.resolve(thinking.Thinking(
      start="<think>", end="</think>", newline="\n", wait_text="Wait"), MERGING)
  spell = lambda text: MERGING.encode(text)
  tokens = [*spell("<think"), *spell(">"), *spell("x"), *spell("Wait"),
            *spell("a"), *spell("</think>"), *spell("b</think>")]
  sizes = [len(spell(text)) for text in ("<think", "Wait", "</think>b</think>")]
  codes = [1] * sizes[0] + [2] * (2 + sizes[1]) + [1] * (1 + sizes[2])
  found = thinking.split(
      tokens, codes, ids, in_thinking=False, length=2 + sizes[1] + 1)
  assert MERGING.decode(tokens[found.thinking.tokens]) == "xWaita"
  assert MERGING.decode(tokens[found.answer.tokens]) == "b</think>"
