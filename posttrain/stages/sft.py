"""Supervised fine-tuning: packed examples -> token cross-entropy -> an update.

A step takes one global batch of packed rows, cut into microbatches. The loss
is the mean over the target tokens of the whole batch: numerator and
denominator are added up before the one division.

The host runs ahead of the devices: metrics stay there until a row is due at
`log_every`, a checkpoint or the end. Every step still gets its own row. Rows
up to a checkpoint's step are on disk before the checkpoint is.

  M: microbatches  R: rows of one, over all devices  T: length
"""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import config_dict

from posttrain import sharding
from posttrain.config.stages import sft as config_schema
from posttrain.data import batches as batches_lib
from posttrain.model.transformer import Transformer
from posttrain.objectives.masked import cross_entropy_sum, masked_sum
from posttrain.stages import sft_charts, sft_programs, training
from posttrain.stages.monitor import Monitor
from posttrain.stages.run_context import RunContext
from posttrain.stages.stage import Stage
from posttrain.telemetry import console as console_lib
from posttrain.telemetry import flops, metrics
from posttrain.text import render
from posttrain.train import forward, microbatches, preemption, step
from posttrain.train import state as state_lib

Sums = dict[str, jax.Array]


def run(context: RunContext, model: Transformer) -> Transformer:
  """Trains to the last step, from the newest checkpoint if there is one.

  Args:
    context: the stage's config and places.
    model: what to start from. Its buffers are consumed.

  Returns:
    The trained model.

  Raises:
    ValueError: the data has what the config does not allow.
    HealthError: an update was not made, and may not be skipped.
    Preempted: SIGTERM came; the state is saved.
  """
  section = context.section
  with Monitor(context) as monitor, training.open_checkpoints(
      context) as saver:
    batches, held_out = read_data(
        section, context.renderer, seed=context.config.seed,
        stage=context.name)
    model, trained = training.prepare(context, model)
    describe(context, batches, held_out)
    optimizer, update, sums = make_programs(
        section, loss_chunk=context.config.compute.loss_chunk)
    state = state_lib.create(
        model, optimizer, trained, training.spike_rule(section))
    state, found = training.resume(context, saver, state)
    start = 0 if found is None else found.step
    log = Log(context, monitor, start, functools.partial(
        flops.of_batch, model.config, trained=training.trained_share(state)))
    if found is not None:
      batches.set_state(found.extras["data"])
      log.set_state(found.extras)
    latest = lambda: state.step
    monitor.begin(start)
    with log:
      for number in range(start + 1, section.num_steps + 1):
        with monitor.step(number, latest):
          with monitor.span("input_wait"):
            batch = next(batches)
          with monitor.span("dispatch"):
            state, values = update(
                state, microbatches.stack(batch, section.num_microbatches),
                section.num_microbatches)
        log.add(number, values, batch)
        last = number == section.num_steps
        if held_out is not None and training.due(
            number, section.eval_every, last):
          # The updates under way are not its time.
          with monitor.span("device_wait"), sharding.waiting():
            jax.block_until_ready(state.step)
          with monitor.span("evaluation"):
            log.extend(evaluate(
                sums, state.model, held_out, section.num_microbatches))
        leaving = preemption.requested() and not last
        saving = leaving or training.due(
            number, section.checkpoint.every, last)
        if saving or number % section.log_every == 0:
          log.flush()
        if saving:
          with monitor.saving(number):
            training.save(
                context, saver, state, number,
                {"data": batches.get_state(), **log.get_state()},
                metrics=None if leaving else log.last_row)
        if leaving:
          with monitor.span("checkpoint"):
            training.leave(context, saver, number)
    with monitor.span("checkpoint"):
      saver.wait()
  context.workdir.finish(context.name, {"step": section.num_steps})
  return state.model


def make_programs(
    section: config_dict.ConfigDict, *, loss_chunk: int,
) -> tuple[
    optax.GradientTransformation, step.CompiledUpdate, jax.stages.Wrapped]:
  """The optimizer, the compiled update and the compiled held-out loss."""
  loss = functools.partial(cross_entropy, chunk=loss_chunk)
  optimizer, update = training.make_update(section, loss)
  return optimizer, update, jax.jit(functools.partial(held_out_sums, loss))


def read_data(
    section: config_dict.ConfigDict, renderer: render.Renderer, *, seed: int,
    stage: str,
) -> tuple[batches_lib.Batches, batches_lib.EvalBatches | None]:
  """The training stream, and the held-out data if the config names any."""
  data = section.data
  handling = "on_overlong on_no_target on_malformed packing"
  shape = training.pick(section, "sequence_length rows")
  batches = batches_lib.make_batches(
      data.sources, renderer, seed=seed, stage=stage,
      **shape, **training.pick(data, handling), shuffle=data.shuffle)
  if not section.eval_data.sources:
    return batches, None
  return batches, batches_lib.eval_batches(
      section.eval_data.sources, renderer,
      **shape, **training.pick(section.eval_data, handling))


def cross_entropy(
    model: Transformer, batch: dict[str, jax.Array], *, chunk: int,
) -> tuple[jax.Array, jax.Array, Sums]:
  """Negative log-likelihood of the target tokens of [R, T] arrays.

  Returns:
    Numerator and denominator (target tokens), and sums over these tokens.
  """
  logprobs, entropy, traffic = forward.token_logprobs(
      model, batch, chunk=chunk)
  return *cross_entropy_sum(logprobs, batch["loss_mask"]), {
      "entropy": masked_sum(entropy, batch["loss_mask"]),
      **(traffic.sums() if traffic else {})}


