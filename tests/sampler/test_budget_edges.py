"""Edges of two rules: a delimiter at the limit, or across a cache's end.

Scripted models against rows written out by hand; the choices of a request,
given as its script, against the same in a cache that does not grow.
"""

import jax
import numpy as np
import pytest

from posttrain.sampler import decode
from posttrain.sampler.requests import Request
from tests import meshes
from tests.model import numpy_transformer
from tests.sampler import engine_scene as scene
from tests.sampler import forcing, test_budget

A, B = 20, 21  # Words without a meaning.
STOP, NEWLINE, FINAL = 2, 1, 6  # `end` is 4, 5; delimiters 7 and 10, 11.


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(meshes.one()):
    yield


CASES = {  # Choices, maximum; tokens, sources, thinking, how it was closed.
    # The delimiter takes the place of the last token that was allowed: the
    # model has ended its thinking, and nothing of the budget's is forced.
    "ends at the limit": (
        [A, B, 7], 3, [A, B, 4, 5], "ssff", 2, "natural"),
    "ends at the limit, of two tokens": (
        [A, 10, 11], 3, [A, 4, 5], "sff", 1, "natural"),
    "would end one later": (
        [A, B, B], 3, [A, B, B, NEWLINE, 4, 5, FINAL], "sssffff", 3,
        "budget"),
    # Only the rest of `end` is forced; the beginning was no thinking.
    "has begun the end itself": (
        [A, B, 4], 3, [A, B, 4, 5, FINAL], "sssff", 2, "budget"),
    # The first token of another delimiter is a thought like any other.
    "has begun another delimiter": (
        [A, B, 10], 3, [A, B, 10, NEWLINE, 4, 5, FINAL], "sssffff", 3,
        "budget"),
    "writes the whole end": ([A, 4, 5], 3, [A, 4, 5], "sss", 1, "natural"),
    "begins the end and thinks on": (
        [A, 4, A, 7], -1, [A, 4, A, 4, 5], "sssff", 3, "natural"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_delimiter_at_the_limit(case):
  script, maximum, tokens, sources, thinking, closed = case
  limits = forcing.Limits(maximum=maximum)
  model = lambda choices: lambda *_: [next(choices)]
  choices = [*script, A, STOP]
  [row] = test_budget.drive(
      model(iter(choices)), [[12, 3]], [True], scene.STRINGS, [limits])
  assert row == forcing.reference(
      model(iter(choices)), [12, 3], True, scene.STRINGS, limits)
  assert row.tokens == [*tokens, A, STOP]
  assert "".join(source[0] for source in row.sources) == sources + "ss"
  assert (row.thinking, row.closed, row.answer) == (thinking, closed, 2)
  assert row.finish == ("budget" if closed == "budget" else "eos")


@pytest.mark.parametrize("waits", [0, 1])
def test_a_delimiter_split_over_the_end_of_a_cache(waits):
  """Its first token is the last of 32 slots; the second comes behind them.

  A wait or `end` takes the place of both; what follows, and the logprob of
  what is forced where the delimiter began, know nothing of the growth.
  """
  rng = np.random.default_rng(waits)
  prompt = (*rng.integers(12, scene.V, 7).tolist(), 3)
  script = np.full(60, -1, np.int32)
  script[:25] = [*rng.integers(12, scene.V, 23), 10, 11]
  request = Request(prompt=prompt, max_tokens=50, num_waits=waits,
                    script=script)
  sizes = []
  grows = scene.make_engine(recorded=decode.Recorded(model_logprobs=True))
  number = grows.submit(request)
  while grows.busy:
    grows.step()
    sizes.append(grows._batch.size)
  [done] = grows.results()
  assert done.id == number
  # Three chunks of 8 behind a prompt of 8, and the next in another bucket.
  assert sizes[:4] == [32, 32, 32, 64]
  assert done.raw[:25].tolist() == script[:25].tolist()
  wait, end = scene.STRINGS.wait, scene.STRINGS.end
  assert tuple(done.tokens[23:25]) == (wait if waits else end)
  assert done.provenance[23:25].tolist() == [2, 2]
  assert done.think_length >= 23 and done.wait_count == waits
  [alone] = scene.take(scene.make_engine(min_seq_len=128), [request])
  assert not scene.flips(done, alone)
  sequence = [*prompt, *done.tokens]
  logits = numpy_transformer.logits(scene.params(), scene.CONFIG, sequence)
  own = numpy_transformer.log_softmax(logits[len(prompt) - 1:-1])
  free = own[np.arange(len(done.tokens)), done.tokens]
  # All but the token behind the wait, where delimiters are banned.
  kept = np.arange(len(done.tokens)) != (25 if waits else -1)
  np.testing.assert_allclose(
      done.logprobs[kept], free[kept], rtol=0, atol=5e-5)
  np.testing.assert_allclose(done.model_logprobs, free, rtol=0, atol=5e-5)
