"""The training loop, which all kinds of training stages share.

Resuming, the rows of metrics, health of updates, checkpoints, preemption and
telemetry are here; a kind gives the `Body` of a step.

The host may run ahead of the devices: metrics stay there until a row is due at
`log_every`, a checkpoint or the end. Every step still gets its own row. Rows
up to a checkpoint's step are on disk before the checkpoint is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import jax
import numpy as np

from posttrain import distributed, sharding, weights
from posttrain.model.transformer import Transformer
from posttrain.stages import training
from posttrain.stages.run_context import RunContext
from posttrain.telemetry import metrics
from posttrain.telemetry.stage_telemetry import StageTelemetry
from posttrain.train import (
  checkpoint_integrity,
  checkpoints,
  health,
  preemption,
)
from posttrain.train import state as state_lib

Span = Callable[[str], AbstractContextManager[None]]
Row = dict[str, float]


@dataclasses.dataclass
class Update:
  """An update of the weights; its metrics may still be on the devices.

  Attributes:
    values: scalars on the devices; empty where there was nothing to learn
      from, and the weights stay what they are.
    batch: what the update was made of; kept in a file if it stops the run.
    row: (values, skipped) -> the step's row of metrics. Called once for each
      step, in their order.
    flops: of the model, on all devices.
    tokens: that the rate of tokens counts; None: the row has no rate.
    held_out: metrics of held-out data, after this update.
  """

  values: Mapping[str, Any]
  batch: Mapping[str, np.ndarray]
  row: Callable[[dict[str, float], bool], Row]
  flops: float = 0.0
  tokens: float | None = None
  held_out: Row = dataclasses.field(default_factory=dict)


class Body:
  """The step of a kind of stage, and what it carries from step to step.

  Attributes:
    state: weights, optimizer state and number of updates, as a subclass makes
      them at first. The loop puts a checkpoint's state here.
    runs_ahead: the host sends a step while the devices make earlier ones.
    eval_every: steps between two calls of `evaluate`, 0: at the end alone;
      None: never.
    headline: metrics of the progress line.
  """

  state: state_lib.TrainState
  runs_ahead: bool = True
  eval_every: int | None = None
  headline: tuple[str, ...] = ("loss",)

  def train_step(self, number: int, span: Span) -> Update:
    """Sends the update `number` (from 1) to the devices.

    Args:
      span: measures a part of the step, see `StageTelemetry.span`.

    Raises:
      Preempted: SIGTERM came; the step is dropped, and made again. The state
        is that after the step before, or `may_save` is false.
    """
    raise NotImplementedError

  @property
  def may_save(self) -> bool:
    """Tests if a start could go on from the state; SIGTERM then saves it.

    A checkpoint that is due is saved either way: the schema's checks keep
    `checkpoint.every` to steps at which it could.
    """
    return True

  def evaluate(self) -> Row:
    """Computes the metrics of held-out data."""
    return {}

  def get_state(self) -> dict[str, Any]:
    """JSON for the checkpoint; `health` may have counters of the body's."""
    return {}

  def arrays(self) -> Mapping[str, np.ndarray] | None:
    """Arrays for the checkpoint beside `state`, the same on every host."""
    return None

  def restore(self, found: checkpoints.Restored) -> None:
    """Restores what a checkpoint holds of `get_state` and `arrays`."""

  def ranks(self, row: Row) -> bool:
    """Tests if a checkpoint may be ranked by this row."""
    return True


def run(
    make_body: Callable[[RunContext, Transformer], Body], context: RunContext,
    start: Transformer,
) -> Transformer:
  """Trains to the last step, from the newest checkpoint if there is one.

  Args:
    make_body: makes the model, the optimizer and the data.
    start: what the stage starts from.

  Returns:
    The trained model.

  Raises:
    ValueError: the data, a problem or a reward is not what the config says.
    HealthError: an update was not made, and may not be skipped; or nothing
      is left to learn from.
    Preempted: SIGTERM came; the state is saved.
  """
  profile = context.config.profile
  traced = not profile.stages or context.name in profile.stages
  with StageTelemetry(
      context.name, context.directory, console=context.console,
      profile_steps=profile.steps if traced else (),
      is_writer=context.workdir.is_writer,
  ) as telemetry, open_checkpoints(context) as saver:
    body = make_body(context, start)
    Loop(context, body, telemetry, saver).train()
    with telemetry.span("checkpoint"):
      saver.wait()
  context.workdir.finish(context.name, {"step": context.section.num_steps})
  return body.state.model


