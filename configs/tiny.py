r"""The whole pipeline on a tiny random model: an example, not a result.

Reproduces nothing: it shows the layout of a config and that the three stages
run. The task is "signs": put + or - between numbers to hit a target.

  posttrain train --config=configs/tiny.py --workdir=runs/tiny
  posttrain report --workdir=runs/tiny
  python -m launch.sweep --config=configs/tiny.py --workdir=runs/sweep

Cost: about two minutes on two CPU cores; `:debug` takes seconds.
Expected: the SFT loss falls; the reward after so few steps says nothing.
"""

import ml_collections

TASK = "posttrain.tasks.signs"
BREVITY = "posttrain.tasks.scoring:brevity"  # A signal for `:debug`.


def get_config(arg=""):
  if arg not in ("", "debug"):
    raise ValueError(f"configs/tiny.py knows no {arg!r}, only debug.")
  debug = arg == "debug"
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = "tiny"
  config.model_overrides = dict(
      layers=2, embed=64, mlp=128, heads=4, kv_heads=2, head_dim=16)
  config.tokenizer = dict(
      train=f"{TASK}:corpus", model_type="word",
      symbols=("<think>", "</think>"))
  config.chat_template = "plain"
  config.thinking = dict(newline="")  # A word vocabulary has no whitespace.
  config.stages = ("cold_start", "reason", "measure")

  config.cold_start = dict(
      kind="sft",
      num_steps=2 if debug else 60,
      rows=8,
      sequence_length=256,
      learning_rate=1.5e-3,
      warmup_steps=1 if debug else 10,
      data=dict(sources=(
          dict(task=f"{TASK}:demonstrations", args=dict(count=2000)),)),
      log_every=1 if debug else 10,
  )
  config.reason = dict(
      kind="rl",
      num_steps=2 if debug else 8,
      num_groups=4 if debug else 8,  # Prompts per batch of rollouts.
      group_size=4,  # Completions per prompt.
      sequence_length=160,
      rows_per_microbatch=8,
      learning_rate=1e-4,
      problems=dict(task=f"{TASK}:problems", args=dict(count=2000)),
      rewards=(f"{TASK}:reward",) + ((BREVITY,) if debug else ()),
      rollout=dict(max_prompt_tokens=32, max_tokens=32 if debug else 96),
      log_every=1,
  )
  config.measure = dict(
      kind="evaluate",
      problems=dict(
          task=f"{TASK}:problems", split="test", count=8 if debug else 64),
      reward=f"{TASK}:reward",
      extract=f"{TASK}:extract",
      max_thinking_tokens=(4, 8) if debug else (8, 16, 32, 64),
      num_waits=(0, 1),
      rollout=dict(
          max_prompt_tokens=32, max_tokens=32 if debug else 96,
          max_num_seqs=64),
  )
  return config


def get_sweep():
  """Yields one dict of overrides per run of `launch.sweep`."""
  for learning_rate in (5e-5, 2e-4):
    for group_size in (4, 8):
      yield {"reason.learning_rate": learning_rate,
             "reason.group_size": group_size}