def held_out_sums(
    loss: step.Loss, model: Transformer, batch: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Numerator and denominator of [M, R, T] arrays, without a gradient."""
  numerators, denominators, _ = jax.lax.map(
      lambda microbatch: loss(model, microbatch), batch)
  return numerators.sum(), denominators.sum()


def evaluate(
    sums: Callable, model: Transformer,
    held_out: Iterable[batches_lib.Batch], num_microbatches: int,
) -> dict[str, float]:
  """Mean loss over all target tokens of the held-out data."""
  start = time.perf_counter()
  found = [
      sums(model, microbatches.stack(batch, num_microbatches))
      for batch in held_out]
  with sharding.waiting():
    numerators, denominators = np.array(jax.device_get(found), np.float64).T
  return {
      "eval_loss": float(numerators.sum() / denominators.sum()),
      "time/eval": time.perf_counter() - start}


class Log:
  """Rows that wait on the devices, and what is shown of them."""

  def __init__(
      self, context: RunContext, monitor: Monitor, start: int,
      count: Callable[[batches_lib.Batch], float],
  ):
    """
    Args:
      start: the step that the rows follow.
      count: gives the model FLOPs of a batch.
    """
    self.last_row: dict[str, float] = {}
    self._num_tokens = 0  # Trained on so far, padding apart.
    self._context, self._monitor, self._count = context, monitor, count
    self._health = training.step_health(context)
    self._waiting: list[tuple[int, Sums, batches_lib.Batch, dict]] = []
    self._window = metrics.Window()
    self._writer = metrics.Writer(
        context.workdir.metrics, context.workdir.tensorboard, context.name,
        restored_step=start, check=context.workdir.check_known_lease)
    self._progress: console_lib.Progress = context.console.progress(
        context.name, context.section.num_steps, start=start)

  def get_state(self) -> dict[str, Any]:
    """For the checkpoint's extras."""
    return {"num_tokens": self._num_tokens, "health": self._health.get_state()}

  def set_state(self, extras: dict[str, Any]) -> None:
    self._num_tokens = extras["num_tokens"]
    self._health.set_state(extras["health"])

  def __enter__(self) -> "Log":
    self._progress.__enter__()
    return self

  def __exit__(self, *exception: Any) -> None:
    self._progress.__exit__(*exception)
    self._writer.close()

  def add(self, number: int, values: Sums, batch: batches_lib.Batch) -> None:
    """Takes a step's metrics without waiting for them."""
    self._waiting.append((number, values, batch, {}))

  def extend(self, row: dict[str, float]) -> None:
    """Adds to the row of the newest step."""
    self._waiting[-1][-1].update(row)

  def flush(self) -> None:
    """Waits for the devices; checks and writes every row there is.

    Raises:
      HealthError: an update was not made, and may not be skipped.
    """
    waiting, self._waiting = self._waiting, []
    with self._monitor.span("device_wait"), sharding.waiting():
      fetched = jax.device_get([values for _, values, _, _ in waiting])
    timing = self._timing([batch for _, _, batch, _ in waiting])
    if waiting[-1][0] % self._context.section.log_every == 0:
      timing |= self._monitor.compare_hosts()
    for (number, _, batch, more), values in zip(waiting, fetched, strict=True):
      wrong = self._health.update(number, values, batch)
      if wrong:
        self._context.console.warning(f"step {number} skipped: it {wrong}")
      self.last_row = self._row(values, batch) | timing | more
      if self._context.section.health.on_bad_step == "skip":
        self.last_row["skipped_updates"] = float(bool(wrong))
      self._writer.write(number, self.last_row)
      self._window.add(self.last_row)
      if number % self._context.section.log_every == 0:
        self._context.console.table(
            f"{self._context.name} step {number}", self._window.means())
        self._window.clear()
    self._progress.update(number, loss=self.last_row["loss"])

  def _timing(self, batches: list[batches_lib.Batch]) -> dict[str, float]:
    timing = self._monitor.lap(len(batches))
    seconds = timing["time/step"] * len(batches)
    tokens = sum(
        int(np.count_nonzero(batch["segment_ids"])) for batch in batches)
    return timing | self._monitor.rates(
        tokens=tokens, flops=sum(map(self._count, batches)), seconds=seconds)

  def _row(
      self, fetched: Sums, batch: batches_lib.Batch) -> dict[str, float]:
    values = {name: float(value) for name, value in fetched.items()}
    tokens = np.count_nonzero(batch["segment_ids"])
    self._num_tokens += int(tokens)
    return {
        **{name: values[name]
           for name in ("loss", "grad_norm", "learning_rate")},
        "entropy": values["entropy"] / values["denominator"],
        "num_tokens": self._num_tokens,
        "target_frac": values["denominator"] / tokens,
        "pad_frac": 1 - tokens / batch["tokens"].size,
        **{name: value for name, value in values.items()
           if name.startswith("router/")}}


def describe(
    context: RunContext, batches: batches_lib.Batches,
    held_out: batches_lib.EvalBatches | None,
) -> None:
  """Writes the data's report; shows the first example."""
  report = {"data": batches.report}
  if held_out is not None:
    report["eval_data"] = held_out.report
  context.workdir.write_json(f"{context.name}/data_report.json", report)
  for text in batches.warnings + (held_out.warnings if held_out else []):
    context.console.warning(text)
  context.console.example(
      f"{context.name}: first example", *batches.first_example,
      decode=context.renderer.tokenizer.decode)


STAGE = Stage(
    schema=config_schema.SCHEMA, run=run,
    programs=functools.partial(sft_programs.programs, make_programs),
    memory=sft_programs.memory, work=sft_programs.work,
    padding={"packed rows": functools.partial(
        sft_programs.padding, read_data)},
    charts=sft_charts.CHARTS, leaves=("rows",))
