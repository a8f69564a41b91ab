"""GRPO: sample groups, score them, learn from what differs within a group.

One batch of rollouts gives `num_minibatches * num_epochs` optimizer updates;
`step` counts updates. The old logprobs of the ratio come from the training
program: those of the first update are its own (the ratio is exactly 1), the
others are computed once, before it. The loss is a mean over all completions of
a minibatch. Where it has no term but the policy's, completions of groups whose
rewards are all equal have no gradient: they count in the denominator, and their
forward pass is saved. An update whose minibatch holds no others is counted, and
leaves the weights as they are.

Reference: DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from posttrain import sharding
from posttrain.config.stages.rl import SCHEMA
from posttrain.config.stages.sampling import SINGLE_TURN
from posttrain.data import random_streams
from posttrain.data.problem_cursor import ProblemCursor
from posttrain.episodes.calls import Calls
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.rl import (
  objective,
  packing,
  rollout_buffer,
  rollout_worker,
  weight_sync,
)
from posttrain.stages import (
  episodes,
  journals,
  loop,
  problems,
  rl_programs,
  sampling,
  training,
)
from posttrain.stages.run_context import RunContext
from posttrain.stages.stage import Stage
from posttrain.telemetry import flops, hardware
from posttrain.train import checkpoints, health, preemption, trainable
from posttrain.train import state as state_lib


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
  """The step of the stage: rollouts, and updates from them.

  Attributes:
    state: parameters, optimizer state, step.
    step: updates made.
    experience: the packed rollouts in flight, or None between two batches.
  """

  runs_ahead = False
  headline = ("reward", "completions/mean_length")

  def __init__(
      self, calls: Calls, context: RunContext, start: Transformer):
    section = context.section
    self.context, self.section = context, section
    self.offload = context.config.compute.offload
    state_lib.check_offload(self.offload)
    self.updates = rl_programs.num_updates(section)
    self.worker = make_rollout_worker(context, calls)
    self.buffer = make_rollout_buffer(context, self.worker, start.config)
    self.prepare = rl_programs.make_preparation(
        section, loss_chunk=context.config.compute.loss_chunk)
    optimizer, self._update = training.make_update(section, self.prepare.loss)
    self.state = training.make_state(context, start, optimizer)
    self.reference = make_reference(
        context, self.state,
        fresh=start.config.lora != self.state.trained.config.lora
    ) if self.prepare.objective.needs_reference else None
    self.experience: packing.Arrays | None = None
    self.sent: list[Sent] = []
    self.rollout_metrics: dict[str, float] = {}
    self.prepare_seconds = 0.0
    self.health = health.RolloutHealth(**training.pick(
        section.health, "patience max_unscored unscored_patience"))
    self.step = 0

  def restore(self, found: checkpoints.Restored) -> None:
    """Restores what a checkpoint holds, rollouts in flight included."""
    self.step = found.step
    waiting = found.rollouts
    if not self.buffer.staleness:
      self.experience, waiting = waiting, None
    self.buffer.restore(found.extras["problem_cursor"], waiting)
    self.rollout_metrics = found.extras["rollout_metrics"]
    self.health.set_state(found.extras["health"])

  def get_state(self) -> dict[str, Any]:
    return {
        "problem_cursor": self.buffer.cursor.get_state(),
        "rollout_metrics": self.rollout_metrics,
        "health": self.health.get_state()}

  def arrays(self) -> packing.Arrays | None:
    """Returns the rollouts in flight, packed or waiting."""
    return (self.buffer.to_arrays() if self.experience is None
            else self.experience)

  def ranks(self, row: loop.Row) -> bool:
    """Tests for a score, and a metric that a skipped update may lack."""
    return row["frac_unscored"] < 1 and (
        self.section.checkpoint.best_metric in row
        or not row["skipped_updates"])

  @property
  def may_save(self) -> bool:
    """Tests that no updates of a batch are under way together."""
    return not self.sent

  def train_step(self, number: int, span: loop.Span) -> loop.Update:
    """Draws a batch of rollouts where none is in flight; sends an update."""
    del number
    if self.experience is None:
      self.collect()
    return self.update(span)

  def collect(self) -> None:
    """Samples, scores and packs the next batch of rollouts."""
    model, batch = self.state.model, self.step // self.updates
    if "optimizer" in self.offload:  # Until there is something to learn from.
      self._move_optimizer(state_lib.to_host)
    try:
      collected = self.buffer.take(model, batch)
    except preemption.Preempted as request:
      # Its frames hold the KV cache, beside which the optimizer may not fit.
      request.__traceback__ = None
      self._move_optimizer(state_lib.to_devices)  # What is saved is there.
      raise
    started = time.monotonic()
    prepared = self.prepare(
        collected.rollouts, collected.group_ids, collected.rewards, model,
        self.reference, random_streams.stream(
            self.context.config.seed, self.context.name, "minibatches", batch))
    self._move_optimizer(state_lib.to_devices)
    self.experience = prepared.experience
    self.rollout_metrics = {
        **prepared.metrics, **self.buffer.metrics(batch),
        **rollout_worker.metrics(
            collected, prepared.advantages, list(self.worker.rewards),
            turns=self.section.episode != SINGLE_TURN)}
    self.prepare_seconds = time.monotonic() - started
    show_and_save(
        self.context, self.worker, collected, prepared.advantages,
        self.step)
    self.health.update(self.step, self.rollout_metrics)

  def _move_optimizer(self, to: Callable[[Any], Any]) -> None:
    self.state = dataclasses.replace(
        self.state, opt_state=to(self.state.opt_state))

  def update(self, span: loop.Span) -> loop.Update:
    """Sends one optimizer update to the devices, and waits for it.

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
    sent, first, started = self.sent.pop(0), index == 0, time.monotonic()
    with span("device_wait"), sharding.waiting():
      jax.block_until_ready(sent.sums)
    learn = sent.seconds + time.monotonic() - started
    update = loop.Update(
        sent.sums, self.experience,
        functools.partial(self._row, sent.flops, first, learn),
        flops=sent.flops + (self.buffer.flops if first else 0),
        tokens=self.rollout_metrics["num_tokens"] if first else None)
    self.step += 1
    if self.step % self.updates == 0:
      self.experience = None
    return update

  def _send(self, index: int) -> Sent:
    """Starts an update; the next one begins with its state."""
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
      self, work: float, first: bool, learn: float, values: dict[str, float],
      skipped: bool,
  ) -> loop.Row:
    """Builds the row of an update, once it is made.

    Sampling is one forward pass; passes for old and reference logprobs are
    no part of the model FLOPs.

    Args:
      work: model FLOPs of the update.
      first: the update is the first of its batch of rollouts.
      learn: seconds of the update.
    """
    seconds = {"learn": learn}
    if first:
      seconds |= self.buffer.seconds | {"prepare": self.prepare_seconds}
    return self._metrics(values, first, skipped) | self.rollout_metrics | {
        f"time/{name}": value for name, value in seconds.items()
    } | hardware.find().mfu("perf/learn_mfu", work, learn)

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


