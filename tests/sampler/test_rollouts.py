"""Oracle: the record of a row, one step at a time."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.sampler import budget_state, rollouts

ROWS = 3


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
  """Per row, steps whose drops never exceed what is there."""
  rows = []
  count = draw(st.integers(1, 24))
  for _ in range(ROWS):
    steps, length = [], 0
    for step in range(count):
      dropped = draw(st.sampled_from([0, 0, 0, 1, 2, 3]))
      dropped = min(dropped, length)
      provenance = draw(st.sampled_from([0, 1, 1, 2]))
      length += (provenance > 0) - dropped
      steps.append((100 + step, provenance, dropped))
    rows.append(steps)
  return np.array(rows)  # [ROWS, count, 3]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(records(), st.integers(1, 8), st.integers(0, 3))
def test_the_recorder_keeps_what_a_loop_keeps(rows, chunk, padding):
  recorder = rollouts.Recorder(ROWS)
  count = rows.shape[1]
  padded = np.pad(rows, ((0, padding), (0, -count % chunk), (0, 0)))
  for start in range(0, count, chunk):
    part = padded[:, start:start + chunk]
    recorder.add({
        "token": part[..., 0], "provenance": part[..., 1],
        "dropped": part[..., 2], "logprob": -part[..., 0] / 7.0,
        "raw": part[..., 0]})
  out = recorder.padded()
  for row in range(ROWS):
    want = one_by_one(rows[row].tolist())
    length = out["lengths"][row]
    assert length == len(want)
    tokens, provenance = out["tokens"][row], out["provenance"][row]
    assert list(zip(tokens[:length].tolist(), provenance[:length].tolist(),
                    strict=True)) == want
    np.testing.assert_allclose(
        out["logprobs"][row, :length], -tokens[:length] / 7.0, rtol=1e-6)
    assert not tokens[length:].any() and not provenance[length:].any()
  assert out["raw"].shape == (ROWS, count + -count % chunk)
  assert out["tokens"].shape[1] == out["lengths"].max()


def test_cutting_a_row_leaves_the_others():
  recorder = rollouts.Recorder(2)
  tokens = np.arange(8).reshape(2, 4)
  recorder.add({
      "token": tokens, "provenance": np.ones((2, 4)), "raw": tokens,
      "dropped": np.zeros((2, 4), int), "logprob": -tokens / 2})
  recorder.cut(0, 1)
  out = recorder.padded()
  np.testing.assert_array_equal(out["tokens"], [[0, 0, 0, 0], [4, 5, 6, 7]])
  np.testing.assert_array_equal(out["lengths"], [1, 4])


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
      raw=np.array([[5, -1]]))
  assert record.completion(0) == [5, 6]
  assert record.finish_name(0) == "budget"
  np.testing.assert_array_equal(record.loss_mask, [[True, False, False]])