class Loop:
  """One start of a training stage.

  Attributes:
    step: the last one that was made.
    pending: updates without a row yet, the newest last.
  """

  def __init__(
      self, context: RunContext, body: Body, telemetry: StageTelemetry,
      saver: checkpoints.Checkpoints):
    self._context, self._section = context, context.section
    self._body, self._telemetry, self._saver = body, telemetry, saver
    self._health = step_health(context)
    body.state, found = resume(context, saver, body.state)
    self.step = found.step if found else 0
    if found:
      body.restore(found)
      self._health.set_state(found.extras["health"])
    self.pending: list[Update] = []
    self._last_row: Row = {}
    self._window = metrics.Window()
    self._writer = metrics.Writer(
        context.workdir.metrics, context.workdir.tensorboard, context.name,
        restored_step=self.step, check=context.workdir.check_known_lease)
    self._progress = context.console.progress(
        context.name, self._section.num_steps, start=self.step)

  def train(self) -> None:
    """Makes all steps that are left."""
    self._telemetry.begin(self.step)
    with self._writer, self._progress:
      while self.step < self._section.num_steps:
        self._make_step()
        self._save_or_leave()

  def _make_step(self) -> None:
    """Makes one update, and writes the rows that are due after it."""
    number, body = self.step + 1, self._body
    try:
      with self._telemetry.step(number, lambda: body.state.step):
        update = body.train_step(number, self._telemetry.span)
    except preemption.Preempted as request:
      request.__traceback__ = None  # Its frames hold the rollout's arrays.
      self._leave_step()
    self.pending.append(update)
    self.step = number
    if body.eval_every is not None and self._due(body.eval_every):
      self._evaluate()
    if self._due(self._section.log_every) or not body.runs_ahead:
      self.flush()

  def _evaluate(self) -> None:
    # Updates under way are no part of an evaluation's time.
    with self._telemetry.span("device_wait"), sharding.waiting():
      jax.block_until_ready(self._body.state.step)
    with self._telemetry.span("evaluation"):
      self.pending[-1].held_out = self._body.evaluate()

  def _save_or_leave(self) -> None:
    """Saves a checkpoint where one is due; ends the process on SIGTERM."""
    # All hosts ask once a step, in the same place: they agree by the count.
    leaving = preemption.requested() and self._body.may_save and not self._last
    if leaving or self._due(self._section.checkpoint.every):
      self._save(ranked=not leaving)
    if leaving:
      self._leave(f"saved at step {self.step}")

  def _leave_step(self) -> NoReturn:
    """Ends the process where SIGTERM came within a step, which is dropped.

    The next start makes it again with the same random bits, which depend on
    ids alone. Where the state is ahead of the last step, that start goes back
    to the last checkpoint.

    Raises:
      Preempted: the updates made so far are saved.
    """
    kept = self._saver.latest_step() or 0
    if self._body.may_save and self.step > kept:
      kept = self.step
      self._save(ranked=False)
    self._leave(
        (f"saved at step {kept}" if kept else "nothing to save yet")
        + "; the step under way is dropped, and will be made again")

  def _leave(self, kept: str) -> NoReturn:
    with self._telemetry.span("checkpoint"):
      self._saver.wait()
    self._context.leave(kept)

  @property
  def _last(self) -> bool:
    return self.step == self._section.num_steps

  def _due(self, every: int) -> bool:
    """Tests if the step is one of `every`; 0 means at the end only."""
    return self._last or (every > 0 and self.step % every == 0)

  def flush(self) -> None:
    """Waits for the devices; checks and writes every row there is.

    Raises:
      HealthError: an update was not made, and may not be skipped.
    """
    if not self.pending:
      return
    pending, self.pending = self.pending, []
    with self._telemetry.span("device_wait"), sharding.waiting():
      fetched = jax.device_get([update.values for update in pending])
    timing = self._timing(pending)
    first = self.step - len(pending) + 1
    for number, (update, values) in enumerate(
        zip(pending, fetched, strict=True), start=first):
      self._last_row = row_of(
          self._context, self._health, number, update, values) | timing
      self._writer.write(number, self._last_row)
      self._window.add(self._last_row)
    self._show()

  def _timing(self, pending: list[Update]) -> Row:
    """Computes times and rates, which are means over these updates."""
    timing = self._telemetry.lap(len(pending))
    tokens = [u.tokens for u in pending if u.tokens is not None]
    timing |= self._telemetry.rates(
        tokens=sum(tokens) if tokens else None,
        flops=sum(update.flops for update in pending),
        seconds=timing["time/step"] * len(pending))
    if self.step % self._section.log_every == 0:
      timing |= self._telemetry.compare_hosts()
    return timing

  def _show(self) -> None:
    self._progress.update(self.step, **{
        name.rpartition("/")[2]: self._last_row.get(name, float("nan"))
        for name in self._body.headline})
    if self._due(self._section.log_every):
      self._context.console.table(
          f"{self._context.name} step {self.step}", self._window.means())
      self._window.clear()

  def _save(self, *, ranked: bool) -> None:
    """Saves a checkpoint, once the rows up to its step are written."""
    self.flush()
    body = self._body
    with self._telemetry.saving(self.step):
      extras = body.get_state()
      save(self._context, self._saver, body.state, self.step, extras | {
          "health": extras.get("health", {}) | self._health.get_state()},
          rollouts=body.arrays(), metrics=self._last_row
          if ranked and body.ranks(self._last_row) else None)


