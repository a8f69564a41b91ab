"""A small config of SFT and GRPO; test_golden.py compiles it for a slice."""

import ml_collections

TASK = "posttrain.tasks.signs"


def get_config(arg=""):
  config = ml_collections.ConfigDict()
  config.model = "tiny"
  config.model_overrides = dict(
      vocab_size=512, embed=256, mlp=512, heads=4, kv_heads=2, head_dim=64)
  config.compute = dict(dtype="bfloat16", remat="full")
  config.mesh = dict(fsdp=2, tensor=2)
  config.tokenizer = dict(
      train=f"{TASK}:corpus", model_type="word",
      symbols=("<think>", "</think>"))
  config.chat_template = "plain"
  config.thinking = dict(newline="")
  config.stages = ("cold_start", "reason")
  config.cold_start = dict(
      kind="sft", num_steps=2, rows=8, sequence_length=256,
      num_microbatches=2, learning_rate=1e-3,
      data=dict(sources=(
          dict(task=f"{TASK}:demonstrations", args=dict(count=100)),)))
  config.reason = dict(
      kind="rl", num_steps=2, num_groups=4, group_size=4,
      sequence_length=128, rows_per_microbatch=4,
      learning_rate=1e-4, loss=dict(kl_coef=0.1),
      problems=dict(task=f"{TASK}:problems", args=dict(count=100)),
      rewards=(f"{TASK}:reward", "posttrain.tasks.scoring:brevity"),
      rollout=dict(max_prompt_tokens=16, max_tokens=32, chunk=16))
  return config
