"""Two kinds of stages of a user's own, and a config that has both.

`STAGE` drills: each of its steps updates on rows of the same tokens. `BARE`
gives its keys and what it runs, and nothing else.
"""

import functools

import ml_collections
import numpy as np

from posttrain.config.keys import REQUIRED, Key, Section
from posttrain.config.stages import StageSchema
from posttrain.config.stages import training as keys
from posttrain.objectives.columns import Term
from posttrain.programs import abstract, program
from posttrain.stages import memory_estimate, training
from posttrain.stages.stage import Pass, Sizes, Stage
from posttrain.telemetry import charts, metrics
from posttrain.train import microbatches, step


def surprise(columns):
  logprobs = columns["logprobs"]
  return {"surprise": Term(-logprobs.sum(), np.float32(logprobs.size))}, {}


loss = functools.partial(step.evaluate, surprise, chunk=8)


def programs(stage):
  section, (model, paths) = stage.section, stage.trained
  optimizer, update = training.make_update(section, loss)
  state = abstract.state_of(model, optimizer, paths, None)
  shape, sharded = (section.rows, section.sequence_length), (
      microbatches.sharding.abstract)
  batch = microbatches.stack({name: np.zeros(shape, np.int32) for name in (
      "tokens", "positions", "segment_ids")}, 1, put=sharded)
  yield program.Program(
      stage.name, "update", functools.partial(update.lower, state, batch, 1),
      (state, batch), calls=1, unknown_trips=1)


def memory(section, compute, model):
  whole, arguments = memory_estimate.of_trained(section, compute, model)
  return Sizes(whole.config, arguments | dict(
      rows=section.rows, sequence_length=section.sequence_length),
      smaller={"training": {"rows": "fewer"}})


def run(context, model):
  with metrics.Writer(
      context.workdir.metrics, context.workdir.tensorboard, context.name,
      restored_step=0) as writer:
    for n in (1, 2):
      writer.write(n, {"surprise": 3.0 / n, "boredom": float(n)})
  context.workdir.finish(context.name, {"step": 2})
  return model


STAGE = Stage(
    schema=StageSchema(Section(
        "Drills.", rows=Key(int, REQUIRED, "Rows.", "[1, inf)"),
        num_steps=Key(int, 2, "Steps.", "[1, inf)"),
        sequence_length=Key(int, REQUIRED, "Tokens of a row.", "[2, inf)"),
        **keys.weights(), **keys.optimizer("constant"), health=keys.health()),
        trains=True),
    run=run, programs=programs, memory=memory,
    work=lambda section, mesh: [
        Pass(section.rows, section.sequence_length, times=1, backward=True)],
    charts=(charts.Chart("Surprise", {"surprise": "nats"}),),
    leaves=("rows",))
BARE = Stage(
    schema=StageSchema(Section("Looks.", count=Key(int, 3, "Times."))),
    run=lambda context, start: start)


def get_config():
  config = ml_collections.ConfigDict()
  config.model_overrides = dict(vocab_size=512, embed=64, head_dim=16)
  config.tokenizer = dict(
      train="posttrain.tasks.signs:corpus", model_type="word",
      symbols=("<think>", "</think>"))
  config.chat_template = "plain"
  config.thinking = dict(newline="")
  config.stages = ("drill", "look")
  config.drill = dict(
      kind=f"{__file__}:STAGE", rows=8, sequence_length=32, learning_rate=1e-3)
  config.look = dict(kind=f"{__file__}:BARE")
  return config
