"""Transcripts say what the tokens and their provenance say."""

import dataclasses
import functools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from posttrain.sampler import budget_state, transcript
from posttrain.sampler.confidence import Confidence
from posttrain.sampler.rollouts import FINISH_REASONS, THINK_ENDS, Rollouts
from posttrain.text import thinking, vocabulary
from tests.sampler import forcing, test_budget
from tests.text import build

SAMPLED, FORCED = budget_state.SAMPLED, budget_state.FORCED
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
  return transcript.segments(
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


def test_an_observation_is_a_run_of_its_own():
  tokens = WORDS.encode("a b wait hm c", special=True)
  found = transcript.segments(
      WORDS, tokens, [SAMPLED, 3, 3, 3, SAMPLED], IDS)
  assert [(text.strip(), name) for text, name in found] == [
      ("a", "sampled"), ("b wait hm", "observation"), ("c", "sampled")]


def test_the_text_keeps_delimiters_and_loses_the_stop():
  eos = WORDS.eos_id
  tokens = WORDS.encode("a </think> b", special=True)
  assert transcript.completion_text(WORDS, [*tokens, eos]) == "a </think> b"
  assert transcript.completion_text(WORDS, tokens) == "a </think> b"
  assert transcript.completion_text(WORDS, []) == ""
  # One stop ends it; an earlier one cannot be there.
  assert transcript.completion_text(WORDS, [eos]) == ""


def rollouts_of(rows, prompts, ids):
  """Makes the sampler's record of rows of the plain-Python account."""
  codes = lambda names, key: np.array(
      [names.index(getattr(r, key)) for r in rows])
  width = max(len(row.tokens) for row in rows)
  padded = lambda values: np.array(
      [[*row, *[0] * (width - len(row))] for row in values])
  numbers = lambda key: np.array([getattr(row, key) for row in rows])
  return Rollouts(
      prompts=prompts, tokens=padded([row.tokens for row in rows]),
      logprobs=np.zeros((len(rows), width)),
      provenance=padded([[FORCED if s == "forced" else SAMPLED
                          for s in row.sources] for row in rows]),
      lengths=np.array([len(row.tokens) for row in rows]),
      finish_reason=codes(FINISH_REASONS, "finish"),
      think_end=codes(THINK_ENDS, "closed"), think_lengths=numbers("thinking"),
      think_steps=numbers("steps"), answer_lengths=numbers("answer"),
      wait_count=numbers("waits"), prompt_id=np.arange(len(rows)),
      sample_id=np.zeros(len(rows)), raw=np.zeros((len(rows), 0)),
      num_turns=np.ones(len(rows)), stop_reason=np.zeros(len(rows)),
      in_thinking=np.array([thinking.opens(p, ids) for p in prompts]))


@pytest.mark.parametrize("index", range(len(test_budget.STRINGS)))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(limits=test_budget.rows_of_limits, seed=st.integers(0, 10**6))
def test_the_answer_is_what_follows_the_thinking(index, limits, seed):
  """The strings are any, overlap in every way, opened by prompt or model.

  The account knows when it leaves the thinking; what is tested has its
  record: tokens, and how long the thinking was.
  """
  strings = test_budget.STRINGS[index]
  prompts = np.random.default_rng(seed).integers(
      0, 8, (test_budget.ROWS, 3)).tolist()
  model = test_budget.markov(strings, seed)
  ids = build.alone(**{
      name: getattr(strings, name) for name in (
          "start", "end", "delimiters", "newline", "final_answer", "wait",
          "more_waits")})
  rows = [forcing.reference(
      functools.partial(model, i), prompt,
      thinking.opens(prompt, ids), strings, limits[i])
          for i, prompt in enumerate(prompts)]
  rollouts = rollouts_of(rows, prompts, ids)
  for i, row in enumerate(rows):
    found = transcript.split(rollouts, i, ids)
    thinks, answers = found.thinking.tokens, found.answer.tokens
    thought, answer = row.tokens[thinks], row.tokens[answers]
    if row.think_at is None:  # It never thought.
      # A stop id that completes `start` has no text behind it.
      stopped = forcing.ends_in(row.tokens, strings.start)
      assert (thought, answer) == ([], [] if stopped else row.tokens)
    elif row.answer_at is None:  # It never left; or was cut as it left.
      assert answer == []
      assert row.closed != "open" or thought == row.tokens[row.think_at:]
    else:
      assert answer == row.tokens[row.answer_at:]
      between = row.tokens[thinks.stop:row.answer_at]
      assert tuple(between) in (strings.end, strings.newline + strings.end)
      assert thinks.start == row.think_at
    assert not row.thinking or len(thought) >= row.thinking


def test_a_record_holds_the_rollouts_facts():
  tokens = [*WORDS.encode("a wait hm </think> b", special=True), WORDS.eos_id]
  one = dict(
      prompts=[[], WORDS.encode("c <think>", special=True)],
      tokens=np.array([[0] * 6, tokens]), logprobs=np.zeros((2, 6)),
      provenance=np.array([[0] * 6, [1, 2, 2, 1, 1, 1]]),
      lengths=np.array([0, 6]), finish_reason=np.array([1, budget_state.EOS]),
      think_end=np.array([0, budget_state.NATURAL]),
      think_lengths=np.array([0, 3]), think_steps=np.array([0, 1]),
      answer_lengths=np.array([0, 1]),
      wait_count=np.array([0, 1]), prompt_id=np.array([1, 40]),
      sample_id=np.array([0, 2]), in_thinking=np.array([False, True]),
      raw=np.zeros((2, 0)), num_turns=np.ones(2), stop_reason=np.zeros(2),
      experts=None,
      entropy=np.array([[0.0] * 6, [1, 9, 9, 2, 3, 2]]),
      confidence=np.array([[0.0] * 6, [8, 0, 0, 2, 4, 6]]))
  assert set(one) == {field.name for field in dataclasses.fields(Rollouts)}
  record = transcript.record(WORDS, Rollouts(**one), 1, IDS)
  assert {name: record[name] for name in (
      "prompt_id", "sample_id", "prompt", "completion", "answer_text",
      "finish_reason",
      "think_end", "think_length", "think_steps", "answer_length", "length",
      "wait_count",
  )} == dict(
      prompt_id=40, sample_id=2, prompt="c <think>",
      completion="a wait hm </think> b", answer_text="b", finish_reason="eos",
      think_end="natural", think_length=3, think_steps=1, answer_length=1,
      length=6, wait_count=1)
  assert [name for _, name in record["segments"]] == [
      "sampled", "wait", "sampled"]
  assert transcript.record(
      WORDS, Rollouts(**one), 1, IDS, answer="c") == record | dict(
          answer_text="c")
  # Of the four sampled tokens; the settings say that it was recorded.
  more = transcript.record(
      WORDS, Rollouts(**one), 1, IDS, Confidence(window=2))
  assert more == record | dict(
      mean_entropy=2, mean_confidence=5, lowest_group_confidence=3,
      tail_confidence=5)
