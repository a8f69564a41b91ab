"""Supervised fine-tuning: packed examples -> token cross-entropy -> an update.

A step takes one global batch of packed rows, cut into microbatches. The loss
is the mean over the target tokens of the whole batch: numerator and
denominator are added up before the one division.

  M: microbatches  R: rows of one, over all devices  T: length
"""

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import config_dict

from posttrain import sharding
from posttrain.config.stages.sft import SCHEMA
from posttrain.data import batches as batches_lib
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.objectives import supervised
from posttrain.programs.program import SCORING, TRAINING, Program
from posttrain.stages import loop, memory_estimate, training
from posttrain.stages.run_context import RunContext
from posttrain.stages.stage import Pass, PlannedStage, Sizes, Stage
from posttrain.telemetry import flops
from posttrain.telemetry.charts import LEARNING, MACHINE, Chart
from posttrain.text import render
from posttrain.train import checkpoints, step


class Body(loop.Body):
  """One batch of packed rows a step."""

  def __init__(self, context: RunContext, start: Transformer):
    section = context.section
    self._section = section
    self._batches, self._held_out = read_data(
        section, context.renderer, seed=context.config.seed,
        stage=context.name)
    optimizer, self._update, self._sums = make_programs(
        section, loss_chunk=context.config.compute.loss_chunk)
    self.state = training.make_state(context, start, optimizer)
    describe(context, self._batches, self._held_out)
    if self._held_out is not None:
      self.eval_every = section.eval_every
    self._flops = functools.partial(
        flops.of_batch, self.state.model.config,
        trained=training.trained_share(self.state))
    self._num_tokens = 0  # Trained on so far, padding apart.

  def train_step(self, number: int, span: loop.Span) -> loop.Update:
    del number
    count = self._section.num_microbatches
    with span("input_wait"):
      batch = next(self._batches)
    with span("dispatch"):
      self.state, values = self._update(
          self.state, step.stack(batch, count), count)
    return loop.Update(
        values, batch, functools.partial(self._row, batch),
        flops=self._flops(batch),
        tokens=int(np.count_nonzero(batch["segment_ids"])))

  def _row(
      self, batch: batches_lib.Batch, values: dict[str, float], skipped: bool,
  ) -> loop.Row:
    del skipped
    tokens = np.count_nonzero(batch["segment_ids"])
    targets = values["denominator/cross_entropy"]
    self._num_tokens += int(tokens)
    return {
        **{name: values[name]
           for name in ("loss", "grad_norm", "learning_rate")},
        "entropy": values["entropy"] / targets,
        "num_tokens": self._num_tokens,
        "target_frac": targets / tokens,
        "pad_frac": 1 - tokens / batch["tokens"].size,
        **{name: value for name, value in values.items()
           if name.startswith("router/")}}

  def evaluate(self) -> loop.Row:
    """Computes the mean loss over all target tokens of the held-out data."""
    assert self._held_out is not None
    start = time.perf_counter()
    found = [
        self._sums(self.state.model, step.stack(
            batch, self._section.num_microbatches))
        for batch in self._held_out]
    with sharding.waiting():
      numerators, denominators = np.array(jax.device_get(found), np.float64).T
    return {
        "eval_loss": float(numerators.sum() / denominators.sum()),
        "time/eval": time.perf_counter() - start}

  def get_state(self) -> dict[str, Any]:
    return {"data": self._batches.get_state(), "num_tokens": self._num_tokens}

  def restore(self, found: checkpoints.Restored) -> None:
    self._batches.set_state(found.extras["data"])
    self._num_tokens = found.extras["num_tokens"]


run = functools.partial(loop.run, Body)


def make_programs(
    section: config_dict.ConfigDict, *, loss_chunk: int,
) -> tuple[
    optax.GradientTransformation, step.CompiledUpdate, jax.stages.Wrapped]:
  """The optimizer, the compiled update and the compiled held-out loss."""
  loss = functools.partial(
      step.evaluate, supervised.cross_entropy, chunk=loss_chunk)
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


