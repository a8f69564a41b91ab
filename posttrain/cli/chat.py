"""Chat in the terminal, with budgets that change between turns.

The `chat` verb runs it; it is no stage. Thinking is dimmed, forced
tokens are marked, and earlier turns are given back to the model without their
thinking, as the families' templates do.
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

import jax
from ml_collections import config_dict

from posttrain import sharding, weights
from posttrain.cli.sample import StreamPrinter, watched
from posttrain.config import keys
from posttrain.model.transformer import Transformer
from posttrain.sampler import (
  engine,
  requests,
  rollouts,
  sampler,
  token_sampling,
  transcript,
)
from posttrain.stages import sampling
from posttrain.telemetry import console as console_lib
from posttrain.text import render, thinking
from posttrain.train import preemption

CHUNK = 8  # Tokens between two looks: what is read is seen early.
# Tokens of a conversation at most. The KV cache grows in doublings, so only
# what is used takes memory.
LONGEST = 2**20
MOST_WAITS = 10_000  # As `keys.WAITS` has it.
# Slots of the prefix cache: for a conversation of half as many tokens a turn
# computes what is new alone. Of a longer one it computes all.
CACHED = 2**14
HELP = """\
/budget N     at most N thinking tokens; /budget off for no maximum
/least N      at least N thinking tokens
/wait N       replace the first N ends of thinking by the wait text
/tokens N     at most N tokens an answer, thinking included
/temperature X   0 takes the likeliest token
/reset        forget the conversation
/exit         leave (or end of input)"""


def run(
    config: config_dict.ConfigDict, *, workdir: str | None = None,
    stage: str = "", params: token_sampling.SamplingParams,
    limits: sampler.Limits,
    options: Mapping[str, Any] = sampling.PLAIN,
    seed: int = 0, cache_dtype: str = "compute",
    weights_dtype: str = "compute", lines: Iterable[str] | None = None,
    stream: TextIO | None = None,
) -> list[dict[str, str]]:
  """Answers lines until the input ends.

  Args:
    config, workdir, stage: whose weights, as in `sample.run`.
    params, limits: to begin with.
    options: as `sampling.make_sampling_options` takes them.
    seed: with the turn's number, what a draw depends on.
    cache_dtype, weights_dtype: see `sampler.Sampler`.
    lines: what is said; read from the terminal by default.
    stream: where to print; standard output by default.

  Returns:
    The messages.

  Raises:
    ValueError: no such weights, no chat template, or several processes.
  """
  if jax.process_count() > 1:
    raise ValueError(
        f"{jax.process_count()} processes cannot share a terminal. Chat on one "
        "machine; `posttrain sample` runs on many.")
  with jax.set_mesh(sharding.mesh_of(config.mesh)):
    renderer, model = weights.load_for_sampling(config, workdir, stage)
    if not isinstance(renderer, render.ChatRenderer):
      raise ValueError(
          'chat_template="plain" has no turns. Use a model with a chat '
          "template, or set chat_template to a Jinja file.")
    ids = thinking.resolve(
        thinking.Thinking(**config.thinking), renderer.tokenizer)
    # Once: it looks at every token of the vocabulary.
    tables = sampling.make_tables(
        renderer.tokenizer, ids, options["suppress"])
    talk = Chat(renderer, model, sampler.Sampler(
        tables=tables, params=params, max_prompt_tokens=0,
        chunk=CHUNK, cache_dtype=cache_dtype, weights_dtype=weights_dtype,
        options=sampling.make_sampling_options(options, tables.vocab_size),
        before_chunk=preemption.leave_if_requested),
                limits, seed, stream or sys.stdout)
    for line in lines if lines is not None else typed():
      if not talk.hear(line.strip()):
        break
  return talk.messages


def _check_range(name: str, value: float, bounds: str) -> None:
  if not keys.within(value, bounds):
    raise ValueError(f"/{name}: found {keys.shown(value)}, needed a value in "
                     f"{keys.allowed(value, bounds)}.")


def typed() -> Iterator[str]:
  """Yields lines of the terminal, until end of input."""
  while True:
    # A person may think for hours: SIGTERM need not wait for the next line.
    preemption.nothing_to_save()
    try:
      yield input("\n> ")
    except EOFError:
      return


class Chat:
  """Conversation so far, and the settings of the next turn.

  Attributes:
    messages: with roles, without thinking.
  """

  def __init__(
      self, renderer: render.ChatRenderer, model: Transformer,
      how: sampler.Sampler, limits: sampler.Limits, seed: int, stream: TextIO,
  ):
    """Makes the one engine that draws all turns."""
    options = how.options
    self._engine = engine.Engine(model, how.tables, requests.Settings(
        max_num_seqs=sharding.axis_size("rows"), max_seq_len=LONGEST,
        chunk=how.chunk, prefix_cache_tokens=CACHED, max_ids=0,
        max_waits=MOST_WAITS if options.draw_waits else 0,
        cache_dtype=how.cache_dtype, weights_dtype=how.weights_dtype,
        logits_processor=options.logits_processor,
        budget_schedule=options.budget_schedule,
        confidence=options.confidence),
        before_chunk=how.before_chunk)
    self.messages: list[dict[str, str]] = []
    self._sampled: dict[int, list[int]] = {}  # By the message's number.
    self._renderer, self._how = renderer, how
    self._limits, self._seed = limits, seed
    self._stream = stream
    self._console = console_lib.Console(stream=stream)
    self._turns = 0

  def hear(self, line: str) -> bool:
    """Answers a line, or obeys a command; returns False to leave."""
    if not line:
      return True
    if line == "/exit":
      return False
    if line.startswith("/"):
      self._console.line(self._obey(*line[1:].partition(" ")[::2]), "dim")
      return True
    # Only an answered turn becomes a part of the conversation.
    asked = [*self.messages, {"role": "user", "content": line}]
    try:
      answer = self._answer(asked)
    except ValueError as error:  # This turn fails; the conversation goes on.
      self._console.line(str(error), "red")
      return True
    self.messages = [*asked, {"role": "assistant", "content": answer}]
    return True

  @property
  def stats(self) -> engine.Stats:
    """Counters of the engine: tokens computed, and taken from the cache."""
    return self._engine.stats

  def _obey(self, name: str, value: str) -> str:
    """Carries out a command; returns a line about it."""
    limits = {  # Fields of the limits, with the ranges of the flags.
        "budget": ("max_thinking_tokens", "[-1, inf)"),
        "least": ("min_thinking_tokens", "[0, inf)"),
        "wait": ("num_waits", keys.WAITS), "tokens": ("max_tokens", "[1, inf)")}
    if name == "reset":
      self.messages, self._sampled = [], {}
      return "forgotten"
    try:
      if name == "temperature":
        _check_range(name, float(value), f"0 or {keys.TEMPERATURES}")
        self._how = dataclasses.replace(
            self._how, params=dataclasses.replace(
                self._how.params, temperature=float(value)))
        return f"temperature {float(value):g}"
      if name in limits:
        field, bounds = limits[name]
        number = -1 if (name, value) == ("budget", "off") else int(value)
        _check_range(name, number, bounds)
        self._limits = sampler.Limits(
            **(vars(self._limits) | {field: number}))
        return f"{field} {number}"
    except ValueError as error:
      return str(error)
    return HELP

  def _answer(self, messages: list[dict[str, str]]) -> str:
    """Draws and prints a turn; returns its text without the thinking."""
    tokenizer, how = self._renderer.tokenizer, self._how
    prompt = self._renderer.prompt_tokens(
        {"messages": messages}, self._sampled)
    request = how.options.apply(requests.Request(
        prompt=tuple(prompt), params=how.params, **vars(self._limits),
        seed=self._seed, stage="chat", prompt_id=self._turns, keep=True),
        how.tables.wait_texts)
    number = self._engine.submit(request)
    [done] = watched(self._engine, number, StreamPrinter(
        tokenizer, how.tables.ids, self._stream,
        in_thinking=thinking.opens(request.prompt, how.tables.ids)))
    if done.error:
      raise ValueError(done.error)
    self._engine.release(number)  # The prefix cache finds it by its tokens.
    self._sampled[len(messages)] = done.tokens
    self._turns += 1
    self._console.line("")
    self._console.line(
        f"{len(done.tokens)} tokens, {done.think_length} of them thinking, "
        f"{done.wait_count} waits, {done.finish_reason}", "dim")
    drawn = rollouts.of_completions([done])
    answer = transcript.split(drawn, 0, how.tables.ids).answer
    text = transcript.span_text(tokenizer, done.tokens, how.tables.ids, answer)
    # White space between the thinking and the answer goes with the thinking. A
    # turn without any stays as it is, so that its tokens may be used again.
    return text.strip() if answer.touched.start else text
