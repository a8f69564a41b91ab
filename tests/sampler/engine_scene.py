"""Requests of all kinds for a small model, and the same ones run alone."""

import dataclasses
import functools

import jax
import numpy as np

from posttrain.sampler import rollouts, token_sampling
from posttrain.sampler.engine import Engine, Settings
from posttrain.sampler.requests import Request
from posttrain.sampler.sampler import Limits
from posttrain.text import symbols
from tests import meshes
from tests.model import build
from tests.sampler import numpy_sampler
from tests.sampler.forcing import Strings

V = 31
# A delimiter of two tokens is taken back for a wait.
STRINGS = Strings(
    start=(3,), end=(4, 5), delimiters=((7,), (10, 11)), newline=(1,),
    final_answer=(6,), wait=(8, 9), stop_ids=(2,),
    ends_newline=frozenset([1]), vocab_size=V)
UNUSED = Strings(stop_ids=(2,), vocab_size=V)
CONFIG = build.make_config(vocab_size=V)
SETTINGS = Settings(
    max_num_seqs=4, max_seq_len=128, min_seq_len=32, chunk=8, prefill_rows=2,
    prefill_chunk=8)


@functools.lru_cache
def params():
  with jax.set_mesh(meshes.one()):
    return build.random_params(CONFIG)


def make_engine(strings=STRINGS, settings=SETTINGS, **changes) -> Engine:
  options = {name: changes.pop(name) for name in (
      "symbols", "log", "before_chunk") if name in changes}
  return Engine(
      build.load(CONFIG, changes.pop("weights", None) or params()),
      strings.tables(), dataclasses.replace(settings, **changes), **options)


def table_of(words) -> symbols.SymbolTable:
  """Makes the symbols of a vocabulary in which a token is its word's bytes."""
  parse = lambda text: tuple(text.encode())
  return symbols.SymbolTable(
      [parse(word) for word in words], parse, lambda text: ())


def take(engine: Engine, asked) -> list:
  """Completions of the requests, in their order."""
  numbers = [engine.submit(request) for request in asked]
  by_number = {done.id: done for done in engine.results()}
  return [by_number[number] for number in numbers]


def alone(done) -> Request:
  """The request of a completion, without a parent: its whole prompt."""
  return dataclasses.replace(done.request, keep=False, parent=None)


def random_request(rng, number: int, longest: int = 60) -> Request:
  """Draws a request of any length and budget; half open a thinking."""
  maximum = int(rng.integers(-1, 20))
  minimum = int(rng.integers(0, 6))
  truncate = bool(rng.random() < 0.2)
  if maximum >= 0:
    minimum = min(minimum, maximum)
  needed = maximum + 5 if maximum >= 0 and not truncate else 1
  prompt = rng.integers(12, V, rng.integers(1, 30)).tolist()
  if rng.random() < 0.5:
    prompt.append(3)
  params = [
      token_sampling.SamplingParams(),
      token_sampling.SamplingParams(temperature=0.0),
      token_sampling.SamplingParams(temperature=1.4, top_k=9),
      token_sampling.SamplingParams(temperature=0.8, top_p=0.9),
      token_sampling.SamplingParams(min_p=0.05)][int(rng.integers(5))]
  return Request(
      prompt=tuple(prompt), params=params,
      max_tokens=needed + int(rng.integers(1, longest - needed)),
      max_thinking_tokens=maximum, min_thinking_tokens=minimum,
      num_waits=int(rng.integers(0, 3)), truncate=truncate, seed=7,
      stage="engine", step=3, prompt_id=number, sample_id=number % 3)


def limits_of(request: Request) -> Limits:
  return Limits(**{field.name: getattr(request, field.name)
                   for field in dataclasses.fields(Limits)})


def redrawn(done, strings=STRINGS):
  """Draws the completion in NumPy: its row, logprobs and near-ties."""
  request = done.request
  record = rollouts.of_completions([done])
  return numpy_sampler.sample(
      params(), CONFIG, record, 0, strings, limits_of(request),
      numpy_sampler.Request(
          request.seed, request.stage, request.step, request.first_draw,
          request.in_thinking),
      **dataclasses.asdict(request.params))


def flips(done, alone, strings=STRINGS) -> bool:
  """Returns True if a near-tie parts two runs; fails if anything else does.

  Up to there tokens are equal, and logprobs to 5e-5.
  """
  same = next(
      (i for i, (a, b) in enumerate(zip(done.tokens, alone.tokens,
                                        strict=False)) if a != b),
      min(len(done.tokens), len(alone.tokens)))
  np.testing.assert_allclose(
      done.logprobs[:same], alone.logprobs[:same], rtol=0, atol=5e-5)
  if done.tokens == alone.tokens:
    for name in ("finish_reason", "think_end", "think_length", "wait_count",
                 "answer_length"):
      assert getattr(done, name) == getattr(alone, name)
    return False
  for run in (done, alone):
    told, _, near = redrawn(run, strings)
    assert told.tokens == run.tokens
    if near:
      return True
  raise AssertionError(
      f"{done.tokens} and {alone.tokens} part at {same} without a near-tie")