def run(context: RunContext, start: Transformer) -> Transformer:
  """Trains to the last step, see `loop.run`; with the stage's workers."""
  with journals.kept(context), episodes.open_calls(context) as calls:
    return loop.run(functools.partial(Learner, calls), context, start)


def make_rollout_worker(
    context: RunContext, calls: Calls) -> rollout_worker.RolloutWorker:
  """Makes the worker with the task, rewards and sampler of the section."""
  section, rewards = context.section, rewards_of(context)
  return rollout_worker.RolloutWorker(
      sampler=episodes.make_sampler(context, calls),
      limits=sampling.make_limits(section.rollout),
      problems=problems.load_on_all_hosts(context),
      rewards=rewards, warn=context.console.warning,
      weights=section.reward_weights or (1.0,) * len(rewards),
      group_size=section.group_size, max_length=section.sequence_length,
      journal_of=journals.Journals(context).of_batch)


def make_rollout_buffer(
    context: RunContext, worker: rollout_worker.RolloutWorker,
    start: ModelConfig,
) -> rollout_buffer.RolloutBuffer:
  """Makes the empty buffer of a stage that starts from a model like `start`."""
  section, config, sync = context.section, context.config, None
  if config.mesh.roles == "split":
    _, sampling_mesh = sharding.roles_of(config.mesh)
    sync = weight_sync.WeightSync(weight_sync.wanted(
        start, training.plan(section, config.compute), sampling_mesh,
        weights_dtype=section.rollout.weights_dtype), sampling_mesh)
  updates = rl_programs.num_updates(section)
  return rollout_buffer.RolloutBuffer(
      worker, ProblemCursor(len(worker.problems), config.seed, context.name),
      num_groups=section.num_groups, num_batches=section.num_steps // updates,
      updates=updates, staleness=section.staleness, sync=sync)


