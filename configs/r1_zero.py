r"""R1-Zero: nothing but right or wrong teaches a base model to think longer.

Reproduces the recipe of DeepSeek-R1-Zero (arXiv 2501.12948) at sizes that were
not published with it: GRPO on a base model with its prompt template, 32
questions of 16 completions a step, temperature 1, a KL of 0.001 to where it
began, and two rules as rewards, accuracy and format, that count the same. The
problems are GSM8K's, since R1's are not published: put your own at
`reason.problems.task`.

  hf download Qwen/Qwen3-8B-Base --local-dir=data/Qwen3-8B-Base
  git clone https://github.com/openai/grade-school-math data/gsm8k
  posttrain train --config=configs/r1_zero.py --workdir=/mnt/runs/r1_zero
  posttrain plan --config=configs/r1_zero.py --topology=v5p:4x4x4

`:32b` is Qwen2.5-32B on v5p:4x4x8, the size and the learning rate of
R1-Zero-Qwen-32B. `:debug` is a tiny random model on a task of our own.

Cost: completions of up to 16,384 tokens, sized for 64 and 128 chips of v5p;
docs/pods.md has what is known of it. It has not run. Expected, as in the paper:
accuracy and length of the thinking rise together, from rewards alone.
"""

import ml_collections

from posttrain.tasks import gsm8k

SIGNS = "posttrain.tasks.signs"  # What `:debug` trains on.
BREVITY = "posttrain.tasks.scoring:brevity"  # A signal for `:debug`.
HERE = "configs/r1_zero.py"
TEMPLATE = (  # The paper's table 1.
    "A conversation between User and Assistant. The user asks a question, and "
    "the Assistant solves it. The assistant first thinks about the reasoning "
    "process in the mind and then provides the user with the answer. The "
    "reasoning process and answer are enclosed within <think> </think> and "
    "<answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: {}. Assistant:")


def get_config(arg=""):
  if arg not in ("", "32b", "debug"):
    raise ValueError(f"{HERE} knows no {arg!r}, only 32b and debug.")
  debug, large = arg == "debug", arg == "32b"
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.chat_template = "plain"
  config.stages = ("reason",)
  if debug:
    config.model = "tiny"
    config.model_overrides = dict(layers=2, embed=64, mlp=128, head_dim=16)
    config.tokenizer = dict(
        train=f"{SIGNS}:corpus", model_type="word",
        symbols=("<think>", "</think>"))
    config.thinking = dict(newline="")
  else:
    config.model = "qwen2.5-32b" if large else "qwen3-8b"
    config.init = dict(kind="preset", path="data/Qwen2.5-32B" if large
                       else "data/Qwen3-8B-Base")
  config.mesh = dict(fsdp=-1, tensor=4 if large else 1)
  config.compute = dict(
      dtype="bfloat16", frozen_dtype="bfloat16", remat="full", loss_chunk=512,
      attention="blocks" if debug else "splash",  # A kernel of TPUs.
      attention_block=512)
  config.reason = dict(
      kind="rl",
      num_steps=2 if debug else 2000,
      num_groups=4 if debug else 32,  # Prompts per batch of rollouts.
      group_size=4 if debug else 16,  # Completions per prompt.
      sequence_length=128 if debug else 16_384 + 512,
      rows_per_microbatch=4 if debug else 32 if large else 64,
      learning_rate=2e-6 if large else 3e-6,
      reference="",
      loss=dict(kl_coef=0.001, aggregation="sequence_mean"),
      problems=dict(task=f"{SIGNS}:problems") if debug else dict(
          task=f"{HERE}:problems",
          args=dict(path="data/gsm8k/grade_school_math/data")),
      rewards=(f"{SIGNS}:reward", BREVITY) if debug else (
          "posttrain.tasks.gsm8k:reward", f"{HERE}:follows_format"),
      rollout=dict(
          max_prompt_tokens=8 if debug else 512,
          max_tokens=24 if debug else 16_384,
          chunk=24 if debug else 1024),  # SIGTERM waits for one.
      checkpoint=dict(every=0 if debug else 50),
      log_every=1,
  )
  return config


def problems(split, *, path, count=0):
  """GSM8K's problems in the paper's template."""
  return [row | dict(prompt=TEMPLATE.format(row["prompt"]))
          for row in gsm8k.problems(split, path=path, count=count)]


def follows_format(prompt, completion, *, full_text, **columns):
  """1 for one thinking section and then one answer, with nothing around."""
  del prompt, completion, columns
  text = full_text.strip()
  tags = ("<think>", "</think>", "<answer>", "</answer>")
  places = [text.find(tag) for tag in tags]
  return float(
      all(text.count(tag) == 1 for tag in tags) and places == sorted(places)
      and text.startswith(tags[0]) and text.endswith(tags[-1]))