def row_of(
    context: RunContext, rule: health.StepHealth, number: int, update: Update,
    fetched: Mapping[str, Any],
) -> Row:
  """Builds a step's row, without its times.

  Args:
    rule: the health rule, which counts the step.
    fetched: `update.values`, on the host.

  Raises:
    HealthError: the update was not made, and may not be skipped.
  """
  values = {name: float(value) for name, value in fetched.items()}
  # A step with nothing to learn from neither ends nor lengthens a streak.
  wrong = rule.update(number, values, update.batch) if values else ""
  if wrong:
    context.console.warning(f"step {number} skipped: it {wrong}")
  row = update.row(values, bool(wrong)) | update.held_out
  if context.section.health.on_bad_step == "skip":
    row.setdefault("skipped_updates", float(bool(wrong) or not values))
  return row


def step_health(context: RunContext) -> health.StepHealth:
  """Makes the health rule for updates that were not made."""
  rule = context.section.health
  return health.StepHealth(
      context.directory, write=context.workdir.is_writer,
      max_skips=rule.max_skips if rule.on_bad_step == "skip" else 0)


def open_checkpoints(context: RunContext) -> checkpoints.Checkpoints:
  """The stage's checkpoints, kept as the config says."""
  return checkpoints.Checkpoints(
      context.workdir.checkpoints(context.name), **training.pick(
          context.section.checkpoint, "keep keep_best best_metric best_mode"))


def resume(
    context: RunContext, saver: checkpoints.Checkpoints,
    fresh: state_lib.TrainState,
) -> tuple[state_lib.TrainState, checkpoints.Restored | None]:
  """Restores the newest checkpoint; without one, the fresh state and None.

  `checkpoint.on_damaged` may allow an earlier one.

  Raises:
    DamagedError: it cannot be read, and no earlier one may take its place.
  """
  if saver.latest_step() is None:
    return fresh, None
  moving = state_lib.to_checkpoint(fresh)
  wanted = checkpoints.abstract(moving)
  for array in jax.tree.leaves(moving):
    array.delete()  # Room for what is read.
  found = None
  while found is None:
    try:
      found = saver.restore(wanted)
    except checkpoint_integrity.DamagedError as error:
      steps = saver.steps()
      if context.section.checkpoint.on_damaged == "error" or len(steps) == 1:
        raise
      kept = saver.set_aside(steps[-1])
      context.console.warning(
          f"{context.name}: {error} It is in {kept} now. GOING BACK from step "
          f"{steps[-1]} to step {steps[-2]}, since checkpoint.on_damaged is "
          "previous.")
  checkpoints.check_same(
      found, **_identity(context, weights.frozen_name(fresh.frozen)))
  context.console.line(f"{context.name}: resumed from step {found.step}")
  context.warn_of_missing_rows(found.step)
  return state_lib.from_checkpoint(fresh, found.tree), found


def save(
    context: RunContext, saver: checkpoints.Checkpoints,
    state: state_lib.TrainState, number: int, extras: dict[str, Any],
    **more: Any,
) -> None:
  """Saves the state with `extras` and the facts that a run must share.

  The rows of metrics up to here are on the disk before. Frozen weights are
  saved once, for all stages. For `**more` see `Checkpoints.save`.
  """
  distributed.on_first_host(context.workdir.check_lease)
  if context.workdir.is_writer:
    metrics.sync(context.workdir.metrics)
  frozen = weights.save_frozen(state.frozen, context.workdir)
  saver.save(
      number, state_lib.to_checkpoint(state),
      _identity(context, frozen) | extras, **more)


def _identity(context: RunContext, frozen: str) -> dict[str, Any]:
  """Lists the facts that a checkpoint and a run must share."""
  return {
      "seed": context.config.seed, "renderer_hash": context.renderer.hash,
      "plan": training.plan(
          context.section, context.config.compute).to_json(),
      "frozen": frozen}
