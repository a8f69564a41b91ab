"""A small engine, a vocabulary of words, and calls made in this process."""

import dataclasses
import itertools

from posttrain.episodes import protocol
from posttrain.episodes.calls import Calls
from posttrain.episodes.driver import Driver
from posttrain.episodes.protocol import Result
from posttrain.sampler.requests import Request
from posttrain.tasks import loading
from posttrain.text import render, symbols, vocabulary
from tests.sampler import engine_scene
from tests.sampler.forcing import Strings

WORDS = [*map(str, range(10)), "<calc>", "</calc>", "=", "(", ")", "+", "-",
         "*", "/", "so", "is", "error", "go", "and", "then", "yes", "no",
         "maybe", "well"]
TOKENIZER = vocabulary.train_sentencepiece(
    [" ".join(WORDS)], model_type="word")
TABLE = symbols.SymbolTable.of(TOKENIZER)
RENDERER = render.PlainRenderer(TOKENIZER)
STRINGS = Strings(stop_ids=TOKENIZER.stop_ids, vocab_size=engine_scene.V)
REQUEST = Request(prompt=(5,), max_tokens=12, seed=3, stage="test", step=4)


class Pool:
  """Makes calls in this process, `delay(number)` polls after they were sent."""

  def __init__(self, delay=lambda number: 0):
    self.made, self.waits, self.cancelled = [], [], False
    self.delay, self._numbers, self._sent = delay, itertools.count(), {}

  def submit(self, call):
    number = next(self._numbers)
    self._sent[number] = [self.delay(number), call]
    self.made.append(call)
    return number

  def poll(self, timeout=0.0):
    self.waits.append(timeout)
    ended = [n for n, (left, _) in self._sent.items() if left <= 0]
    for each in self._sent.values():
      each[0] -= 1
    return [(n, self._make(self._sent.pop(n)[1])) for n in ended]

  def hurry(self, number):
    """Ends a call with the next poll."""
    self._sent[number][0] = 0

  def cancel(self):
    self._sent, self.cancelled = {}, True

  def _make(self, call):
    try:
      value = loading.load_function(call.function)(*call.args, **call.kwargs)
    except Exception as error:
      return Result("error", reason=f"{type(error).__name__}: {error}")
    return Result("ok", value, seconds=1.0)


def make_engine(**changes):
  # One ring and few sizes of prompts: less to compile.
  return engine_scene.make_engine(STRINGS, **(dict(
      symbols=TABLE, prefill_rows=1, min_seq_len=160, prefill_chunk=32)
      | changes))


def make_tasks(prompts, *, samples=1, max_tokens=100):
  return [task for i, prompt in enumerate(prompts)
          for task in protocol.make_tasks(
              {"id": i, "prompt": prompt}, RENDERER,
              sample_ids=range(samples), max_tokens=max_tokens, seed=3,
              stage="test", step=4)]


def make_driver(engine, pool=None, **changes):
  return Driver(
      engine, lambda task, sample_id: dataclasses.replace(REQUEST, **changes),
      Calls(pool or Pool()))


def lengths(members):
  """A function over several calls: the length of each one's argument."""
  return [len(text) for [text] in members]
