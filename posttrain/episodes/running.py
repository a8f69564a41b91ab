"""Running episode: its generator, and what it has asked for and been sent."""

import dataclasses
import math
import operator
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

from posttrain.episodes.protocol import (
  Call,
  Episode,
  Gather,
  Generate,
  Outcome,
  Result,
  Task,
  Turn,
)
from posttrain.episodes.trajectory import Trajectory
from posttrain.sampler import token_sampling

# Turns and calls of one episode, at most: one that never ends would keep the
# whole batch waiting.
MAX_REQUESTS = 10_000


class Running:
  """Running episode.

  Attributes:
    task: what it was given.
    turns, calls: what it has asked for; None where that is not there yet.
    outcome: how it ended; None while it goes on.
    missing: number of results that it waits for.
    error: why a turn that it has asked for cannot be; "" if all can.
    scores: after its end, results by name.
  """

  def __init__(self, task: Task, make: Callable[[], Episode]):
    self.task = task
    self.turns: list[Turn | None] = []
    self.calls: list[Result | None] = []
    self.outcome: Outcome | None = None
    self.missing = 0
    self.error = ""
    self.scores: dict[str, Result | None] = {}
    self._make = make
    self._episode: Episode | None = None
    # What it has yielded last: requests, and the places of their results.
    self._asked: list[tuple[Generate | Call, range]] = []
    self._many = True
    self._fresh = 0  # `Generate`s without a parent so far.
    self._branches: dict[int, int] = {}  # Requests behind each turn so far.
    self._requests = 0  # So far; a yield of none counts as one.

  def advance(self) -> list[Generate | Call]:
    """Runs the generator to its next yield, and returns what it asks for.

    If the generator returns or raises, `outcome` is set.
    """
    try:
      if self._episode is None:
        self._episode = _begun(self._make())
        asked: Any = next(self._episode)
      else:
        asked = self._episode.send(self._answer())
      self._many = not isinstance(asked, Generate | Call)
      return self._counted(_checked(asked if self._many else [asked]))
    except StopIteration as stop:
      try:
        self.outcome = _checked_end(stop.value, len(self.turns))
      except (TypeError, ValueError) as error:
        self.fail(error)
    except KeyboardInterrupt:
      raise
    # An episode is a user's code, also where it leaves by `sys.exit`.
    except BaseException as error:
      self.fail(error)
    return []

  def _counted(
      self, asked: list[Generate | Call]) -> list[Generate | Call]:
    """Raises RuntimeError for an episode that asks without end."""
    self._requests += max(1, sum(
        each.n if isinstance(each, Generate) else 1 for each in asked))
    if self._requests > MAX_REQUESTS:
      raise RuntimeError(
          f"The episode has asked for {self._requests} turns and calls, and at "
          f"most {MAX_REQUESTS} are made. Does its loop end?")
    return asked

  def end(self, reason: str, text: str) -> None:
    """Ends the episode from outside, with one of `STOP_REASONS`."""
    self.outcome = Outcome(reason=reason, reason_text=text)
    # A `finally` in it may raise; it has ended all the same.
    try:
      if self._episode is not None:
        self._episode.close()
    except KeyboardInterrupt:
      raise
    except BaseException:
      pass

  def fail(self, error: BaseException) -> None:
    """Ends the episode for an exception in it."""
    self.end("error", told(error))

  def expect(self, asked: Sequence[Generate | Call]) -> None:
    """Makes places for the results of what it asks for."""
    self._asked = []
    for each in asked:
      count = each.n if isinstance(each, Generate) else 1
      places: list[Any] = (
          self.turns if isinstance(each, Generate) else self.calls)
      self._asked.append((each, range(len(places), len(places) + count)))
      places += [None] * count
      self.missing += count

  @property
  def places(self) -> Iterable[tuple[Generate | Call, range]]:
    """Lists what it has asked for last, with the places of the results."""
    return self._asked

  def ids(self, generate: Generate) -> list[tuple[int, int]]:
    """Returns sample id and first draw of each sample of a request.

    The first is the episode's own row of draws, and a turn that goes on from
    another goes on with its row. All others are forks, see `fork_id`: sample j
    of the k-th request without a parent, by -1 - k and j; and the branches of a
    turn, by its draws and the branch. No two requests draw the same noise.
    """
    parent = generate.parent
    if parent is None:
      own, code, first_draw = self.task.sample_id, -1 - self._fresh, 0
      alone, start = not self._fresh, 0
      self._fresh += 1
    else:
      own = parent.completion.request.sample_id
      code = first_draw = parent.completion.draws
      start = self._branches.get(parent.number, 0)
      alone = not start and generate.n == 1
      self._branches[parent.number] = start + generate.n
    return [
        (own if alone and not j else token_sampling.fork_id(
            own, code, start + j), first_draw) for j in range(generate.n)]

  def trajectory(self) -> Trajectory:
    """Makes the record of the episode, which has ended."""
    assert self.outcome is not None and not self.missing
    return Trajectory(
        row=self.task.row, prompt=self.task.prompt,
        prompt_id=self.task.prompt_id,
        sample_id=self.task.sample_id, outcome=self.outcome,
        turns=[turn for turn in self.turns if turn is not None],
        calls=[result for result in self.calls if result is not None],
        scores={name: result for name, result in self.scores.items()
                if result is not None})

  def _answer(self) -> Any:
    """Returns what the generator is sent for its last yield."""
    answers: list[Any] = []
    for each, places in self._asked:
      if isinstance(each, Generate):
        turns = self.turns[places.start:places.stop]
        answers.append(turns if each.n > 1 else turns[0])
      else:
        answers.append(self.calls[places.start])
    return answers if self._many else answers[0]