def rewards_of(context: RunContext) -> dict[str, str]:
  """Lists the rewards by the names that metrics have, the verifier first.

  Raises:
    ValueError: two have one name.
  """
  names = context.section.rewards
  rewards = {name.rpartition(":")[2]: name for name in names}
  if len(rewards) < len(names):
    raise ValueError(
        f"{context.name}.rewards has two functions of one name: "
        f"{', '.join(names)}. Metrics are named by it; rename one.")
  return rewards


def check(context: RunContext) -> None:
  """Looks at problems and budgets before the first stage; on one host.

  Raises:
    ValueError: there are too few problems, one is not fit to be asked, the
      budgets contradict each other, or a key has no effect under the loss.
  """
  made = objective.make(**context.section.loss)
  if context.section.reference and not made.needs_reference:
    raise ValueError(
        f"{context.name}.reference is {context.section.reference!r} and has no "
        f"effect: loss.function={context.section.loss.function} does not "
        "declare ref_logprobs, and loss.kl_coef is 0.")
  rows = problems.load(context)
  if len(rows) < context.section.num_groups:
    raise ValueError(
        f"{context.name}.num_groups={context.section.num_groups} different "
        f"problems are needed for a batch, and the task has {len(rows)}. Lower "
        "num_groups.")
  problems.check_budgets(
      context, [sampling.make_limits(context.section.rollout)])
  rewards_of(context)  # Two may have one name.
  episodes.check(context)
  problems.check(context, rows, context.section.rewards, lambda row: [
      context.renderer.prompt_tokens(row)])


def make_reference(
    context: RunContext, state: state_lib.TrainState, *, fresh: bool,
) -> Transformer:
  """Makes the KL's reference; it shares all that the policy does not move.

  What it does not share waits in the hosts' memory if it is to be offloaded.

  Args:
    state: the policy.
    fresh: the policy's adapters are new, and so add nothing yet.
  """
  section, compute = context.section, context.config.compute
  model, dtype = state.model, compute.frozen_dtype
  if rl_programs.is_of_policy(section):
    reference = rl_programs.reference_of(
        section, model, dtype, trained=trainable.paths(state.trained),
        fresh=fresh)
  else:
    reference = trainable.at_rest(
        context.weights_of(section.reference), (), dtype)
  if "reference" in compute.offload:
    reference = state_lib.to_host(reference, but=model)
  return reference


def show_and_save(
    context: RunContext, worker: rollout_worker.RolloutWorker,
    collected: rollout_worker.ScoredRollouts, advantages: np.ndarray, step: int,
) -> None:
  """Saves a batch's completions, and shows one, where it is due."""
  section, updates = context.section, rl_programs.num_updates(context.section)
  due = lambda every: every and step // updates % -(-every // updates) == 0
  if not (due(section.save_rollouts_every) or due(section.show_sample_every)):
    return
  records = rollout_worker.records(
      collected, advantages, list(worker.rewards), worker, step)
  if due(section.save_rollouts_every):
    context.workdir.write_text(
        pathlib.Path(context.name, "rollouts", f"step_{step:06d}.jsonl"),
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records))
  if due(section.show_sample_every):
    row = records[0]
    context.console.sample(
        f"{context.name} step {step}", row["segments"],
        prompt=row["prompt"], facts={
            "reward": "no score" if row["reward"] is None
            else row["reward"], "advantage": row["advantage"],
            "finish": row["finish_reason"],
            "thinking tokens": row["think_length"]})


STAGE = Stage(
    schema=SCHEMA, run=run, check=check,
    programs=rl_programs.programs, memory=rl_programs.memory,
    work=rl_programs.work, padding={
        "prompts": rl_programs.padding,
        "completions": rl_programs.no_lengths},
    charts=rl_programs.CHARTS, leaves=("rows", "rollouts"))
