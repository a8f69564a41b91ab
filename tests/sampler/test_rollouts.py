"""Oracle: the record of a row, one step at a time."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.sampler import budget_state, requests, rollouts


def one_by_one(steps):
  """[(token, provenance, dropped)] -> what is left: first drop, then append."""
  kept = []
  for token, provenance, dropped in steps:
    kept = kept[:len(kept) - dropped]
    if provenance:
      kept.append((token, provenance))
  return kept


@st.composite
def records(draw):
  """Steps whose drops never exceed what is there."""
  steps, length = [], 0
  for step in range(draw(st.integers(1, 24))):
    dropped = min(draw(st.sampled_from([0, 0, 0, 1, 2, 3])), length)
    provenance = draw(st.sampled_from([0, 1, 1, 2]))
    length += (provenance > 0) - dropped
    steps.append((100 + step, provenance, dropped))
  return np.array(steps)  # [count, 3]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(records(), st.integers(1, 8))
def test_the_record_keeps_what_a_loop_keeps(steps, chunk):
  row = rollouts.Row()
  for start in range(0, len(steps), chunk):
    part = steps[start:start + chunk]
    row.add({
        "token": part[:, 0], "provenance": part[:, 1], "dropped": part[:, 2],
        "logprob": -part[:, 0] / 7.0, "raw": part[:, 0]})
  want = one_by_one(steps.tolist())
  assert list(zip(row.tokens, row.columns["provenance"], strict=True)) == want
  np.testing.assert_allclose(
      row.columns["logprob"], [-token / 7.0 for token, _ in want], rtol=1e-6)


def test_a_row_is_cut_in_all_its_columns():
  row = rollouts.Row()
  row.add({
      "token": np.arange(4), "provenance": np.ones(4), "raw": np.arange(4),
      "dropped": np.zeros(4, int), "logprob": -np.arange(4) / 2})
  row.cut(3)
  assert row.columns == {
      "token": [0, 1, 2], "provenance": [1, 1, 1],
      "logprob": [0.0, -0.5, -1.0]}


def completion(number, tokens, reason):
  count = len(tokens)
  return requests.Completion(
      number, requests.Request((number,), 9, prompt_id=number), tokens,
      np.full(count, -0.5, np.float32), np.ones(count, np.int8), reason,
      raw=np.arange(count + number, dtype=np.int32))


def test_completions_are_padded_on_the_right():
  found = rollouts.of_completions([
      completion(1, [4, 5], "eos"), completion(2, [], "length"),
      completion(0, [7], "budget")])
  np.testing.assert_array_equal(found.tokens, [[4, 5], [0, 0], [7, 0]])
  np.testing.assert_array_equal(found.provenance, [[1, 1], [0, 0], [1, 0]])
  np.testing.assert_array_equal(
      found.logprobs, [[-0.5, -0.5], [0, 0], [-0.5, 0]])
  np.testing.assert_array_equal(
      found.raw, [[0, 1, 2], [0, 1, -1], [0, -1, -1]])
  assert found.prompts == [[1], [2], [0]]
  assert found.lengths.tolist() == [2, 0, 1]
  assert [found.finish_name(row) for row in range(3)] == [
      "eos", "length", "budget"]


def test_names_and_masks():
  provenance = np.array([[
      budget_state.SAMPLED, budget_state.FORCED, budget_state.NONE]])
  zeros = np.zeros(1, np.int32)
  record = rollouts.Rollouts(
      prompts=[[1]], tokens=np.array([[5, 6, 0]]), logprobs=np.zeros((1, 3)),
      provenance=provenance, lengths=np.array([2]),
      finish_reason=np.array([budget_state.BUDGET]), think_end=zeros,
      think_lengths=zeros, think_steps=zeros, answer_lengths=zeros,
      wait_count=zeros, prompt_id=zeros, sample_id=zeros,
      in_thinking=zeros, raw=np.array([[5, -1]]),
      num_turns=zeros + 1, stop_reason=zeros)
  assert record.completion(0) == [5, 6]
  assert record.finish_name(0) == "budget"
  np.testing.assert_array_equal(record.loss_mask, [[True, False, False]])
