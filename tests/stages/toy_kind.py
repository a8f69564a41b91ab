"""A kind of stage of one's own: the model learns to count, modulo a base."""

import functools

import numpy as np

from posttrain.config.keys import REQUIRED, Key, Section
from posttrain.config.stages import StageSchema
from posttrain.config.stages import training as keys
from posttrain.objectives.columns import Term, needs
from posttrain.stages import loop, memory_estimate, training
from posttrain.stages.stage import Pass, Sizes, Stage
from posttrain.telemetry.charts import Chart
from posttrain.train import step


@needs("entropy")
def objective(columns, *, entropy_coef):
  """Cross-entropy of every token, and a bonus for entropy."""
  logprobs, entropy = columns["logprobs"], columns["entropy"].sum()
  size = np.float32(logprobs.size)
  return {"surprise": Term(-logprobs.sum(), size),
          "bonus": Term(-entropy, size, entropy_coef)}, {"entropy": entropy}


def make_update(section, compute):
  return training.make_update(section, functools.partial(
      step.evaluate, functools.partial(
          objective, entropy_coef=section.entropy_coef),
      chunk=compute.loss_chunk))


def make_batch(section, number=0):
  row, at = np.indices((section.rows, section.sequence_length), np.int32)
  return dict(tokens=(number + row + at) % section.base, positions=at,
              segment_ids=np.ones_like(at))


class Body(loop.Body):

  def __init__(self, context, start):
    self.section = context.section
    optimizer, self.update = make_update(
        self.section, context.config.compute)
    self.state = training.make_state(context, start, optimizer)

  def train_step(self, number, span):
    batch = make_batch(self.section, number)
    self.state, values = self.update(
        self.state, step.stack(batch, 1), 1)
    return loop.Update(values, batch, lambda found, skipped: {
        "loss": found["loss"], "entropy": found["entropy"] / batch[
            "tokens"].size})


def memory(section, compute, model):
  whole, sizes = memory_estimate.of_trained(section, compute, model)
  return Sizes(
      whole.config, sizes | training.pick(section, "rows sequence_length"),
      smaller={"training": {"rows": "fewer"}})


STAGE = Stage(
    schema=StageSchema(Section(
        "Counts.", base=Key(int, REQUIRED, "The base.", "[2, inf)"),
        entropy_coef=Key(float, 0.0, "Weight of the bonus.", "[0, 1]"),
        num_steps=Key(int, REQUIRED, "Updates.", "[1, inf)"),
        rows=Key(int, REQUIRED, "Rows per update.", "[1, inf)"),
        sequence_length=Key(int, REQUIRED, "Tokens per row.", "[2, inf)"),
        **keys.shared("constant")), keys.CHECKS, trains=True),
    run=functools.partial(loop.run, Body),
    programs=lambda stage: [stage.update(
        *make_update(stage.section, stage.compute), make_batch(stage.section),
        1)],
    memory=memory, work=lambda section, mesh: [
        Pass(section.rows, section.sequence_length, times=1, backward=True)],
    charts=(Chart("Entropy", {"entropy": "nats"}),), leaves=("rows",))