def told(error: BaseException) -> str:
  """Describes an exception of a user's code, in 500 characters at most."""
  try:
    text = str(error)
  except Exception:  # It is the user's too.
    text = "it cannot be described"
  return f"{type(error).__name__}: {text}"[:500]


def _begun(episode: Any) -> Episode:
  """Raises TypeError for what is no generator."""
  if not isinstance(episode, Generator):
    raise TypeError(
        f"The episode is a {type(episode).__name__}, and must be a generator: "
        "a function that yields.")
  return episode


def _checked_end(outcome: Any, num_turns: int) -> Outcome:
  """Raises TypeError or ValueError for what an episode may not return."""
  if not isinstance(outcome, Outcome):
    raise TypeError(
        f"The episode returned a {type(outcome).__name__}, and must return an "
        "Outcome.")
  for number in outcome.rewards:
    if not 0 <= number < num_turns:
      raise ValueError(
          f"rewards has turn {number}, and the episode has {num_turns} turns, "
          "which count from 0.")
  return outcome


def _checked(asked: Any) -> list[Generate | Call]:
  """Returns what an episode yielded, with the tokens as tuples.

  Raises:
    TypeError, ValueError: it may not yield that.
  """
  needed = "and must yield a Generate, a Call, or a sequence of them"
  if not isinstance(asked, list | tuple):
    raise TypeError(
        f"The episode yielded a {type(asked).__name__}, {needed}.")
  for each in asked:
    if not isinstance(each, Generate | Call):
      raise TypeError(
          f"The episode yielded a sequence with a {type(each).__name__}, "
          f"{needed}.")
    if isinstance(each, Call):
      _check_call(each)
    elif not isinstance(each.n, int) or each.n < 1:
      raise ValueError(f"n is {each.n!r}, and must be 1 or more samples.")
  return [dataclasses.replace(each, tokens=tuple(map(
      operator.index, each.tokens))) if isinstance(each, Generate) else each
          for each in asked]


def _check_call(call: Call) -> None:
  """Raises TypeError or ValueError for a call that cannot be made."""
  for name, kind in (("function", str), ("args", tuple), ("kwargs", Mapping),
                     ("seconds", int | float | None),
                     ("gather", Gather | None)):
    value = getattr(call, name)
    if not isinstance(value, kind):
      raise TypeError(
          f"A Call's {name} is a {type(value).__name__}, and must be a "
          f"{getattr(kind, '__name__', kind)}.")
  if call.gather and not (
      type(call.gather.size) is int and call.gather.size >= 0):
    raise ValueError(
        f"A Gather's size is {call.gather.size!r}, and must be a number of "
        "calls, or 0.")
  if call.seconds is not None and not 0 < call.seconds < math.inf:
    raise ValueError(
        f"A Call's seconds are {call.seconds}, and must be above 0.")
