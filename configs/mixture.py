r"""GRPO of a mixture of experts: 30B parameters, 3B of them for each token.

Reproduces the recipe of DAPO (arXiv 2503.14476), without its filters of whole
groups and its penalty of length, on Qwen3-30B-A3B: no KL, the upper clip at
0.28, a mean over all tokens, AdamW at 1e-6 after 20 steps of warm-up. Tokens
travel to experts over `mesh.expert`; `router/agreement` tells how often sampler
and trainer chose the same ones.

  hf download Qwen/Qwen3-30B-A3B --local-dir=data/Qwen3-30B-A3B
  git clone https://github.com/openai/grade-school-math data/gsm8k
  posttrain train --config=configs/mixture.py --workdir=/mnt/runs/mixture
  posttrain plan --config=configs/mixture.py --topology=v5p:4x4x4

Cost: completions of up to 8,192 tokens, sized for 64 chips of v5p; docs/pods.md
has what is known of it. It has not run. Expected: a reward on GSM8K that starts
high, since the model has been trained to reason; the config is a starting point
for harder problems (`reason.problems.task`).

`:debug` is a tiny random mixture on a task of our own.
"""

import ml_collections

GSM8K = "posttrain.tasks.gsm8k"
SIGNS = "posttrain.tasks.signs"  # What `:debug` trains on.
BREVITY = "posttrain.tasks.scoring:brevity"  # A signal for `:debug`.


def get_config(arg=""):
  if arg not in ("", "debug"):
    raise ValueError(f"configs/mixture.py knows no {arg!r}, only debug.")
  debug = arg == "debug"
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.stages = ("reason",)
  if debug:
    config.model = "tiny"
    config.model_overrides = dict(
        layers=2, embed=64, mlp=32, head_dim=16, num_experts=4,
        experts_per_token=2)
    config.tokenizer = dict(
        train=f"{SIGNS}:corpus", model_type="word",
        symbols=("<think>", "</think>"))
    config.chat_template = "plain"
    config.thinking = dict(newline="")
    problems = dict(task=f"{SIGNS}:problems")
  else:
    config.model = "qwen3-30b-a3b"
    config.init = dict(kind="preset", path="data/Qwen3-30B-A3B")
    problems = dict(task=f"{GSM8K}:problems", args=dict(
        path="data/gsm8k/grade_school_math/data"))
  config.mesh = dict(fsdp=-1, expert=1 if debug else 8)
  config.compute = dict(
      dtype="bfloat16", remat="full", loss_chunk=512,
      attention="blocks" if debug else "splash",  # A kernel of TPUs.
      attention_block=512)
  config.reason = dict(
      kind="rl",
      num_steps=2 if debug else 500,
      num_groups=4 if debug else 64,  # Prompts per batch of rollouts.
      group_size=4 if debug else 16,  # Completions per prompt.
      num_minibatches=2 if debug else 4,
      sequence_length=128 if debug else 8192 + 512,
      rows_per_microbatch=4 if debug else 64,
      learning_rate=1e-6,
      warmup_steps=1 if debug else 20,
      weight_decay=0.1,
      router_aux_coef=0.001,  # The release's own.
      loss=dict(clip_high=0.28),
      problems=problems,
      rewards=(f"{SIGNS}:reward", BREVITY) if debug else (f"{GSM8K}:reward",),
      rollout=dict(
          max_prompt_tokens=8 if debug else 512,
          max_tokens=24 if debug else 8192,
          chunk=24 if debug else 1024),  # Four sizes of the cache.
      checkpoint=dict(every=0 if debug else 40),
      log_every=1,
  )
  return config
