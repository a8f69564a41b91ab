"""Episode sampler: problems in, trajectories with scores out, for one batch.

It makes an engine for the batch, and a driver that runs all its episodes. The
weights may change between two batches.

  P: problems asked  G: episodes of each, group_size
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from posttrain.episodes import protocol
from posttrain.episodes.calls import Calls
from posttrain.episodes.driver import Driver, Score, no_scores
from posttrain.episodes.protocol import MakeEpisode, Task
from posttrain.episodes.trajectory import Trajectory
from posttrain.model.transformer import Transformer
from posttrain.sampler import active_sequence
from posttrain.sampler.requests import Request
from posttrain.sampler.sampler import Limits, Sampler
from posttrain.text.render import Renderer


class Sampled(NamedTuple):
  """Trajectories of a batch.

  Attributes:
    trajectories: P * G, in order of problem, then sample.
    seconds: "rollout", until nothing decodes any more; and "reward_wait", from
      then to the last score.
  """

  trajectories: list[Trajectory]
  seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class EpisodeSampler:
  """Samples episodes; only model, step and problems change.

  Attributes:
    sampler: makes the engine and the requests of first turns.
    renderer: problems to prompt tokens.
    episode: `episode(task)` is the generator.
    calls: of the stage; process 0 has the workers.
    seed, stage: with step, prompt and sample ids, what draws depend on.
  """

  sampler: Sampler
  renderer: Renderer
  episode: MakeEpisode
  calls: Calls
  seed: int
  stage: str

  def run(
      self, model: Transformer, problems: Sequence[Mapping[str, Any]],
      limits: Limits, *, group_size: int, step: int = 0,
      first_sample: int | np.ndarray = 0, score: Score = no_scores,
  ) -> Sampled:
    """Runs `group_size` episodes of every problem.

    Args:
      model: on the current mesh.
      problems: [P] rows, each with its `id`; one may stand there twice.
      limits: budgets of a turn, one value for all.
      first_sample: see `Sampler.generate`.
      score: the calls of the scores of an episode, see `Driver.run`.

    Raises:
      ValueError: an empty or too long prompt, budgets that contradict each
        other, or logits that are not finite.
    """
    started = time.monotonic()
    first = np.broadcast_to(first_sample, len(problems)).tolist()
    tasks = [task for row, at in zip(problems, first, strict=True)
             for task in protocol.make_tasks(
                 row, self.renderer, sample_ids=range(at, at + group_size),
                 max_tokens=self.sampler.max_episode_tokens
                 or int(limits.max_tokens),
                 seed=self.seed, stage=self.stage, step=step)]
    make = functools.partial(self._request, limits, step)
    engine = self.sampler.make_engine(
        model, [make(task, task.sample_id) for task in tasks], group_size)
    driver = Driver(engine, make, self.calls)
    found = driver.run(tasks, self.episode, score=score)
    _check_finite(found)
    seconds = time.monotonic() - started
    return Sampled(found, {
        "rollout": seconds - driver.reward_wait,
        "reward_wait": driver.reward_wait})

  def _request(
      self, limits: Limits, step: int, task: Task, sample_id: int) -> Request:
    """Makes the request of a task's first turn."""
    [request] = self.sampler.make_requests(
        [task.prompt], limits, prompt_id=[task.prompt_id], seed=self.seed,
        stage=self.stage, step=step, first_sample=sample_id)
    return request


def _check_finite(trajectories: Sequence[Trajectory]) -> None:
  """Raises ValueError for logits that are not finite: the weights are broken.

  All other errors are of one episode alone.
  """
  broken = sum(
      any(turn.completion.error == active_sequence.NOT_FINITE
          for turn in each.turns) for each in trajectories)
  if broken:
    raise ValueError(
        f"{broken} of {len(trajectories)} rows: {active_sequence.NOT_FINITE}")