def held_out_sums(
    loss: step.Loss, model: Transformer, batch: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Numerator and denominator of [M, R, T] arrays, without a gradient."""
  terms, _ = jax.lax.map(lambda microbatch: loss(model, microbatch), batch)
  term = terms["cross_entropy"]
  return term.numerator.sum(), term.denominator.sum()


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


def programs(stage: PlannedStage) -> Iterator[Program]:
  """Yields the update, and the held-out loss where there is held-out data."""
  section = stage.section
  optimizer, update, sums = make_programs(
      section, loss_chunk=stage.compute.loss_chunk)
  program = stage.update(
      optimizer, update, batches_lib.empty(**training.pick(
          section, "rows sequence_length")), section.num_microbatches)
  yield program
  if section.eval_data.sources:
    state, batch = program.arguments
    yield Program(
        stage.name, "held_out", functools.partial(
            sums.lower, state.model, batch), (state.model, batch), SCORING,
        {"optimizer": state.opt_state})


def memory(
    section: config_dict.ConfigDict, compute: config_dict.ConfigDict,
    model: ModelConfig,
) -> Sizes:
  """Weights, optimizer and one microbatch."""
  whole, arguments = memory_estimate.of_trained(section, compute, model)
  rows = {"rows": "fewer", "sequence_length": "shorter"}
  return Sizes(
      whole.config, arguments | dict(
          rows=_rows(section), sequence_length=section.sequence_length),
      batch_tokens=section.rows * section.sequence_length,
      smaller={
          "training": {"num_microbatches": "more parts, each with fewer rows",
                       **rows},
          "optimizer": memory_estimate.smaller_moments(section),
          "batch": rows})


def work(
    section: config_dict.ConfigDict, mesh: sharding.MeshSizes) -> list[Pass]:
  """The microbatches of one update."""
  del mesh
  return [Pass(_rows(section), section.sequence_length,
               times=section.num_microbatches, backward=True)]


def _rows(section: config_dict.ConfigDict) -> int:
  """Rows of one microbatch."""
  return -(-section.rows // section.num_microbatches)


def padding(
    stage: PlannedStage, renderer: render.Renderer,
    meshes: Mapping[str, sharding.MeshSizes],
) -> tuple[float, str]:
  """Packs the real data, as the stage would."""
  section, parts = stage.section, meshes[TRAINING].batch
  packed, _ = read_data(
      section, renderer, seed=stage.setup.config.seed, stage=stage.name)
  share = packed.report["padding_share"]
  multiple = section.num_microbatches * parts
  rows = -(-section.rows // multiple) * multiple
  text = f"{share:.1%} in the {section.rows} rows of the config's data"
  if rows > section.rows:
    text += f", and {rows - section.rows} empty rows for a mesh of {parts}"
  return 1 - (1 - share) * section.rows / rows, text


CHARTS = (
    Chart("Loss", {"loss": "training", "eval_loss": "held out"},
          caption="Mean negative log-likelihood per target token."),
    Chart("Entropy", {"entropy": "entropy"},
          caption="Of the next-token distribution, on target tokens."),
    *LEARNING,
    Chart("Tokens", {"target_frac": "in the loss", "pad_frac": "padding"},
          unit="share"),
    Chart("Throughput", {"perf/tokens_per_sec": "tokens/s"}),
    Chart("Time", {"time/step": "step", "time/eval": "evaluation"},
          unit="seconds"),
    Chart("Where a step's time goes", {
        "time/input_wait": "input", "time/dispatch": "host",
        "time/device_wait": "waiting for devices",
        "time/compile": "compiling"}, unit="seconds", stacked=True),
    *MACHINE,
)
STAGE = Stage(
    schema=SCHEMA, run=run, programs=programs, memory=memory, work=work,
    padding={"packed rows": padding}, charts=CHARTS, leaves=("rows",))
