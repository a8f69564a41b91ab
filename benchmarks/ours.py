"""Our works: the programs of the stages, on the shapes of `shapes`.

  python -m benchmarks.ours --size=10m --work=sft

Text and files are left out; nothing stops a row early.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import serve, shapes
from benchmarks.shapes import Shape, Size
from posttrain import distributed, sharding
from posttrain.model import transformer
from posttrain.model.config import ModelConfig
from posttrain.objectives import advantages as advantages_lib
from posttrain.objectives import policy, supervised
from posttrain.rl import packing
from posttrain.rl.objective import PolicyObjective
from posttrain.sampler import budget_tables, rollouts, sampler, token_sampling
from posttrain.text import thinking
from posttrain.train import optimizer, step
from posttrain.train import state as state_lib

LOSS_CHUNK = 128  # Positions whose logits exist at once.
GRPO_ROWS = 2  # Of a microbatch; each holds a group behind its prompt.
# Without an accelerator, of two cores. A step of training keeps both busy on
# one device; the small products of decoding do not.
DEVICES = {"sft": 1, "generate": 2, "grpo": 2}


def model_config(size: Size) -> ModelConfig:
  """Makes the config that `docs/performance.md` advises for a CPU."""
  return ModelConfig(
      vocab_size=size.vocab_size, embed=size.embed, mlp=size.mlp,
      layers=size.layers, heads=size.heads, kv_heads=size.kv_heads,
      head_dim=size.head_dim, unroll=size.layers, attention="blocks",
      gradients="in_layout")


def random_model(config: ModelConfig) -> transformer.Transformer:
  """Makes random weights as the peers do: norms are one, all else normal."""
  draw = np.random.default_rng(0).standard_normal
  def fill(x: jax.Array) -> jax.Array:
    if (x == 1).all():  # A norm.
      return x
    values = shapes.INIT_STD * draw(x.shape, np.float32)
    return jax.device_put(values, x.sharding)

  return jax.tree.map(fill, transformer.init(config, 0))


def trainer(model: transformer.Transformer, loss: step.Loss):
  """A fresh state, which consumes the model, and the compiled update."""
  adamw = optimizer.make_optimizer(
      beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
  schedule = optimizer.make_schedule(
      schedule="constant", learning_rate=shapes.LEARNING_RATE, warmup_steps=0,
      num_steps=1, final_learning_rate=0.0)
  state = state_lib.create(model, adamw)
  return state, step.compile_update(functools.partial(
      step.update, loss=loss, optimizer=adamw, schedule=schedule))


def full_rows(shape: Shape, vocab_size: int) -> dict[str, jax.Array]:
  """A batch of one microbatch, each row of it one example."""
  tokens = np.array(shapes.tokens(
      shape.rows, shape.length, vocab_size), np.int32)
  positions = np.tile(np.arange(shape.length, dtype=np.int32),
                      (shape.rows, 1))
  return step.stack({
      "tokens": tokens, "positions": positions,
      "segment_ids": np.ones_like(tokens), "loss_mask": positions > 0}, 1)


def sft(config: ModelConfig, shape: Shape) -> Callable[[int], int]:
  """One update."""
  batch = full_rows(shape, config.vocab_size)
  state, update = trainer(
      random_model(config), functools.partial(
          step.evaluate, supervised.cross_entropy, chunk=LOSS_CHUNK))

  def run(number: int) -> int:
    nonlocal state
    state, metrics = jax.block_until_ready(update(state, batch, 1))
    # First tokens have no loss.
    return int(metrics["denominator/cross_entropy"]) + shape.rows

  return run


class Generator:
  """Samples completions of one length for every prompt."""

  def __init__(self, config: ModelConfig, shape: Shape):
    self._shape = shape
    tables = budget_tables.BudgetTables.of_ids(
        thinking.ThinkingIds(), (), np.zeros(config.vocab_size, bool))
    self._sampler = sampler.Sampler(
        tables=tables,
        params=token_sampling.SamplingParams(temperature=1.0),
        max_prompt_tokens=shape.prompt, chunk=shape.new)
    self._prompts = shapes.tokens(
        shape.prompts, shape.prompt, config.vocab_size)

  def __call__(
      self, model: transformer.Transformer, seed: int) -> rollouts.Rollouts:
    return self._sampler.generate(
        model, self._prompts, sampler.Limits(self._shape.new),
        prompt_id=range(self._shape.prompts),
        group_size=self._shape.samples, seed=seed, stage="benchmark")


def generate(config: ModelConfig, shape: Shape) -> Callable[[int], int]:
  """Prompts to completions, which are on the host in the end."""
  model, generator = random_model(config), Generator(config, shape)
  return lambda number: int(generator(model, number).lengths.sum())


def group_length(prompt: int, samples: int, new: int) -> int:
  """Tokens of a row that holds a group, as `rl.shared_prompts` lays it out.

  The prompt's last token is there for each sample, before its completion.
  """
  return prompt - 1 + samples * (1 + new)


def policy_loss() -> step.Loss:
  """The loss of GRPO, by its defaults."""
  return functools.partial(step.evaluate, PolicyObjective(
      policy.policy_loss, dict(clip_low=0.2, clip_high=0.2)),
      chunk=LOSS_CHUNK)


def pack(
    drawn: rollouts.Rollouts, advantages: np.ndarray, shape: packing.Shapes,
) -> packing.Arrays:
  """Packs all completions for one update, whose loss is the token mean."""
  packed = packing.pack_experience(
      drawn, drawn.prompt_id, [np.arange(len(drawn.tokens))], shape)
  ones = np.ones(packed["tokens"].shape, np.float32)
  return packed | {
      "token_weights": ones, "denominator_shares": ones,
      "advantages": packing.per_token(packed, drawn, np.broadcast_to(
          advantages[:, None], drawn.tokens.shape))}


def grpo(config: ModelConfig, shape: Shape) -> Callable[[int], int]:
  """Rollouts, their rewards and advantages, and one update on them."""
  state, update = trainer(random_model(config), policy_loss())
  generator = Generator(config, shape)
  count = shape.prompts * shape.samples
  shapes_of_rows = packing.Shapes(
      length=group_length(shape.prompt, shape.samples, shape.new),
      rows=GRPO_ROWS, num_minibatches=1, completions=count,
      share_prompts=True)

  def run(number: int) -> int:
    nonlocal state
    drawn = generator(state.model, number)
    rewards = np.array([
        shapes.rule_reward(row[:length]) for row, length in zip(
            drawn.tokens.tolist(), drawn.lengths, strict=True)])
    experience = pack(drawn, advantages_lib.group_advantages(
        rewards, drawn.prompt_id), shapes_of_rows)
    arrays, used = packing.minibatch(experience, 0)
    state, metrics = jax.block_until_ready(
        update(state, arrays, np.int32(used)))
    return int(metrics["denominator/policy"])

  return run


WORKS: dict[str, Callable[[ModelConfig, Shape], Callable[[int], int]]] = {
    "generate": generate, "sft": sft, "grpo": grpo}


def main() -> None:
  size, work, shape = serve.arguments(__doc__, shapes.WORKS)
  turns: Any = serve.Turns(shape.tokens)
  distributed.initialize(cpu_devices=DEVICES[work])
  with jax.set_mesh(sharding.make_mesh()):
    run = WORKS[work](model_config(size), shape)
    number = 0
    while turns.begin():
      turns.end(run(number))
      number += 1


if __name__ == "__main__":
  main()
