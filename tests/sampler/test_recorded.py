"""Fields of a completion, over all combinations of what is recorded."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from posttrain.sampler import decode, requests, rollouts, sampling_options
from posttrain.sampler.requests import Request
from tests import meshes
from tests.sampler import engine_scene as scene

ALL = [decode.Recorded(*fields) for fields in itertools.product(
    (False, True), (False, True), (0, 2))]
COUNTS = ("think_length", "think_steps", "answer_length", "wait_count",
          "think_end")
PLAIN = Request(prompt=(12, 3), max_tokens=24, num_waits=1)
ASKED = (
    PLAIN,
    *(dataclasses.replace(PLAIN, prompt_id=i, stop_strings=("m", "op"))
      for i in range(6)),
    # No token at all: the thinking that the prompt opened ends at once.
    dataclasses.replace(PLAIN, num_waits=0, max_thinking_tokens=0,
                        truncate=True),
    dataclasses.replace(PLAIN, num_waits=0, max_thinking_tokens=0,
                        truncate=True, stop_strings=("m",)),
    dataclasses.replace(PLAIN, prompt=()),  # An error.
)


TABLE = scene.table_of([chr(97 + token % 26) for token in range(scene.V)])


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(meshes.one()):
    yield


@functools.cache
def completions(recorded: decode.Recorded):
  """Runs `ASKED`, and one that is ended before its first step."""
  engine = scene.make_engine(symbols=TABLE, recorded=recorded)
  done = scene.take(engine, ASKED)
  number = engine.submit(PLAIN)
  engine._admit()
  engine.abort(number)
  return [*done, *engine.results()]


@pytest.mark.parametrize("recorded", ALL, ids=str)
def test_every_combination_records_what_it_says(recorded):
  found, full = completions(recorded), completions(ALL[-1])
  assert [done.finish_reason for done in found[7:]] == [
      "length", "length", "error", "abort"]
  assert sum(done.finish_reason == "stop" for done in found) > 2
  for done, want in zip(found, full, strict=True):
    n = len(done.tokens)
    assert done.tokens == want.tokens
    for name in ("finish_reason", "surplus", *COUNTS):
      assert getattr(done, name) == getattr(want, name), name
    ran = done.finish_reason != "error"
    for name, is_there, dtype, shape in (
        ("model_logprobs", recorded.model_logprobs, np.float32, (n,)),
        ("top_logprobs", recorded.top_logprobs, np.float32, (n, 2)),
        ("top_tokens", recorded.top_logprobs, np.int32, (n, 2))):
      values = getattr(done, name)
      assert (values is not None) == bool(is_there and ran), name
      if values is not None:
        assert (values.dtype, values.shape) == (dtype, shape), name
        np.testing.assert_allclose(
            values, getattr(want, name), rtol=0, atol=1e-6)


def test_counts_of_a_stopped_row_are_those_of_its_tokens():
  """All of them are thinking in a row that was cut before it closed."""
  stopped = 0
  for done in completions(ALL[0]):
    if done.finish_reason == "stop" and done.think_end == "open":
      assert done.think_length == len(done.tokens)
      assert done.answer_length == 0
      stopped += done.surplus > 0
  assert stopped > 0


def test_completions_of_no_token_are_rows_of_a_batch():
  done = completions(ALL[-1])[7:9]
  assert [each.tokens for each in done] == [[], []]
  rows = rollouts.of_completions(done)
  assert rows.tokens.shape == (2, 0) and rows.lengths.tolist() == [0, 0]


def test_waits_are_drawn_for_ids_of_any_sign():
  """Draws for ids from 0 are what they were; others have their own."""
  drawn = {}
  for number, sample in itertools.product((-7, -1, 0, 7, 2**31 - 1), (-1, 0)):
    request = dataclasses.replace(
        PLAIN, num_waits=16, prompt_id=number, sample_id=sample)
    order = sampling_options.SamplingOptions(draw_waits=True).apply(
        request, 3).wait_order
    assert len(order) == 16 and set(order) <= {0, 1, 2}
    drawn[number, sample] = order
  assert len(set(drawn.values())) == len(drawn)
  [done] = scene.take(scene.make_engine(), [
      sampling_options.SamplingOptions(draw_waits=True).apply(
          dataclasses.replace(PLAIN, prompt_id=-7, sample_id=-1), 1)])
  assert done.tokens and not done.error
  want = np.random.default_rng(
      [0, requests.token_sampling.stage_number("engine"), 0, 7, 0])
  assert drawn[7, 0] == tuple(want.integers(0, 3, 16).tolist())
