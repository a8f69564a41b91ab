"""Oracles: completions whose parts are known because they were put there."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.text import thinking
from tests.text import build

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
  assert ids.delimiters == (token("</think>"), (tokenizer.eos_id,))
  assert ids.end == token("</think>") and len(ids.end) == 1
  assert tokenizer.decode(ids.final_answer) == "The answer is"
  unused = thinking.Thinking(start="<think>", newline="\n", wait_text="Wait")
  assert thinking.resolve(unused, tokenizer) == thinking.ThinkingIds()


def test_what_cannot_be_forced_is_an_error():
  words = build.words()
  make = lambda **fields: thinking.resolve(
      thinking.Thinking(**{"end": "</think>", **fields}), words)
  with pytest.raises(ValueError, match=r'Set thinking\.newline=""'):
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
