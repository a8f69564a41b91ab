"""GRPO: sample groups, score them, learn from what differs within a group.

One batch of rollouts gives `num_minibatches * num_epochs` optimizer updates;
`step` counts updates. The old logprobs of the ratio come from the training
program: those of the first update are its own (the ratio is exactly 1), the
others are computed once, before it. The loss is a mean over all completions of
a minibatch. Where it has no term but the policy's, completions of groups whose
rewards are all equal have no gradient: they count in the denominator, and their
forward pass is saved. An update of a minibatch of nothing else is counted, and
moves nothing.

A KL in the reward is not the paper's: it is taken off the advantage, centred in
its group and never divided by the standard deviation of the rewards, so that
`kl_coef` weighs it alike in every group.

References: DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1; the KL
in the reward, https://arxiv.org/abs/1909.08593, section 2.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from posttrain import sharding
from posttrain.config.stages import rl as config_schema
from posttrain.data import random_streams
from posttrain.model.transformer import Transformer
from posttrain.objectives import advantages as advantages_lib
from posttrain.objectives import policy as policy_lib
from posttrain.rl import packing, rollout_worker
from posttrain.stages import rl_charts, rl_parts, rl_programs, training
from posttrain.stages.monitor import Monitor
from posttrain.stages.run_context import RunContext
from posttrain.stages.stage import Stage
from posttrain.telemetry import flops
from posttrain.telemetry import metrics as metrics_lib
from posttrain.train import checkpoints, health, offload, preemption
from posttrain.train import state as state_lib


def run(
    context: RunContext, start: Transformer,
    weights_of: Callable[[str], Transformer],
) -> Transformer:
  """Trains to the last step, from the newest checkpoint if there is one.

  Args:
    context: the stage's config and places.
    start: what to start from. Its buffers are consumed.
    weights_of: by stage name, "init" or path: for the reference.

  Returns:
    The trained model.

  Raises:
    ValueError: a problem or a reward is not what the config says.
    HealthError: an update was not made, and may not be skipped; or nothing
      is left to learn from.
    Preempted: SIGTERM came; the state is saved.
  """
  section = context.section
  with Monitor(context) as monitor, training.open_checkpoints(
      context) as saver:
    learner = Learner(context, start, weights_of)
    learner.state, found = training.resume(context, saver, learner.state)
    if found is not None:
      learner.restore(found)
    latest = lambda: learner.state.step
    monitor.begin(learner.step)
    with metrics_lib.Writer(
        context.workdir.metrics, context.workdir.tensorboard, context.name,
        restored_step=learner.step,
        check=context.workdir.check_known_lease,
    ) as writer, context.console.progress(
            context.name, section.num_steps, start=learner.step) as progress:
      while learner.step < section.num_steps:
        try:
          with monitor.step(learner.step + 1, latest):
            if learner.experience is None:
              learner.collect()
            row = learner.update()
        except preemption.Preempted as request:
          request.__traceback__ = None  # Its frames hold the rollout's arrays.
          leave_rollout(context, monitor, saver, learner)
        row |= learner.rates(monitor, row)
        writer.write(learner.step, row)
        progress.update(
            learner.step, reward=row.get("reward", float("nan")),
            length=row["completions/mean_length"])
        last = learner.step == section.num_steps
        if training.due(learner.step, section.log_every, last):
          context.console.table(f"{context.name} step {learner.step}", row)
        leaving = (
            preemption.requested() and learner.may_stop and not last)
        if leaving or training.due(
            learner.step, section.checkpoint.every, last):
          with monitor.saving(learner.step):
            # Without a score there is nothing to rank a checkpoint by.
            ranked = not leaving and row["frac_unscored"] < 1
            learner.save(saver, metrics=row if ranked else None)
        if leaving:
          with monitor.span("checkpoint"):
            training.leave(context, saver, learner.step)
    with monitor.span("checkpoint"):
      saver.wait()
  context.workdir.finish(context.name, {"step": section.num_steps})
  return learner.state.model


def leave_rollout(
    context: RunContext, monitor: Monitor, saver: checkpoints.Checkpoints,
    learner: "Learner",
) -> NoReturn:
  """Ends the process where SIGTERM came within a rollout, which is dropped.

  It is drawn again, the same, as random bits go by the ids alone. A batch that
  was drawn ahead is by a policy that the updates under way have replaced: from
  the last checkpoint on both are made again.

  Raises:
    Preempted: the updates made so far are saved.
  """
  kept = saver.latest_step() or 0
  if learner.may_stop and learner.step > kept:
    kept = learner.step
    with monitor.saving(kept):
      learner.save(saver)
  with monitor.span("checkpoint"):
    saver.wait()
  training.stop(
      context, (f"saved at step {kept}" if kept else "nothing to save yet")
      + "; the rollout under way is dropped, and will be drawn again")


class Learner:
  """The moving parts of the stage.

  Attributes:
    state: parameters, optimizer state, step.
    experience: the packed rollouts in flight, or None between two batches.
  """

  def __init__(self, context, start, weights_of):
    section = context.section
    self.context, self.section = context, section
    self.offload = context.config.compute.offload
    offload.check(self.offload)
    self.updates = rl_parts.num_updates(section)
    self.worker = rl_parts.make_rollout_worker(context)
    self.buffer = rl_parts.make_rollout_buffer(
        context, self.worker, start.config)
    self.shapes = rl_parts.make_shapes(section)
    self.loss = rl_parts.make_loss(
        section, loss_chunk=context.config.compute.loss_chunk)
    model, trained = training.prepare(context, start)
    fresh = start.config.lora != model.config.lora
    self.reference = rl_parts.make_reference(
        section, context.config.compute, model, trained, weights_of,
        fresh=fresh)
    optimizer, self._update = training.make_update(section, self.loss)
    self.state = state_lib.create(
        model, optimizer, trained, training.spike_rule(section))
    self.experience: packing.Arrays | None = None
    self.sent: list[rl_parts.Sent] = []
    self.rollout_metrics: dict[str, float] = {}
    self.prepare_seconds = 0.0
    self.flops: dict[str, float] = {}
    self.health = health.RolloutHealth(section.health.patience)
    self.scoring_health = health.ScoringHealth(
        section.health.max_unscored, section.health.unscored_patience)
    self.step_health = training.step_health(context)
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
    self.step_health.set_state(found.extras["health"])

  def save(
      self, saver: checkpoints.Checkpoints,
      metrics: dict[str, float] | None = None,
  ) -> None:
    """Saves what `restore` takes over, rollouts in flight included."""
    self._move_optimizer(offload.to_devices)  # A rollout may have been left.
    training.save(
        self.context, saver, self.state, self.step, {
            "problem_cursor": self.buffer.cursor.get_state(),
            "rollout_metrics": self.rollout_metrics, "health": (
                self.health.get_state() | self.scoring_health.get_state()
                | self.step_health.get_state())},
        rollouts=self.buffer.to_arrays() if self.experience is None
        else self.experience, metrics=metrics)

  @property
  def may_stop(self) -> bool:
    """No update is under way whose batch could not be learned from again."""
    return not self.sent

  def collect(self) -> None:
    """Samples, scores and packs the next batch of rollouts."""
    section, model = self.section, self.state.model
    batch = self.step // self.updates
    if "optimizer" in self.offload:  # Until there is something to learn from.
      self._move_optimizer(offload.to_host)
    collected = self.buffer.take(model, batch)
    started = time.monotonic()
    names = list(self.worker.rewards)
    rewards, groups = collected.rewards, collected.group_ids
    rows = np.flatnonzero(
        ~np.isnan(rewards) if rl_parts.needs_all(section, self.loss)
        else advantages_lib.informative(rewards, groups))
    advantages = advantages_lib.group_advantages(
        rewards, groups, std=section.loss.advantage_std,
        eps=section.loss.advantage_eps)
    penalty, divergence = self._kl_in_reward(collected, rows)
    advantages -= penalty
    experience = self._pack(collected, advantages, rows, batch)
    if self.updates > 1:
      experience = packing.add_logprobs(
          "old_logprobs", model, experience, self.loss)
    if self.loss.kl_coef:
      experience = packing.add_logprobs(
          "ref_logprobs", offload.to_devices(self.reference), experience,
          self.loss)
    self._move_optimizer(offload.to_devices)
    self.experience = experience
    self.rollout_metrics = divergence | self.buffer.metrics(
        ) | rollout_worker.metrics(
        collected, advantages, names)
    if self.buffer.staleness:
      self.rollout_metrics["staleness"] = float(self.buffer.behind(batch))
    self.prepare_seconds = time.monotonic() - started
    rl_parts.show_and_save(
        self.context, self.worker, collected, advantages, self.step)
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

  def update(self) -> dict[str, float]:
    """One optimizer update; returns its row of metrics.

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
    return self._finish(self.sent.pop(0))

  def _send(self, index: int) -> rl_parts.Sent:
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
    sums = None
    if used:
      self.state, sums = self._update(self.state, arrays, np.int32(used))
    else:
      self.state = state_lib.skip(self.state)
    return rl_parts.Sent(index, sums, time.monotonic() - started, work)

  def _finish(self, sent: rl_parts.Sent) -> dict[str, float]:
    """Waits for an update; its row of metrics."""
    started, first = time.monotonic(), sent.index == 0
    values: dict[str, float] = {"skipped_updates": 1.0}
    if sent.sums is not None:
      values = self._values(sharding.fetch(sent.sums), first)
    self.step += 1
    if self.step % self.updates == 0:
      self.experience = None
    self.flops = {"learn": sent.flops}
    if first:
      self.flops["rollout"] = self.buffer.flops
    learn = sent.seconds + time.monotonic() - started
    return values | self.rollout_metrics | self._timing(learn, first)

  def _values(self, sums, first: bool) -> dict[str, float]:
    """Metrics of an update; stops the run if it was not made."""
    sums = {name: float(value) for name, value in sums.items()}
    wrong = self.step_health.update(
        self.step + 1, sums, self.experience or {})
    kept = {name: sums[name] for name in ("loss", "grad_norm",
                                          "learning_rate")}
    if wrong:
      self.context.console.warning(f"step {self.step + 1} skipped: it {wrong}")
      return kept | {"skipped_updates": 1.0}
    sums.pop("spike", None)
    if first and sums["ratio_deviation_max"] != 0:
      raise AssertionError("The first ratio of a batch of rollouts is not 1.")
    return kept | {"skipped_updates": 0.0} | packing.metrics_of_sums(
        sums, fresh=first and not self.buffer.staleness)

  def _timing(self, learn: float, first: bool) -> dict[str, float]:
    seconds = {"learn": learn}
    if first:
      seconds |= self.buffer.seconds | {"prepare": self.prepare_seconds}
    total = sum(seconds.values())
    timing = {f"time/{name}": value for name, value in seconds.items()}
    timing["time/step"] = total
    if first:
      timing["perf/tokens_per_sec"] = (
          self.rollout_metrics["num_tokens"] / total)
    return timing

  def rates(
      self, monitor: Monitor, row: dict[str, float]) -> dict[str, float]:
    """Computes the monitor's rates for the row of an update.

    Sampling is one forward pass; passes for old and reference logprobs are
    no part of the model FLOPs.
    """
    work = self.flops
    rates = monitor.rates(
        flops=sum(work.values()), seconds=row["time/step"],
        tokens=row["num_tokens"] if "perf/tokens_per_sec" in row else None)
    rates |= monitor.learn_mfu(work["learn"], row["time/learn"])
    rates["time/compile"] = monitor.lap(1)["time/compile"]
    if self.step % self.section.log_every == 0:
      rates |= monitor.compare_hosts()
    return rates

  def _kl_in_reward(
      self, collected: rollout_worker.ScoredRollouts, rows: np.ndarray,
  ) -> tuple[np.ndarray, dict[str, float]]:
    """Computes the KL penalty on advantages [B], and the mean KL per token."""
    loss, rewards = self.section.loss, collected.rewards
    if not loss.kl_coef or loss.kl_in == "loss":
      return np.zeros(len(rewards), np.float32), {}
    everything = self._pack(
        collected, np.zeros(len(rewards), np.float32), rows, batch=0)
    estimate = packing.divergences(
        everything, self.state.model, offload.to_devices(self.reference),
        self.loss, loss.kl_estimator, len(rewards))
    penalty = loss.kl_coef * advantages_lib.centred(
        np.where(np.isnan(rewards), np.nan, estimate),
        collected.group_ids)
    tokens = collected.rollouts.loss_mask[rows].sum()
    return penalty.astype(np.float32), {
        "kl": float(estimate[rows].sum() / max(tokens, 1))}

  def _pack(self, collected, advantages, rows, batch: int) -> packing.Arrays:
    """Packs `rows`; whole groups go to one minibatch, drawn by the seed.

    The denominator of each minibatch is of all its completions that have a
    reward, also of those that are not among `rows`.
    """
    section, lengths = self.section, collected.rollouts.loss_mask.sum(1)
    order = random_streams.stream(
        self.context.config.seed, self.context.name, "minibatches",
        batch).permutation(section.num_groups)
    minibatch_of = np.empty(section.num_groups, int)
    minibatch_of[order] = np.arange(
        section.num_groups) % section.num_minibatches
    minibatch_of = np.repeat(minibatch_of, section.group_size)  # [B]
    scored = ~np.isnan(collected.rewards)
    numbers = range(section.num_minibatches)
    return packing.pack_experience(
        collected.rollouts, {
            "advantages": advantages,
            "token_weights": policy_lib.aggregation_weights(
                section.loss.aggregation, lengths)},
        [rows[minibatch_of[rows] == index] for index in numbers],
        [policy_lib.aggregation_denominator(
            section.loss.aggregation, lengths[scored & (minibatch_of == index)],
            max_tokens=section.rollout.max_tokens) for index in numbers],
        self.shapes)


STAGE = Stage(
    schema=config_schema.SCHEMA, run=run,
    check=rl_parts.check, programs=rl_programs.programs,
    memory=rl_programs.memory, work=rl_programs.work,
    padding={"prompts": rl_programs.padding,
             "completions": rl_programs.no_lengths},
    charts=rl_charts.CHARTS, leaves=("rows", "rollouts"))
