"""What is timed: the programs of the stages, on shapes like theirs.

Tokens are random and never stop, so that every run does the same work; text,
files and rewards are left out.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import limits
from benchmarks.limits import Work
from posttrain.model import transformer
from posttrain.model.config import ModelConfig
from posttrain.objectives import policy as policy_objective
from posttrain.sampler import budget_tables, choice, rollouts, sampler
from posttrain.stages import sft
from posttrain.text import thinking
from posttrain.train import microbatches, optimizer, policy, step
from posttrain.train import state as state_lib


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Sizes of what is timed; the defaults are the quickstart's.

  Attributes:
    rows, length, segment: packed rows of an SFT step, and the examples in
      them.
    groups, group_size: prompts, and completions of each.
    prompt, completion: tokens.
    minibatches, microbatch_rows: of a GRPO step; rows hold `length` tokens.
    loss_chunk: positions whose logits exist at once.
  """

  rows: int = 4
  length: int = 256
  segment: int = 64
  groups: int = 24
  group_size: int = 8
  prompt: int = 12
  completion: int = 100
  minibatches: int = 2
  microbatch_rows: int = 8
  loss_chunk: int = 128


@dataclasses.dataclass(frozen=True)
class Timed:
  """One benchmark: `run` once is `tokens` tokens and `work`."""

  run: Callable[[], Any]
  tokens: int
  work: tuple[Work, ...]  # Parts that follow one another.


def _update(config: ModelConfig, loss: step.Loss):
  """A fresh state and the compiled update."""
  adamw = optimizer.make_optimizer(
      beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
  schedule = optimizer.make_schedule(
      schedule="constant", learning_rate=1e-4, warmup_steps=0, num_steps=1,
      final_learning_rate=0.0)
  state = state_lib.create(transformer.init(config, 0), adamw)
  return state, jax.jit(
      functools.partial(
          step.update, loss=loss, optimizer=adamw, schedule=schedule),
      donate_argnums=0)


def sft_step(config: ModelConfig, shapes: Shapes) -> Timed:
  """One update on rows that are packed full."""
  per_row = shapes.length // shapes.segment
  positions = np.tile(np.arange(shapes.segment), per_row)
  segment_ids = np.repeat(np.arange(1, per_row + 1), shapes.segment)
  rows = lambda x: np.tile(x.astype(np.int32), (shapes.rows, 1))
  tokens = np.random.default_rng(0).integers(
      0, config.vocab_size, (shapes.rows, positions.size), np.int32)
  batch = microbatches.stack({
      "tokens": tokens, "positions": rows(positions),
      "segment_ids": rows(segment_ids), "loss_mask": rows(positions) > 0}, 1)
  state, update = _update(config, functools.partial(
      sft.cross_entropy, chunk=shapes.loss_chunk))

  def run():
    nonlocal state
    state, metrics = update(state, batch, 1)
    return metrics

  return Timed(run, tokens.size, (limits.update(
      config, segments=shapes.rows * per_row, length=shapes.segment),))


class Generator:
  """Samples completions of one length for every prompt."""

  def __init__(self, config: ModelConfig, shapes: Shapes):
    self._shapes = shapes
    tables = budget_tables.BudgetTables.build(
        thinking.ThinkingIds(), (), np.zeros(config.vocab_size, bool),
        config.vocab_size)
    self._sampler = sampler.Sampler(
        ids=thinking.ThinkingIds(), tables=tables,
        params=choice.SamplingParams(temperature=1.0),
        max_prompt_tokens=shapes.prompt, chunk=shapes.completion)
    self._prompts = np.random.default_rng(0).integers(
        0, config.vocab_size, (shapes.groups, shapes.prompt)).tolist()

  def __call__(self, model: transformer.Transformer) -> rollouts.Rollouts:
    return self._sampler.generate(
        model, self._prompts, sampler.Limits(self._shapes.completion),
        prompt_id=range(self._shapes.groups),
        group_size=self._shapes.group_size, seed=0, stage="benchmark")


def _generation_work(config: ModelConfig, shapes: Shapes) -> Work:
  rows = shapes.groups * shapes.group_size
  work = limits.prefill(config, prompts=shapes.groups, length=shapes.prompt)
  # The first token comes from the prefill's logits; the last is not fed.
  for fed in range(shapes.completion - 1):
    work += limits.decode_step(
        config, rows=rows, context=shapes.prompt + fed)
  return work


def generation(config: ModelConfig, shapes: Shapes) -> Timed:
  """Prompts to completions, each prompt prefilled once for its group."""
  model, generate = transformer.init(config, 0), Generator(config, shapes)
  return Timed(
      lambda: generate(model),  # Its arrays are on the host by then.
      shapes.groups * shapes.group_size * shapes.completion,
      (_generation_work(config, shapes),))


def grpo_step(config: ModelConfig, shapes: Shapes) -> Timed:
  """A batch of rollouts, its old logprobs, and an update per minibatch."""
  loss = policy.PolicyLoss(
      function=policy_objective.policy_loss, temperature=1.0,
      chunk=shapes.loss_chunk, clip_low=0.2, clip_high=0.28)
  state, update = _update(config, loss)
  generate = Generator(config, shapes)
  completions = shapes.groups * shapes.group_size
  packing = policy.Shapes(
      length=shapes.length, rows=shapes.microbatch_rows,
      num_minibatches=shapes.minibatches,
      completions=completions // shapes.minibatches)
  advantages = np.where(np.arange(completions) % 2, 1, -1).astype(np.float32)
  ones = np.ones(completions, np.float32)
  minibatches = np.split(np.arange(completions), shapes.minibatches)

  def run():
    nonlocal state
    experience = policy.pack_experience(
        generate(state.model), {
            "advantages": advantages, "token_weights": ones,
            "token_shares": ones}, minibatches, packing)
    if shapes.minibatches > 1:
      experience = policy.add_logprobs(
          "old_logprobs", state.model, experience, loss)
    for index in range(shapes.minibatches):
      arrays, used = policy.minibatch(experience, index)
      if index == 0:  # The first ratio is against itself.
        arrays = {name: x for name, x in arrays.items()
                  if name != "old_logprobs"}
      state, metrics = update(state, arrays, np.int32(used))
    return metrics

  length = shapes.prompt + shapes.completion
  learn = limits.update(
      config, segments=completions // shapes.minibatches, length=length)
  work = [_generation_work(config, shapes)] + [learn] * shapes.minibatches
  if shapes.minibatches > 1:
    work.append(limits.update(
        config, segments=completions, length=length, times_forward=1))
  return Timed(run, completions * shapes.completion, tuple(work))


BENCHMARKS = {
    "sft": sft_step, "generation": generation, "grpo_step": grpo_step}
