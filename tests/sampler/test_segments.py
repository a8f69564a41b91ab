"""What people read is what the tokens and their provenance say."""

import dataclasses

import numpy as np
import pytest

from posttrain.sampler import budget, segments
from posttrain.sampler.rollouts import Rollouts
from posttrain.text import thinking, vocabulary

SAMPLED, FORCED = budget.SAMPLED, budget.FORCED
WORDS = vocabulary.train_sentencepiece(
    ["a b c wait hm so answer"], model_type="word",
    symbols=("<think>", "</think>"))
IDS = thinking.resolve(
    thinking.Thinking(
        start="<think>", end="</think>", delimiters=(), newline="",
        final_answer="so", wait_text="wait hm"), WORDS)


def written(text, codes, ids=IDS):
  """Segments of words; a code per word: s(ampled) or f(orced)."""
  tokens = WORDS.encode(text, special=True)
  assert len(tokens) == len(codes)
  return segments.segments(
      WORDS, tokens, [SAMPLED if c == "s" else FORCED for c in codes], ids)


@pytest.mark.parametrize("text, codes, names", [
    ("a b", "ss", ["sampled"]),
    ("a wait hm b", "sffs", ["sampled", "wait", "sampled"]),
    ("wait hm a", "sss", ["sampled"]),  # The model's own words.
    ("a </think> so b", "sffs", ["sampled", "forced", "sampled"]),
    # The maximum was reached in the middle of a wait.
    ("a wait </think> so b", "sfffs",
     ["sampled", "wait", "forced", "sampled"]),
    ("a wait hm </think> so", "sffff", ["sampled", "wait", "forced"]),
    ("</think> so a", "ffs", ["forced", "sampled"]),
    ("", "", []),
])
def test_runs_are_named_and_add_up_to_the_text(text, codes, names):
  found = written(text, codes)
  assert [name for _, name in found] == names
  assert "".join(part for part, _ in found) == WORDS.decode(
      WORDS.encode(text, special=True))


def test_the_text_that_rewards_see_keeps_delimiters_and_loses_the_stop():
  eos = WORDS.eos_id
  tokens = WORDS.encode("a </think> b", special=True)
  assert segments.completion_text(WORDS, [*tokens, eos]) == "a </think> b"
  assert segments.completion_text(WORDS, tokens) == "a </think> b"
  assert segments.completion_text(WORDS, []) == ""
  # One stop ends it; an earlier one cannot be there.
  assert segments.completion_text(WORDS, [eos]) == ""


def test_a_record_holds_the_rollouts_facts():
  tokens = [*WORDS.encode("a wait hm </think> b", special=True), WORDS.eos_id]
  one = dict(
      prompts=[[], WORDS.encode("c <think>", special=True)],
      tokens=np.array([[0] * 6, tokens]), logprobs=np.zeros((2, 6)),
      provenance=np.array([[0] * 6, [1, 2, 2, 1, 1, 1]]),
      lengths=np.array([0, 6]), finish_reason=np.array([1, budget.EOS]),
      think_end=np.array([0, budget.NATURAL]),
      think_lengths=np.array([0, 3]), think_steps=np.array([0, 1]),
      answer_lengths=np.array([0, 1]),
      wait_count=np.array([0, 1]), prompt_id=np.array([1, 40]),
      sample_id=np.array([0, 2]), raw=np.zeros((2, 0)), experts=None)
  assert set(one) == {field.name for field in dataclasses.fields(Rollouts)}
  record = segments.record(WORDS, Rollouts(**one), 1, IDS)
  assert {name: record[name] for name in (
      "prompt_id", "sample_id", "prompt", "completion", "finish_reason",
      "think_end", "think_length", "think_steps", "answer_length", "length",
      "wait_count",
  )} == dict(
      prompt_id=40, sample_id=2, prompt="c <think>",
      completion="a wait hm </think> b", finish_reason="eos",
      think_end="natural", think_length=3, think_steps=1, answer_length=1,
      length=6, wait_count=1)
  assert [name for _, name in record["segments"]] == [
      "sampled", "wait", "sampled"]
