"""A kind of stage of one's own: after any token the model says one word.

The loss is the cross-entropy of that word and a z-loss, on rows of random
tokens.

  R: rows  T: length  V: vocabulary
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.config.keys import REQUIRED, Key, Section
from posttrain.config.stages import StageSchema
from posttrain.config.stages import training as keys
from posttrain.data import random_streams
from posttrain.stages import loop, training
from posttrain.stages.stage import Stage
from posttrain.train import microbatches


def loss(model, batch, *, word, z_coef):
  logits = model.logits(model(
      batch["tokens"], batch["positions"], batch["segment_ids"]))  # [R, T, V]
  z = jax.nn.logsumexp(logits, axis=-1)
  said = jnp.where(jnp.arange(logits.shape[-1]) == word, logits, 0).sum(-1)
  total = jnp.sum(z - said + z_coef * z**2)
  return total, jnp.float32(z.size), {"z": jnp.sum(z)}


class Body(loop.Body):

  def __init__(self, context, start):
    self.context, self.section = context, context.section
    optimizer, self.update = training.make_update(
        self.section, functools.partial(
            loss, word=self.section.word, z_coef=self.section.z_coef))
    self.state = training.make_state(context, start, optimizer)

  def train_step(self, number, span):
    rng = random_streams.stream(
        self.context.config.seed, self.context.name, "tokens", number)
    shape = self.section.rows, self.section.sequence_length
    batch = dict(
        tokens=rng.integers(self.state.trained.config.vocab_size, size=shape),
        positions=np.arange(shape[1]) + np.zeros(shape, int),
        segment_ids=np.ones(shape, int))
    self.state, values = self.update(
        self.state, microbatches.stack(batch, 1), 1)
    return loop.Update(values, batch, lambda found, skipped: {
        "loss": found["loss"], "z": found["z"] / found["denominator"]})


KEYS = Section(
    "Says one word.", word=Key(int, REQUIRED, "The word's id.", "[0, inf)"),
    z_coef=Key(float, 0.0, "Weight of the z-loss.", "[0, 1]"),
    num_steps=Key(int, REQUIRED, "Updates.", "[1, inf)"),
    rows=Key(int, REQUIRED, "Rows per update.", "[1, inf)"),
    sequence_length=Key(int, REQUIRED, "Tokens per row.", "[2, inf)"),
    **keys.weights(), **keys.optimizer("constant"), health=keys.health(),
    checkpoint=keys.checkpoint(), log_every=keys.LOG_EVERY)
STAGE = Stage(
    schema=StageSchema(KEYS, keys.CHECKS, trains=True),
    run=lambda context, start: loop.run(
        context, functools.partial(Body, context, start)))
