"""Episode protocol: what an episode yields, what it is sent, what it returns.

An episode is a generator: `def episode(task, **args)`. It yields requests, one
or a sequence of them that run side by side, and is sent the result of each:

  Generate  tokens from the engine                    -> Turn, or n of them
  Call      host work with a deadline, in a worker    -> Result

It ends by returning an `Outcome`. It runs on every host alike: it may depend on
its task and on what it was sent, and on no clock, file, network or global
state. Those belong in a `Call`, which process 0 alone makes. For randomness it
has `task.generator`, whose seed is the episode's ids.

  def calculator(task):
    turn = yield Generate(
        task.prompt, changes={"stop_strings": ("=",)})
    result = yield Call("my_tools.py:add", (turn.text,))
    turn = yield Generate(task.encode(f" {result.value} ."), parent=turn)
    return Outcome()
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.episodes.call import Call, Gather, Result
from posttrain.sampler.requests import Completion
from posttrain.text.render import Renderer

__all__ = [
    "STOP_REASONS", "Call", "Episode", "Gather", "Generate", "MakeEpisode",
    "Outcome", "Request", "Result", "Task", "Turn"]

# Why an episode ended, in the order of their codes.
STOP_REASONS = (
    "completed", "max_turns", "max_tokens", "max_tool_calls",
    "context_overflow", "parse_error", "tool_error", "timeout", "error")


@dataclasses.dataclass(frozen=True)
class Generate:
  """Request for tokens from the engine.

  Attributes:
    tokens: the prompt; with a parent, the observation behind it.
    parent: turn of the same episode that this one goes on from.
    n: samples; the episode is sent a list of turns if it is not 1.
    changes: other fields of the engine's `Request`, such as `stop_strings`
      and the budget; they are the stage's where they are not named.
  """

  tokens: Sequence[int]
  parent: "Turn | None" = None
  n: int = 1
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Turn:
  """Tokens that the engine made for an episode.

  Attributes:
    number: its place among the episode's turns, from 0.
    parent: number of the turn that it goes on from; None without one.
    completion: the engine's; its request's prompt is the whole sequence before
      it.
    observation: tokens between its parent's end and its beginning; the prompt
      without a parent.
    text, thinking, answer: of the completion, cut where the sampler's record
      has the thinking end.
  """

  number: int
  parent: int | None
  completion: Completion
  observation: tuple[int, ...]
  text: str
  thinking: str
  answer: str

  @property
  def finish_reason(self) -> str:
    """Why the turn ended, of `FINISH_REASONS`."""
    return self.completion.finish_reason


@dataclasses.dataclass(frozen=True)
class Outcome:
  """End of an episode.

  Attributes:
    answer: text that rewards judge; None: the answer of the last turn.
    reason: of `STOP_REASONS`.
    rewards: by the number of a turn, what the episode itself gave for it.
    reason_text: more about the reason, for people.
  """

  answer: str | None = None
  reason: str = "completed"
  rewards: Mapping[int, float] = dataclasses.field(default_factory=dict)
  reason_text: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
  """Problem as an episode gets it.

  Attributes:
    row: the problem's columns.
    prompt: its prompt, as the renderer makes it.
    renderer: of rows to tokens; has the tokenizer.
    prompt_id, sample_id: with seed, stage and step, what draws depend on.
    generator: for the episode's own randomness, seeded by these ids.
    max_tokens: the most tokens behind the prompt, observations included.
  """

  row: Mapping[str, Any]
  prompt: tuple[int, ...]
  renderer: Renderer
  prompt_id: int
  sample_id: int
  generator: np.random.Generator
  max_tokens: int

  def encode(self, text: str) -> tuple[int, ...]:
    """Encodes text of an observation, without special tokens around it."""
    return tuple(self.renderer.tokenizer.encode(text))


Request = Generate | Call
Episode = Generator[
    Request | Sequence[Request], Any, Outcome]
MakeEpisode = Callable[..., Episode]
