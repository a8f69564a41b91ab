"""Rollout buffer: batches of rollouts in their order.

Batch b is drawn by the policy as it is before the updates of batch
max(0, b - staleness), however often a run is resumed. Without staleness a batch
is drawn when it is needed. With asynchronous rollouts (staleness above 0, and
devices that only sample) one is drawn while another is learned from. The
problem cursor chooses a batch's problems; their indices stay with the batch.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from posttrain.data.problem_cursor import ProblemCursor
from posttrain.model.transformer import Transformer
from posttrain.rl import rollout_worker, weight_sync
from posttrain.sampler import rollouts as rollouts_lib
from posttrain.telemetry import flops

Arrays = dict[str, np.ndarray]
OWN = ("indices", "scores", "statuses", "rewards")  # Of a scored batch.


@dataclasses.dataclass
class RolloutBuffer:
  """Draws batches, and holds those that wait to be learned from.

  Attributes:
    worker: draws and scores a batch.
    cursor: the place after the last problem that was asked.
    num_groups: problems of a batch.
    num_batches: of the stage.
    updates: optimizer updates from one batch.
    staleness: off-policy lag, in batches of rollouts.
    sync: to devices that only sample; None where all devices do both.
    seconds, flops: of what was drawn last.
  """

  worker: rollout_worker.RolloutWorker
  cursor: ProblemCursor
  num_groups: int
  num_batches: int
  updates: int
  staleness: int
  sync: weight_sync.WeightSync | None
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  flops: float = 0.0
  _drawn: list[rollout_worker.ScoredRollouts] = dataclasses.field(
      default_factory=list)
  _policy: Transformer | None = None

  def take(
      self, model: Transformer, batch: int) -> rollout_worker.ScoredRollouts:
    """Returns the batch to learn from now.

    Args:
      model: the policy before the batch's updates.
      batch: its number.
    """
    self.seconds = {}
    policy = model
    if self.sync is not None:
      policy = self.sync(model)
      self.seconds["weight_sync"] = self.sync.seconds
    # No earlier policy could draw the first batches.
    while len(self._drawn) < min(
        max(self.staleness, 1), self.num_batches - batch):
      self._drawn.append(self._draw(policy, batch + len(self._drawn)))
    self._policy = policy if self.staleness else None
    return self._drawn.pop(0)

  def draw_ahead(self, batch: int) -> None:
    """Draws with the policy of the last `take`, which was of `batch`."""
    if self._policy is not None and batch + self.staleness < self.num_batches:
      self._drawn.append(self._draw(self._policy, batch + self.staleness))
    self._policy = None

  def metrics(self, batch: int) -> dict[str, float]:
    """Returns the metrics of the last `take`, which was of `batch`."""
    found: dict[str, float] = {}
    if self.sync is not None:
      found["perf/weight_sync_bytes"] = float(self.sync.bytes)
    if self.staleness:  # Batches that were learned from since it was drawn.
      found["staleness"] = float(min(batch, self.staleness))
    return found

  def _draw(
      self, policy: Transformer, batch: int,
  ) -> rollout_worker.ScoredRollouts:
    indices, after = self.cursor.take(self.num_groups)
    with (contextlib.nullcontext() if self.sync is None
          else jax.set_mesh(self.sync.mesh)):
      found = self.worker.collect(
          policy, indices, step=batch * self.updates)
    self.cursor = after  # A batch left half drawn has not moved it.
    self.flops = flops.of_rollouts(policy.config, found.rollouts)
    for name, value in found.seconds.items():
      self.seconds[name] = self.seconds.get(name, 0.0) + value
    return found

  def to_arrays(self) -> Arrays | None:
    """Converts waiting batches to arrays for a checkpoint; None without any."""
    return {
        f"waiting_{n}_{name}": x for n, drawn in enumerate(self._drawn)
        for name, x in _to_arrays(drawn).items()} or None

  def restore(self, cursor: Mapping[str, int], arrays: Arrays | None) -> None:
    """Restores the cursor's state and the batches that waited, if any."""
    self.cursor = self.cursor.at(cursor)
    waiting: dict[int, Arrays] = {}
    for key, x in (arrays or {}).items():
      _, n, name = key.split("_", 2)
      waiting.setdefault(int(n), {})[name] = x
    self._drawn = [self._from_arrays(waiting[n]) for n in sorted(waiting)]

  def _from_arrays(self, arrays: Arrays) -> rollout_worker.ScoredRollouts:
    worker = self.worker
    own = {name: arrays.pop(name) for name in OWN}
    details = json.loads(arrays.pop("details").tobytes())
    ends = np.cumsum(arrays.pop("prompt_lengths"))
    prompts = np.split(arrays.pop("prompt_tokens"), ends[:-1])
    problems = worker.per_completion(
        [worker.problems[i] for i in own["indices"]])
    fields: dict[str, Any] = arrays
    return rollout_worker.ScoredRollouts(
        rollouts=rollouts_lib.Rollouts(
            prompts=[prompt.tolist() for prompt in prompts], **fields),
        problems=problems, details=details, seconds={}, **own)


def _to_arrays(drawn: rollout_worker.ScoredRollouts) -> Arrays:
  """Converts a batch, but for the problems: its indices name them.

  An episode may have another prompt than its problem.
  """
  prompts = drawn.rollouts.prompts
  return {name: getattr(drawn, name) for name in OWN} | {
      "details": np.frombuffer(json.dumps(drawn.details).encode(), np.uint8),
      "prompt_tokens": np.concatenate(prompts).astype(np.int32),
      "prompt_lengths": np.array([len(prompt) for prompt in prompts], np.int32)
  } | {name: x for name, x in vars(drawn.rollouts).items()
      if isinstance(x, np.ndarray)}
