"""GRPO: sample groups, score them, learn from what differs within a group.

One batch of rollouts gives `num_minibatches * num_epochs` optimizer updates;
`step` counts updates. The old logprobs of the ratio come from the training
program: those of the first update are its own (the ratio is exactly 1), the
others are computed once, before it. The loss is a mean over all completions of
a minibatch. Where it has no term but the policy's, completions of groups whose
rewards are all equal have no gradient: they count in the denominator, and their
forward pass is saved. An update of a minibatch of nothing else is counted, and
moves nothing.

Reference: DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from posttrain import sharding
from posttrain.config.stages.rl import SCHEMA
from posttrain.data import random_streams
from posttrain.model.transformer import Transformer
from posttrain.rl import objective, packing, rollout_worker
from posttrain.stages import loop, rl_charts, rl_parts, rl_programs, training
from posttrain.stages.run_context import RunContext
from posttrain.stages.stage import Stage
from posttrain.telemetry import flops, hardware
from posttrain.train import checkpoints, health, offload, preemption
from posttrain.train import state as state_lib


def run(context: RunContext, start: Transformer) -> Transformer:
  """Trains `start`, see `loop.run`."""
  return loop.run(context, functools.partial(Learner, context, start))


class Sent(NamedTuple):
  """An update that the devices have been given.

  Attributes:
    sums: on the devices; empty where there was nothing to learn from.
    seconds: that it took to send.
    flops: of the model.
  """

  sums: dict[str, Any]
  seconds: float
  flops: float


class Learner(loop.Body):
  """The moving parts of the stage.

  Attributes:
    state: parameters, optimizer state, step.
    step: updates made.
    experience: the packed rollouts in flight, or None between two batches.
  """

  runs_ahead = False
  headline = ("reward", "completions/mean_length")

  def __init__(self, context: RunContext, start: Transformer):
    section = context.section
    self.context, self.section = context, section
    self.offload = context.config.compute.offload
    offload.check(self.offload)
    self.updates = rl_parts.num_updates(section)
    self.worker = rl_parts.make_rollout_worker(context)
    self.buffer = rl_parts.make_rollout_buffer(
        context, self.worker, start.config)
    self.prepare = rl_parts.make_preparation(
        section, loss_chunk=context.config.compute.loss_chunk)
    optimizer, self._update = training.make_update(section, self.prepare.loss)
    self.state = training.make_state(context, start, optimizer)
    self.reference = rl_parts.make_reference(
        context, self.state,
        fresh=start.config.lora != self.state.trained.config.lora
    ) if self.prepare.objective.needs_reference else None
    self.experience: packing.Arrays | None = None
    self.sent: list[Sent] = []
    self.rollout_metrics: dict[str, float] = {}
    self.prepare_seconds = 0.0
    self.health = health.RolloutHealth(section.health.patience)
    self.scoring_health = health.ScoringHealth(
        section.health.max_unscored, section.health.unscored_patience)
    self.step = 0

  def restore(self, found: checkpoints.Restored) -> None:
    """Takes over what a checkpoint held, rollouts in flight included."""
    self.step = found.step
    waiting = found.rollouts
    if not self.buffer.staleness:
      self.experience, waiting = waiting, None
    self.buffer.restore(found.extras["problem_cursor"], waiting)
    self.rollout_metrics = found.extras["rollout_metrics"]
    self.health.set_state(found.extras["health"])
    self.scoring_health.set_state(found.extras["health"])

  def get_state(self) -> dict[str, Any]:
    return {
        "problem_cursor": self.buffer.cursor.get_state(),
        "rollout_metrics": self.rollout_metrics, "health": (
            self.health.get_state() | self.scoring_health.get_state())}

  def arrays(self) -> packing.Arrays | None:
    """Rollouts in flight, packed or waiting."""
    return (self.buffer.to_arrays() if self.experience is None
            else self.experience)

  def ranks(self, row: loop.Row) -> bool:
    """Without a score there is nothing to rank a checkpoint by."""
    return row["frac_unscored"] < 1

  @property
  def may_save(self) -> bool:
    """No update is under way whose batch could not be learned from again."""
    return not self.sent

  def train_step(self, number: int, span: loop.Span) -> loop.Update:
    """Draws a batch of rollouts where none is in flight; sends an update."""
    del number, span
    if self.experience is None:
      self.collect()
    return self.update()

  def collect(self) -> None:
    """Samples, scores and packs the next batch of rollouts."""
    model, batch = self.state.model, self.step // self.updates
    if "optimizer" in self.offload:  # Until there is something to learn from.
      self._move_optimizer(offload.to_host)
    try:
      collected = self.buffer.take(model, batch)
    except preemption.Preempted:  # What is saved is on the devices.
      self._move_optimizer(offload.to_devices)
      raise
    started = time.monotonic()
    prepared = self.prepare(
        collected.rollouts, collected.group_ids, collected.rewards, model,
        self.reference, random_streams.stream(
            self.context.config.seed, self.context.name, "minibatches", batch))
    self._move_optimizer(offload.to_devices)
    self.experience = prepared.experience
    self.rollout_metrics = prepared.metrics | self.buffer.metrics(
        ) | rollout_worker.metrics(
        collected, prepared.advantages, list(self.worker.rewards))
    if self.buffer.staleness:
      self.rollout_metrics["staleness"] = float(self.buffer.behind(batch))
    self.prepare_seconds = time.monotonic() - started
    rl_parts.show_and_save(
        self.context, self.worker, collected, prepared.advantages,
        self.step)
    # First: what has no score has no signal either.
    self.scoring_health.update(
        self.step, self.rollout_metrics["frac_unscored"])
    self.health.update(
        self.step,
        clipped_ratio=self.rollout_metrics["completions/clipped_ratio"],
        frac_reward_zero_std=self.rollout_metrics["frac_reward_zero_std"])

  def _move_optimizer(self, to: Callable[[Any], Any]) -> None:
    self.state = dataclasses.replace(
        self.state, opt_state=to(self.state.opt_state))

  def update(self) -> loop.Update:
    """Sends one optimizer update to the devices.

    With rollouts that may be stale the devices are given all updates of the
    batch at once, and while they work others draw: in this order on every
    host, so that no two can wait for each other.
    """
    index = self.step % self.updates
    if not self.sent:
      stop = self.updates if self.buffer.staleness else index + 1
      self.sent = [self._send(number) for number in range(index, stop)]
      if self.buffer.staleness:
        sharding.settle(self.state)
        self.buffer.draw_ahead(self.step // self.updates)
    assert self.experience is not None
    sent, first = self.sent.pop(0), index == 0
    update = loop.Update(
        sent.sums, self.experience,
        functools.partial(self._row, sent, first, time.monotonic()),
        flops=sent.flops + (self.buffer.flops if first else 0),
        tokens=self.rollout_metrics["num_tokens"] if first else None)
    self.step += 1
    if self.step % self.updates == 0:
      self.experience = None
    return update

  def _send(self, index: int) -> Sent:
    """Starts an update, whose state is the next one's."""
    assert self.experience is not None
    started, part = time.monotonic(), index % self.section.num_minibatches
    arrays, used = packing.minibatch(self.experience, part)
    # The first update's ratio is against itself, see the module's text.
    arrays = arrays if index else {
        name: x for name, x in arrays.items() if name != "old_logprobs"}
    work = flops.of_batch(
        self.state.model.config, {
            name: self.experience[name][part]
            for name in ("positions", "segment_ids")},
        trained=training.trained_share(self.state))
    sums: dict[str, Any] = {}
    if used:
      self.state, sums = self._update(self.state, arrays, np.int32(used))
    else:
      self.state = state_lib.skip(self.state)
    return Sent(sums, time.monotonic() - started, work)

  def _row(
      self, sent: Sent, first: bool, since: float, values: dict[str, float],
      skipped: bool,
  ) -> loop.Row:
    """Builds the row of an update, once it is made.

    Sampling is one forward pass; passes for old and reference logprobs are
    no part of the model FLOPs.

    Args:
      first: the update is the first of its batch of rollouts.
      since: when waiting for it began.
    """
    seconds = {"learn": sent.seconds + time.monotonic() - since}
    if first:
      seconds |= self.buffer.seconds | {"prepare": self.prepare_seconds}
    return self._metrics(values, first, skipped) | self.rollout_metrics | {
        f"time/{name}": value for name, value in seconds.items()
    } | hardware.find().mfu("perf/learn_mfu", sent.flops, seconds["learn"])

  def _metrics(
      self, values: dict[str, float], first: bool, skipped: bool) -> loop.Row:
    if not values:
      return {"skipped_updates": 1.0}
    kept = {name: values[name] for name in ("loss", "grad_norm",
                                            "learning_rate")}
    if skipped:
      return kept | {"skipped_updates": 1.0}
    values.pop("spike", None)
    if first and values.get("ratio_deviation_max", 0) != 0:
      raise AssertionError("The first ratio of a batch of rollouts is not 1.")
    return kept | {"skipped_updates": 0.0} | objective.metrics_of_sums(
        values, fresh=first and not self.buffer.staleness)


STAGE = Stage(
    schema=SCHEMA, run=run, check=rl_parts.check,
    programs=rl_programs.programs, memory=rl_programs.memory,
    work=rl_programs.work, padding={
        "prompts": rl_programs.padding,
        "completions": rl_programs.no_lengths},
    charts=rl_charts.CHARTS, leaves=("rows", "rollouts"))
