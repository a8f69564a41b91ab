"""Oracle: the conversation, written out by hand, token by token."""

import dataclasses

import numpy as np
import pytest

from posttrain.episodes import rollouts as episode_rollouts
from posttrain.episodes.protocol import Outcome, Turn
from posttrain.episodes.trajectory import Trajectory
from posttrain.sampler import rollouts
from posttrain.sampler.requests import Completion, Request

S, F, OBS = 1, 2, 3  # Sampled, forced, observation.


def completion(prompt, tokens, codes, logprobs, **fields):
  """A completion with a made-up entropy and experts for each token."""
  count = len(tokens)
  return Completion(
      id=0, request=Request(
          tuple(prompt), 99, prompt_id=7, sample_id=2, in_thinking=True),
      tokens=list(tokens), logprobs=np.array(logprobs, np.float32),
      provenance=np.array(codes, np.int8), **({
          "finish_reason": "stop", "think_length": count, "answer_length": 1,
          "entropy": np.arange(count, dtype=np.float32) + 1,
          "confidence": np.arange(count, dtype=np.float32) + 2,
          "experts": np.full((count, 2, 1), 3, np.uint8),
          "raw": np.array(tokens, np.int32)} | fields))


def turn(number, done, observation, parent):
  return Turn(number, parent, done, tuple(observation), "", "", "")


def trajectory(*turns, reason="completed"):
  return Trajectory(
      {}, (5, 6), 7, 2, list(turns), [], Outcome(reason=reason))


FIRST = completion([5, 6], [10, 11, 12], [S, F, S], [-1, -2, -3])


def test_a_single_turn_is_the_completion_itself():
  made = episode_rollouts.of_trajectories([trajectory(
      turn(0, FIRST, [5, 6], None), reason="max_tokens")])
  alone = rollouts.of_completions([FIRST])
  for field in dataclasses.fields(made):
    found, wanted = getattr(made, field.name), getattr(alone, field.name)
    if field.name == "stop_reason":
      assert found.tolist() == [2]
    elif isinstance(wanted, np.ndarray):
      np.testing.assert_array_equal(found, wanted)
      assert found.dtype == wanted.dtype
    else:
      assert found == wanted


# What stays of the first turn's tokens, the observation, and the row. A stop
# string that is cut off inside of token 12 leaves 40, which spells its head
# anew; an observation may begin with the very token that was cut off.
@pytest.mark.parametrize("kept, observation, tokens, codes, logprobs", [
    ([10, 11, 12], [20, 21], [10, 11, 12, 20, 21, 30], [S, F, S, OBS, OBS, S],
     [-1, -2, -3, 0, 0, -4]),
    ([10, 11], [12, 20], [10, 11, 12, 20, 30], [S, F, OBS, OBS, S],
     [-1, -2, 0, 0, -4]),
    ([10, 11, 40], [20], [10, 11, 40, 20, 30], [S, F, OBS, OBS, S],
     [-1, -2, 0, 0, -4]),
    ([10, 11, 12], [], [10, 11, 12, 30], [S, F, S, S], [-1, -2, -3, -4]),
    ([], [20], [20, 30], [OBS, S], [0, -4]),
])
def test_two_turns_are_one_row(kept, observation, tokens, codes, logprobs):
  last = completion([5, 6, *kept, *observation], [30], [S], [-4],
                    finish_reason="eos", wait_count=4)
  made = episode_rollouts.of_trajectories([trajectory(
      turn(0, FIRST, [5, 6], None), turn(1, last, observation, 0)),
      trajectory(turn(0, FIRST, [5, 6], None))])
  assert made.prompts == [[5, 6], [5, 6]]
  assert made.completion(0) == tokens
  assert made.provenance[0, :len(tokens)].tolist() == codes
  np.testing.assert_array_equal(made.logprobs[0, :len(tokens)], logprobs)
  np.testing.assert_array_equal(
      made.loss_mask[0, :len(tokens)], np.array(codes) == S)
  own = [code != OBS for code in codes]
  for name in ("entropy", "confidence", "experts"):
    of_token = getattr(made, name)[0, :len(tokens)].reshape(len(tokens), -1)
    np.testing.assert_array_equal(of_token.any(1), own)
  assert made.finish_name(0) == "eos"
  assert made.think_lengths.tolist() == [4, 3]
  assert made.answer_lengths.tolist() == [2, 1]
  assert made.wait_count.tolist() == [4, 0]
  assert made.num_turns.tolist() == [2, 1]
  assert made.prompt_id.tolist() == [7, 7]
  assert made.sample_id.tolist() == [2, 2]
  assert made.raw[0].tolist() == [10, 11, 12, 30]
  assert made.completion(1) == [10, 11, 12]


def test_an_episode_without_a_turn_is_an_empty_row():
  made = episode_rollouts.of_trajectories([
      trajectory(reason="error"), trajectory(turn(0, FIRST, [5, 6], None))])
  assert made.prompts == [[5, 6], [5, 6]]
  assert made.lengths.tolist() == [0, 3]
  assert made.num_turns.tolist() == [0, 1]
  assert made.finish_name(0) == "error"
  assert not made.loss_mask[0].any()
  assert made.experts is not None and made.entropy is not None
  assert made.experts[..., 0, 0].tolist() == [[0] * 3, [3] * 3]
  assert made.entropy.tolist() == [[0] * 3, [1, 2, 3]]


def test_a_turn_that_never_ran_ends_the_row():
  """As one that did not fit: it has no entropy either."""
  nothing = Completion.nothing(
      1, Request((5, 6, 10, 11, 12, 20), 9), "error", "it does not fit")
  made = episode_rollouts.of_trajectories([trajectory(
      turn(0, FIRST, [5, 6], None), turn(1, nothing, [20], 0))])
  assert made.completion(0) == [10, 11, 12, 20]
  assert made.entropy is not None
  assert made.entropy[0].tolist() == [1, 2, 3, 0]


def test_branches_are_refused():
  other = completion([5, 6], [31], [S], [-1])
  with pytest.raises(ValueError, match="not one sequence"):
    episode_rollouts.of_trajectories([trajectory(
        turn(0, FIRST, [5, 6], None), turn(1, other, [5, 6], None))])
