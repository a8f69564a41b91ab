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
    stop = {"stop_strings": ("=",), "include_stop": True}
    turn = yield Generate(task.prompt, changes=stop)
    result = yield Call("my_tools.py:add", (turn.text,))
    yield Generate(task.encode(f" {result.value}", turn), parent=turn)
    return Outcome()
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.data import random_streams
from posttrain.episodes.call import Call, Gather, Result
from posttrain.sampler.requests import Completion
from posttrain.text.render import Renderer

__all__ = [
    "STOP_REASONS", "Call", "Episode", "Gather", "Generate", "MakeEpisode",
    "Outcome", "Request", "Result", "Task", "Turn", "is_multi_turn",
    "make_tasks", "multi_turn"]

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
    """Reason of its end, of `FINISH_REASONS`."""
    return self.completion.finish_reason


@dataclasses.dataclass(frozen=True)
class Outcome:
  """End of an episode.

  Attributes:
    answer: text that rewards judge; None: the answer of the last turn.
    reason: of `STOP_REASONS`.
    rewards: by the number of a turn, what the episode itself gave for it;
      recorded, and in no loss.
    reason_text: more about the reason, for people.
  """

  answer: str | None = None
  reason: str = "completed"
  rewards: Mapping[int, float] = dataclasses.field(default_factory=dict)
  reason_text: str = ""

  def __post_init__(self):
    if self.reason not in STOP_REASONS:
      raise ValueError(
          f"reason is {self.reason!r}, and must be one of "
          f"{', '.join(STOP_REASONS)}.")
    if not isinstance(self.answer, str | None):
      raise TypeError(
          f"answer is a {type(self.answer).__name__}, and must be a text or "
          "None.")
    if not isinstance(self.reason_text, str):
      raise TypeError(
          f"reason_text is a {type(self.reason_text).__name__}, and must be a "
          "text.")
    for number, reward in self.rewards.items():
      if type(number) is not int or not math.isfinite(reward):
        raise ValueError(
            f"rewards has {number!r}: {reward!r}, and must have finite numbers "
            "by the numbers of turns.")


@dataclasses.dataclass(frozen=True)
class Task:
  """Problem as an episode gets it.

  Attributes:
    row: the problem's columns.
    prompt: its prompt, as the renderer makes it.
    renderer: of rows to tokens; has the tokenizer.
    prompt_id, sample_id: with seed, stage and step, what draws depend on.
    generator: for the episode's own randomness, seeded by these ids.
    max_tokens: the most tokens behind the prompt, observations included, of
      each sequence of the episode.
  """

  row: Mapping[str, Any]
  prompt: tuple[int, ...]
  renderer: Renderer
  prompt_id: int
  sample_id: int
  generator: np.random.Generator
  max_tokens: int

  def encode(
      self, text: str, after: Turn, *, special: bool = False,
  ) -> tuple[int, ...]:
    """Encodes the text of an observation, as it goes on behind a turn.

    Args:
      text: nothing is put around it.
      after: the turn.
      special: names of control tokens in the text are these tokens, and not
        ordinary text.
    """
    kept = after.completion.kept or self.prompt
    return tuple(self.renderer.tokenizer.encode(
        text, special=special, after=kept[-1]))


def make_tasks(
    row: Mapping[str, Any], renderer: Renderer, *, sample_ids: Iterable[int],
    max_tokens: int, seed: int, stage: str, step: int = 0,
) -> list[Task]:
  """Makes tasks of one problem, one for each sample.

  Args:
    row: the problem's columns; its `id` is the prompt id.
    renderer: makes its prompt.
    sample_ids: of the episodes.
    max_tokens: see `Task`.
    seed, stage, step: with the ids, what the episode draws depends on.
  """
  prompt, prompt_id = tuple(renderer.prompt_tokens(row)), int(row["id"])

  def generator(sample_id: int) -> np.random.Generator:
    # As 32 bits, which is how `token_sampling.row_keys` takes an id below 0.
    ids = (number % 2**32 for number in (step, prompt_id, sample_id))
    return random_streams.stream(seed, stage, "episode", *ids)

  return [
      Task(row=row, prompt=prompt, renderer=renderer, prompt_id=prompt_id,
           sample_id=sample_id, max_tokens=max_tokens,
           generator=generator(sample_id))
      for sample_id in sample_ids]


Request = Generate | Call
Episode = Generator[
    Request | Sequence[Request], Any, Outcome]
MakeEpisode = Callable[..., Episode]


def multi_turn(episode: MakeEpisode) -> MakeEpisode:
  """Marks an episode whose turns go on from each other.

  A stage gives it an engine with room for them, and with a prefix cache, so
  that no token is computed twice.
  """
  episode.multi_turn = True  # type: ignore[attr-defined]
  return episode


def is_multi_turn(episode: MakeEpisode) -> bool:
  """True if an episode was marked by `multi_turn`."""
  return getattr(episode, "multi_turn", False)
