"""Batches of rollouts in their order, each by a version of the policy.

Batch b is drawn by the policy as it is before the updates of batch
max(0, b - staleness): a function of b alone, however often a run is resumed.
With no staleness a batch is drawn when it is needed. With some, and devices
that only sample, one is drawn while another is learned from.
"""

import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np

from posttrain import sharding
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.rl import weight_sync
from posttrain.sampler import rollouts as rollouts_lib
from posttrain.stages import rollout_worker, training
from posttrain.stages.run_context import RunContext
from posttrain.telemetry import flops
from posttrain.train import trainable

Arrays = dict[str, np.ndarray]


class RolloutBuffer:
  """Rollout buffer: batches drawn, and those that wait to be learned from.

  Attributes:
    worker: how a batch is drawn and scored.
    staleness: batches of rollouts.
    seconds, flops: of what was drawn last.
  """

  def __init__(
      self, context: RunContext, worker: rollout_worker.RolloutWorker,
      start: ModelConfig, updates: int):
    """
    Args:
      start: of the model that the stage starts from.
      updates: from one batch.
    """
    section = context.section
    self.worker, self.staleness = worker, section.staleness
    self._updates, self._total = updates, section.num_steps // updates
    self._drawn: list[rollout_worker.ScoredRollouts] = []
    self._policy: Transformer | None = None
    self.seconds: dict[str, float] = {}
    self.flops = 0.0
    self._sampling: jax.sharding.Mesh | None = None
    self._sync: weight_sync.WeightSync | None = None
    if context.config.mesh.roles == "split":
      _, self._sampling = sharding.roles_of(context.config.mesh)
      with jax.set_mesh(self._sampling):
        like, _ = trainable.abstract(
            start, training.plan(section, context.config.compute))
      self._sync = weight_sync.WeightSync(
          weight_sync.sampler_dtypes(
              like, weights_dtype=section.rollout.weights_dtype),
          self._sampling)

  def take(self, model: Transformer,
      batch: int) -> rollout_worker.ScoredRollouts:
    """The batch to learn from now; `model` is the policy before its updates.
    """
    self.seconds = {}
    policy = model
    if self._sync is not None:
      policy = self._sync(model)
      self.seconds["weight_sync"] = self._sync.seconds
    # Of the first batches, which no earlier policy could draw.
    while len(self._drawn) < min(max(self.staleness, 1), self._total - batch):
      self._drawn.append(self._draw(policy, batch + len(self._drawn)))
    self._policy = policy if self.staleness else None
    return self._drawn.pop(0)

  def draw_ahead(self, batch: int) -> None:
    """Draws with the policy of the last `take`, which was of `batch`."""
    if self._policy is not None and batch + self.staleness < self._total:
      self._drawn.append(self._draw(self._policy, batch + self.staleness))
    self._policy = None

  def behind(self, batch: int) -> int:
    """Batches that were learned from since the policy that drew this one."""
    return min(batch, self.staleness)

  def metrics(self) -> dict[str, float]:
    """Returns the metrics of the last `take`."""
    return {} if self._sync is None else {
        "perf/weight_sync_bytes": float(self._sync.bytes)}

  def _draw(self, policy: Transformer,
      batch: int) -> rollout_worker.ScoredRollouts:
    with (contextlib.nullcontext() if self._sampling is None
          else jax.set_mesh(self._sampling)):
      found = self.worker.collect(
          policy, step=batch * self._updates, batch=batch)
    self.flops = flops.of_rollouts(policy.config, found.rollouts)
    for name, value in found.seconds.items():
      self.seconds[name] = self.seconds.get(name, 0.0) + value
    return found

  def to_arrays(self) -> Arrays | None:
    """Converts waiting batches to arrays for a checkpoint; None without any."""
    return {
        f"waiting_{n}_{name}": x for n, drawn in enumerate(self._drawn)
        for name, x in _to_arrays(drawn).items()} or None

  def restore(self, arrays: Arrays | None, batch: int) -> None:
    """Restores the batches that waited before `batch`."""
    waiting: dict[int, Arrays] = {}
    for key, x in (arrays or {}).items():
      _, n, name = key.split("_", 2)
      waiting.setdefault(int(n), {})[name] = x
    self._drawn = [
        self._from_arrays(waiting[n], batch + n) for n in sorted(waiting)]

  def _from_arrays(self, arrays: Arrays,
      batch: int) -> rollout_worker.ScoredRollouts:
    chosen = self.worker.problems_of(batch)
    scores, statuses = arrays["scores"], arrays["statuses"]
    fields: dict[str, Any] = {
        name: x for name, x in arrays.items()
        if name not in ("scores", "statuses")}
    per_group = lambda rows: [
        row for row in rows for _ in range(self.worker.group_size)]
    return rollout_worker.ScoredRollouts(
        rollouts=rollouts_lib.Rollouts(
            prompts=per_group(map(
                self.worker.renderer.prompt_tokens, chosen)), **fields),
        problems=per_group(chosen), scores=scores, statuses=statuses,
        rewards=self.worker.rewards_of(scores, statuses), seconds={})


def _to_arrays(drawn: rollout_worker.ScoredRollouts) -> Arrays:
  """Problems and prompts follow from the batch's number."""
  names = [field.name for field in dataclasses.fields(drawn.rollouts)]
  return {"scores": drawn.scores, "statuses": drawn.statuses} | {
      name: value for name in names
      if isinstance(value := getattr(drawn.rollouts, name), np.ndarray)}

