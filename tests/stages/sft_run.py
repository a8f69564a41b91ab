"""One SFT stage: a config for the command line, and set up as a pipeline does.

  posttrain train --config=tests/stages/sft_run.py --workdir=DIR
"""

import pathlib
import random

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from posttrain import config as config_lib
from posttrain import weights, workdir
from posttrain.model.transformer import Transformer
from posttrain.stages import sft
from posttrain.stages.run_context import RunContext
from posttrain.telemetry import console
from posttrain.text import thinking
from posttrain.train import checkpoints

HERE = "tests.stages.sft_run"
LENGTH = 32


def demonstrations(split: str, count: int) -> list[dict]:
  """Sums of two to five numbers, with their partial sums."""
  rng = random.Random(split)
  rows = []
  for _ in range(count):
    numbers = [rng.randint(0, 4) for _ in range(rng.randint(2, 5))]
    partial = [sum(numbers[:n]) for n in range(2, len(numbers) + 1)]
    rows.append({
        "prompt": " + ".join(map(str, numbers)) + " =",
        "completion": " ".join(map(str, partial))})
  return rows


def corpus() -> list[str]:
  return [f"{number} + =" for number in range(21)]


CONFIG = dict(
    model_overrides=dict(
        layers=2, embed=16, mlp=32, heads=4, kv_heads=2, head_dim=4),
    tokenizer=dict(
        train=f"{HERE}:corpus", model_type="word"),
    chat_template="plain",
    thinking=dict(end=""),
    stages=("cold_start",),
    cold_start=dict(
        kind="sft", num_steps=12, rows=8, sequence_length=LENGTH,
        learning_rate=3e-3, warmup_steps=2, weight_decay=0.1, log_every=1,
        data=dict(sources=(
            dict(task=f"{HERE}:demonstrations", args=dict(count=200)),)),
        eval_data=dict(sources=(dict(
            task=f"{HERE}:demonstrations", split="validation",
            args=dict(count=20)),)),
        eval_every=5, checkpoint=dict(every=4)),
)


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(CONFIG)


def make_context(path, assignments=()) -> RunContext:
  """A stage in the workdir `path`, on the current mesh."""
  config = config_lib.assign(CONFIG, assignments, "test")
  first = jax.process_index() == 0
  if first:
    workdir.create(path, config, devices=[])
  run = workdir.Workdir(path, is_writer=first)
  tokenizer = weights.tokenizer(config, run)
  return RunContext(
      name="cold_start", config=config, workdir=run,
      renderer=weights.make_renderer(config, tokenizer),
      thinking_ids=thinking.resolve(
          thinking.Thinking(**config.thinking), tokenizer),
      console=console.Console(quiet=not first), weights_of=lambda name: (
          weights.initial(config, weights.model_config(
              config, tokenizer.vocab_size))))


def start(context: RunContext) -> Transformer:
  return context.weights_of("init")


def run(path, assignments=()) -> Transformer:
  context = make_context(path, assignments)
  return sft.run(context, start(context))


def saved_state(path) -> dict[str, np.ndarray]:
  """Every array of the newest checkpoint, as Orbax itself reads it."""
  folder = pathlib.Path(path) / "cold_start" / "checkpoints"
  step = checkpoints.find_step(folder)
  tree = ocp.PyTreeCheckpointer().restore(folder / str(step) / "state")
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
