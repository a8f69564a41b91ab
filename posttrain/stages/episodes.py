"""Makes the episode sampler of a stage, and the workers that make its calls."""

import contextlib
import functools
from collections.abc import Iterator

from posttrain.episodes import protocol
from posttrain.episodes.calls import Calls
from posttrain.episodes.episode_sampler import EpisodeSampler
from posttrain.stages import problems, sampling
from posttrain.stages.run_context import RunContext
from posttrain.tasks import loading


@contextlib.contextmanager
def open_calls(context: RunContext) -> Iterator[Calls]:
  """Runs the workers of a stage, on process 0, and makes its calls."""
  with problems.worker_pool(context) as pool:
    yield Calls(pool, seconds=context.section.workers.seconds)


def make_sampler(context: RunContext, calls: Calls) -> EpisodeSampler:
  """Makes the sampler of the stage's episodes.

  Args:
    calls: of `open_calls`.
  """
  return EpisodeSampler(
      sampler=sampling.make_sampler(context, context.section.rollout),
      renderer=context.renderer, episode=make_episode(context), calls=calls,
      seed=context.config.seed, stage=context.name)


def make_episode(context: RunContext) -> protocol.MakeEpisode:
  """Loads the stage's episode, with its arguments."""
  section = context.section
  return functools.partial(
      loading.load_function(section.episode), **section.episode_args)


def check(context: RunContext) -> None:
  """Checks that the episode takes its arguments, and has the room it needs.

  Raises:
    ValueError: it does not.
  """
  section = context.section
  try:
    loading.check_call(section.episode, "task", **section.episode_args)
  except ValueError as error:
    raise ValueError(f"{context.name}.episode_args: {error}") from error
  several = protocol.is_multi_turn(loading.load_function(section.episode))
  room = section.rollout.max_episode_tokens
  if several and not room:
    raise ValueError(
        f"{context.name}.episode: {section.episode} has turns that go on from "
        "others, and rollout.max_episode_tokens is 0. Set it to the most "
        "tokens of all turns and observations together.")
  if room and not several:
    raise ValueError(
        f"{context.name}.rollout.max_episode_tokens is {room} and has no "
        f"effect: {section.episode} is not marked by "
        "posttrain.episodes.protocol.multi_turn. Mark it if its turns go on "
        "from others, or leave the key out.")


