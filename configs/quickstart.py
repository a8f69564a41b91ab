r"""SFT, GRPO and budget forcing at work on a laptop CPU, from random weights.

Reproduces, at the smallest size, the three findings that this code is for:
demonstrations teach to think (s1, arXiv 2501.19393), a rule reward alone
teaches to think better and longer (DeepSeek-R1, arXiv 2501.12948), and
accuracy grows with the thinking that is allowed or forced (s1).

The task is "signs": put + or - between four numbers, order kept, to hit a
target. Demonstrations come from an imperfect searcher that thinks in attempts
separated by "Wait" and is right half the time; GRPO then sees nothing but
whether the answer is right.

  make quickstart
  posttrain train --config=configs/quickstart.py --workdir=runs/quickstart

`:validation` measures on the validation split, on which everything here was
chosen; `:full` on both splits, with more budgets and with majority votes
(`make quickstart-full` runs it for three seeds); `:debug` only shows that it
runs.

Cost: under ten minutes on two free CPU cores. Expected: about a third of the
test problems right after SFT and two thirds after GRPO; the measured table is
in the README.
"""

import ml_collections

TASK = "posttrain.tasks.signs"
BREVITY = "posttrain.tasks.scoring:brevity"  # A signal for `:debug`.


def get_config(arg=""):
  if arg not in ("", "validation", "full", "debug"):
    raise ValueError(
        f"configs/quickstart.py knows no {arg!r}; choose from validation, "
        "full, debug, or leave it out.")
  debug, full = arg == "debug", arg == "full"
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = "tiny"
  config.compute = dict(unroll=3)
  config.mesh = dict(cpu_devices=2)
  config.tokenizer = dict(
      train=f"{TASK}:corpus", model_type="word",
      symbols=("<think>", "</think>"))
  config.chat_template = "plain"
  config.thinking = dict(newline="")  # A word vocabulary has no whitespace.
  config.stages = ("cold_start", "reason", "measure") + (
      ("validate",) if full else ())

  config.cold_start = dict(
      kind="sft",
      num_steps=4 if debug else 1500,
      rows=5,
      sequence_length=176,
      learning_rate=1.5e-3,
      warmup_steps=1 if debug else 20,
      weight_decay=0.05,
      beta2=0.99,
      data=dict(sources=(dict(
          task=f"{TASK}:demonstrations",
          args=dict(count=100 if debug else 24_000)),)),
      log_every=1 if debug else 100,
  )
  config.reason = dict(
      kind="rl",
      num_steps=2 if debug else 60,
      num_groups=4 if debug else 24,  # Prompts per batch of rollouts.
      group_size=4 if debug else 8,  # Completions per prompt.
      num_minibatches=2,
      sequence_length=176,
      rows_per_microbatch=10,
      learning_rate=1e-4,
      beta2=0.99,
      loss=dict(clip_low=0.2, clip_high=0.28),
      problems=dict(task=f"{TASK}:problems"),
      rewards=(f"{TASK}:reward",) + ((BREVITY,) if debug else ()),
      rollout=dict(
          max_prompt_tokens=8, max_tokens=24 if debug else 168,
          chunk=24 if debug else 168),  # One program: nothing is streamed.
      log_every=1 if debug else 10,
  )
  config.measure = measure("validation" if arg == "validation" else "test",
                           arg)
  if full:
    config.validate = measure("validation", arg)
  return config


def measure(split, arg):
  """An evaluation of random weights, SFT and GRPO on one split."""
  debug, full = arg == "debug", arg == "full"
  # One attempt is 16 tokens, and 17 with its Wait: 1, 2, 4 and 8 attempts.
  budgets = (16, 33, 50, 67, 101, 135) if full else (16, 33, 67, 135)
  section = dict(
      kind="evaluate",
      problems=dict(
          task=f"{TASK}:problems", split=split,
          count=8 if debug else 512),
      reward=f"{TASK}:reward",
      extract=f"{TASK}:extract",
      baseline=f"{TASK}:constant_baseline",
      max_thinking_tokens=(4, 8) if debug else budgets,
      num_waits=(1,) if debug else (1, 2, 4),
      # Twelve attempts: behind them there is room for an answer.
      wait_max_thinking_tokens=(8,) if debug else (204,),
      rollout=dict(
          max_prompt_tokens=8, max_tokens=24 if debug else 216,
          chunk=24 if debug else 108, max_num_seqs=512),
  )
  if debug or full:
    section["majority"] = dict(max_samples=2 if debug else 4)
  return section
