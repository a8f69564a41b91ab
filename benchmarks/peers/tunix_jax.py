"""Tunix: its sampler, its SFT trainer and its GRPO learner.

Sampled with top_p=1.0, since None means greedy, and with a new seed for each
call; a step is over when its weights are there.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as llama3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import peft_trainer
from tunix.sft import utils as sft_utils

from benchmarks import serve, shapes


@dataclasses.dataclass(frozen=True)
class Words:
  """A word for each id; end and padding are ids that no model draws."""

  vocab_size: int

  def encode(self, text: str, **unused) -> list[int]:
    return shapes.ids(text)

  def decode(self, ids, **unused) -> str:
    return shapes.text([int(i) for i in ids])

  def bos_id(self) -> int:
    return 0  # Which the sampler reads as "none".

  def eos_id(self) -> int:
    return self.vocab_size

  def pad_id(self) -> int:
    return self.vocab_size + 1


def make_model(size: shapes.Size) -> llama3.Llama3:
  model = llama3.Llama3(
      llama3.ModelConfig(
          num_layers=size.layers, vocab_size=size.vocab_size,
          embed_dim=size.embed, hidden_dim=size.mlp, num_heads=size.heads,
          head_dim=size.head_dim, num_kv_heads=size.kv_heads,
          rope_theta=10_000, norm_eps=1e-6, weight_tying=True),
      rngs=nnx.Rngs(0))
  drawn = np.random.default_rng(0)
  state = nnx.state(model)
  nnx.update(model, jax.tree.map(
      lambda x: x if x.ndim == 1 else jnp.asarray(
          shapes.INIT_STD * drawn.standard_normal(x.shape, np.float32)),
      state))
  assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {
      jnp.dtype("float32")}
  return model


def optimizer() -> optax.GradientTransformation:
  return optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(shapes.LEARNING_RATE, weight_decay=0.1))


def prompts_of(size: shapes.Size, shape: shapes.Shape) -> list[str]:
  return [shapes.text(ids) for ids in shapes.tokens(
      shape.prompts, shape.prompt, size.vocab_size)]


def generate(size: shapes.Size, shape: shapes.Shape) -> None:
  sampler = sampler_lib.Sampler(
      make_model(size), Words(size.vocab_size), sampler_lib.CacheConfig(
          cache_size=shape.prompt + shape.new, num_layers=size.layers,
          num_kv_heads=size.kv_heads, head_dim=size.head_dim))
  prompts = prompts_of(size, shape)
  turns = serve.Turns(shape.tokens)
  for seed in itertools.count():
    if not turns.begin():
      return
    found = sampler(
        prompts, max_generation_steps=shape.new,
        max_prompt_length=shape.prompt, temperature=1.0, top_p=1.0, seed=seed)
    turns.end(sum(len(tokens) for tokens in found.tokens))


def sft(size: shapes.Size, shape: shapes.Shape) -> None:
  model = make_model(size)
  trainer = peft_trainer.PeftTrainer(
      model, optimizer(),
      peft_trainer.TrainingConfig(eval_every_n_steps=10**6))
  trainer = trainer.with_gen_model_input_fn(lambda batch: {
      "input_tokens": batch.input_tokens, "input_mask": batch.input_mask,
      "positions": sft_utils.build_positions_from_mask(batch.input_mask),
      "attention_mask": sft_utils.make_causal_attn_mask(batch.input_mask)})
  tokens = np.array(shapes.tokens(
      shape.rows, shape.length, size.vocab_size), np.int32)
  batch = peft_trainer.TrainingInput(
      input_tokens=tokens, input_mask=np.ones(tokens.shape, bool))

  def batches():
    for _ in serve.runs(shape.tokens):
      yield batch
      jax.block_until_ready(nnx.state(model))

  trainer.train(batches())


def grpo(size: shapes.Size, shape: shapes.Shape) -> None:
  model = make_model(size)
  mesh = jax.make_mesh(
      (1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  rollout = base_rollout.RolloutConfig(
      max_tokens_to_generate=shape.new, max_prompt_length=shape.prompt,
      temperature=1.0, top_p=1.0, kv_cache_size=shape.prompt + shape.new)
  cluster = rl_cluster.RLCluster(
      actor=model, tokenizer=Words(size.vocab_size),
      cluster_config=rl_cluster.ClusterConfig(
          role_to_mesh=dict.fromkeys(
              (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE,
               rl_cluster.Role.ROLLOUT), mesh),
          training_config=rl_cluster.RLTrainingConfig(
              actor_optimizer=optimizer(), eval_every_n_steps=10**6,
              max_steps=10_000, mini_batch_size=shape.prompts,
              train_micro_batch_size=shape.prompts),
          rollout_config=rollout))

  def reward(prompts, completions, **unused):
    found = [shapes.ids(completion) for completion in completions]
    lengths = {len(completion) for completion in found}
    if lengths != {shape.new}:
      raise RuntimeError(f"Completions of {lengths}, not {shape.new}, tokens.")
    return [shapes.rule_reward(completion) for completion in found]

  learner = grpo_learner.GRPOLearner(
      rl_cluster=cluster, reward_fns=reward,
      algo_config=grpo_learner.GRPOConfig(
          num_generations=shape.samples, num_iterations=1, beta=0.0))
  prompts = prompts_of(size, shape)

  def batches():
    for number in serve.runs(shape.tokens):
      rollout.seed = jax.random.PRNGKey(number)
      yield {"prompts": np.array(prompts)}  # A list would be a tree.
      jax.block_until_ready(nnx.state(cluster.actor_trainer.model))

  learner.train(batches())


def main() -> None:
  size, work, shape = serve.arguments(__doc__, shapes.WORKS)
  {"generate": generate, "sft": sft, "grpo": grpo}[work](size, shape)


if __name__ == "__main__":
  main()
