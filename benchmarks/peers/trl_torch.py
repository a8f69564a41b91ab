"""TRL's SFT and GRPO trainers on torch."""

import datasets
import trl

from benchmarks import serve, shapes
from benchmarks.peers import torch_models


def sft(size: shapes.Size, shape: shapes.Shape) -> None:
  rows = shapes.tokens(shape.rows, shape.length, size.vocab_size)
  trainer = trl.SFTTrainer(
      torch_models.model(size),
      args=trl.SFTConfig(
          per_device_train_batch_size=shape.rows, max_length=shape.length,
          **torch_models.trainer_settings()),
      train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
      processing_class=torch_models.tokenizer(size),
      callbacks=[torch_models.Hooks(serve.Turns(shape.tokens))])
  trainer.train()


def grpo(size: shapes.Size, shape: shapes.Shape) -> None:
  prompts = shapes.tokens(shape.prompts, shape.prompt, size.vocab_size)

  def reward(completion_ids, **unused):
    lengths = {len(completion) for completion in completion_ids}
    if lengths != {shape.new}:
      raise RuntimeError(f"Completions of {lengths}, not {shape.new}, tokens.")
    return [shapes.rule_reward(completion) for completion in completion_ids]

  trainer = trl.GRPOTrainer(
      torch_models.model(size), reward_funcs=reward,
      args=trl.GRPOConfig(
          per_device_train_batch_size=shape.prompts * shape.samples,
          num_generations=shape.samples, max_completion_length=shape.new,
          temperature=1.0, beta=0.0, **torch_models.trainer_settings()),
      train_dataset=datasets.Dataset.from_dict(
          {"prompt": [shapes.text(prompt) for prompt in prompts]}),
      processing_class=torch_models.tokenizer(size),
      callbacks=[torch_models.Hooks(serve.Turns(shape.tokens))])
  trainer.train()


def main() -> None:
  size, work, shape = serve.arguments(__doc__, ("sft", "grpo"))
  {"sft": sft, "grpo": grpo}[work](size, shape)


if __name__ == "__main__":
  main()
