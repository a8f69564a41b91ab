"""Driver: runs episodes side by side, through one engine and one set of calls.

All episodes start at once. What they ask of the engine goes into its one queue,
what they ask of the host to `Calls`, and none waits for another. The rewards of
an episode are calls too: they are made when it ends, while others decode.

The driver runs on every host alike. It takes completions in the engine's order,
which is the same everywhere, and finished calls in that of `Calls.events`. So
every host sends the same to its generators, and submits requests and calls in
the same order.
"""

import functools
import time
from collections.abc import Callable, Sequence

from posttrain.episodes import asking
from posttrain.episodes.asking import MakeRequest
from posttrain.episodes.calls import Calls
from posttrain.episodes.protocol import (
  Call,
  Generate,
  MakeEpisode,
  Result,
  Task,
  Turn,
)
from posttrain.episodes.running import Running, told
from posttrain.episodes.trajectory import Trajectory
from posttrain.sampler import rollouts, transcript
from posttrain.sampler.engine import Engine
from posttrain.sampler.requests import Completion

# Seconds to wait for a call when nothing decodes. In between the engine's
# `before_chunk` is called, so that a run that is to end notices it.
WAIT_SECONDS = 0.2

# Makes the calls of an episode's scores, by name.
Score = Callable[[Trajectory], Sequence[tuple[str, Call]]]


def no_scores(trajectory: Trajectory) -> Sequence[tuple[str, Call]]:
  """Asks for no scores; the default."""
  del trajectory
  return ()


class Driver:
  """Driver of episodes.

  Attributes:
    reward_wait: seconds of the last `run` behind its last decode chunk.
  """

  def __init__(self, engine: Engine, make_request: MakeRequest, calls: Calls):
    """Takes the engine and the workers.

    Args:
      engine: without requests of others. Where it has a prefix cache, turns are
        kept in it.
      make_request: the stage's request for a task and a sample id.
      calls: on every host; process 0 has the workers.
    """
    self.reward_wait = self._decoded = 0.0
    self._engine, self._make_request = engine, make_request
    self._calls = calls
    self._unfinished = 0
    # Who waits for a completion or a call, and the place it goes to.
    self._turns: dict[int, tuple[Running, Generate, int]] = {}
    self._results: dict[int, tuple[Running, int | str]] = {}

  def run(
      self, tasks: Sequence[Task], make_episode: MakeEpisode, *,
      score: Score = no_scores,
  ) -> list[Trajectory]:
    """Runs an episode of each task to its end.

    Args:
      tasks: one for each episode.
      make_episode: `make_episode(task)` is the generator.
      score: the calls of the scores of an episode that has ended, whatever
        its reason.

    Returns:
      Trajectories in the order of the tasks. An episode that raised is among
      them, with the reason "error".
    """
    running = [Running(task, functools.partial(make_episode, task))
               for task in tasks]
    self._score, self._unfinished = score, len(running)
    self._decoded = time.monotonic()
    try:
      for each in running:
        self._go_on(each)
      while self._unfinished:
        self._step()
    except BaseException:  # The run ends, and so do the calls that hang.
      self._calls.cancel()
      raise
    self.reward_wait = time.monotonic() - self._decoded
    return [each.trajectory() for each in running]

  def _step(self) -> None:
    """Decodes a chunk, and takes what has ended."""
    # Also where nothing decodes, as `before_chunk` is called in it.
    decodes = self._engine.busy
    self._engine.step()
    if decodes:
      self._decoded = time.monotonic()
    while completions := self._engine.take():
      for done in completions:
        self._receive_turn(done)
    alone = not self._engine.busy
    assert self._calls.pending or not alone or not self._unfinished
    for number, result in self._calls.events(
        WAIT_SECONDS if alone else 0.0, alone=alone):
      self._receive_result(number, result)

  def _go_on(self, running: Running) -> None:
    """Runs an episode as far as it gets without a result."""
    while running.outcome is None and not running.missing:
      if running.error:
        running.end("error", running.error)
        break
      asked = running.advance()
      if running.outcome is None:
        self._submit(running, asked)
    if running.outcome is not None:
      self._end(running)

  def _submit(
      self, running: Running, asked: Sequence[Generate | Call]) -> None:
    """Submits what an episode asks for; ends it if that cannot be asked."""
    try:
      requests = [
          asking.make_requests(
              running, each, self._make_request, self._engine.settings,
              self._engine.tables)
          if isinstance(each, Generate) else [] for each in asked]
    except asking.NoRoom as error:
      running.end(error.reason, str(error))
      return
    except Exception as error:  # Of the values that the episode chose.
      running.fail(error)
      return
    running.expect(asked)
    for (each, places), made in zip(running.places, requests, strict=True):
      if isinstance(each, Call):
        self._call(running, each, places[0])
        continue
      for place, request in zip(places, made, strict=True):
        try:
          number = self._engine.submit(request)
        except Exception as error:  # Of a value that no one has thought of.
          running.error = running.error or told(error)
          running.missing -= 1
        else:
          self._turns[number] = running, each, place

  def _call(self, running: Running, call: Call, place: int | str) -> None:
    """Submits a call of an episode, or of one of its scores."""
    self._results[self._calls.submit(call)] = running, place

  def _end(self, running: Running) -> None:
    """Asks for the scores of an episode that has ended."""
    for name, call in self._score(running.trajectory()):
      running.scores[name] = None
      running.missing += 1
      self._call(running, call, name)
    self._unfinished -= not running.missing

  def _receive_turn(self, done: Completion) -> None:
    """Gives a completion to the episode that asked for it."""
    running, asked, place = self._turns.pop(done.id)
    self._engine.release(done.id)  # It is asked for again by its tokens.
    tokenizer, ids = running.task.renderer.tokenizer, self._engine.tables.ids
    texts = transcript.texts(
        tokenizer, ids, rollouts.of_completions([done]), 0)
    running.turns[place] = Turn(
        number=place, completion=done,
        parent=None if asked.parent is None else asked.parent.number,
        observation=tuple(asked.tokens), **texts)
    running.missing -= 1
    running.error = running.error or done.error
    self._go_on(running)

  def _receive_result(self, number: int, result: Result) -> None:
    """Gives the result of a call to the episode that asked for it."""
    running, place = self._results.pop(number)
    running.missing -= 1
    if isinstance(place, str):
      running.scores[place] = result
      self._unfinished -= not running.missing
      return
    running.calls[place] = result
    self._go_on(running)
