r"""A real pretrained model through the whole pipeline, in a few steps.

Reproduces nothing: it shows that SFT, GRPO and evaluation run unchanged on
published weights and real data. SmolLM2-135M-Instruct (4-bit weights, trained
here in float32) learns from GSM8K's written solutions, then from rewards on
one-digit sums, and is measured on both before, between and after.

  make smollm2
  posttrain train --config=configs/smollm2.py:DIR --workdir=runs/smollm2
  posttrain report --workdir=runs/smollm2

DIR holds GSM8K's train.jsonl and test.jsonl; without it the folder is the
environment variable GSM8K_DIR, or else data/gsm8k. To get the files:

  git clone https://github.com/openai/grade-school-math
  (they are in grade-school-math/grade_school_math/data)

`:debug` is a tiny random model on tasks of our own; it needs neither.

Cost: 17 minutes on two CPU cores that were shared (28 CPU-minutes), 6.9 GB.
Expected, sampled at temperature 1: of 160 answers to one-digit sums, 8 for each
of 20 problems, .15 +- .04 are right before training, .23 +- .04 after SFT on
GSM8K and .60 +- .05 after eight updates of GRPO. Of 32 GSM8K problems (greedy)
.09 +- .05 before and none after: ten updates teach its format, not how to solve
them.
"""

import os

import ml_collections

GSM8K = "posttrain.tasks.gsm8k"
SUMS = "posttrain.tasks.sums"
SIGNS = "posttrain.tasks.signs"  # What `:debug` trains on.
BREVITY = "posttrain.tasks.scoring:brevity"  # A signal for `:debug`.


def get_config(arg=""):
  debug = arg == "debug"
  data_dir = arg or os.environ.get("GSM8K_DIR", "data/gsm8k")
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.thinking = dict(end="")  # The model knows no thinking section.
  if debug:
    config.model = "tiny"
    config.model_overrides = dict(layers=2, embed=64, mlp=128, head_dim=16)
    config.tokenizer = dict(  # Little more than bytes.
        train=f"{SIGNS}:corpus", model_type="bpe", vocab_size=320)
    config.chat_template = "plain"
    config.stages = ("cold_start", "reason", "measure_sums")
    sources = dict(
        data=(dict(task=f"{SIGNS}:demonstrations", args=dict(count=64)),))
  else:
    config.model = "smollm2-135m"
    config.init = dict(kind="preset")
    config.stages = ("cold_start", "reason", "measure_sums", "measure_gsm8k")
    solutions = lambda **args: dict(
        task=f"{GSM8K}:demonstrations", args=dict(path=data_dir, **args))
    sources = dict(
        data=(solutions(),),
        eval_data=(dict(solutions(count=16), split="test"),))

  config.cold_start = dict(
      kind="sft",
      num_steps=2 if debug else 10,
      sequence_length=512,
      rows=4,
      num_microbatches=4,
      learning_rate=3e-5,
      warmup_steps=1 if debug else 2,
      **{name: dict(sources=rows) for name, rows in sources.items()},
      log_every=1,
  )
  config.reason = dict(
      kind="rl",
      num_steps=2 if debug else 8,
      num_groups=4,  # Prompts per step.
      group_size=4 if debug else 8,  # Completions per prompt.
      sequence_length=512,
      rows_per_microbatch=1,
      learning_rate=1e-5,
      problems=dict(task=f"{SUMS}:problems", args=dict(count=54)),
      rewards=(f"{SUMS}:reward",) + ((BREVITY,) if debug else ()),
      rollout=dict(max_prompt_tokens=48, max_tokens=8 if debug else 32),
      log_every=1,
      save_rollouts_every=1,
      show_sample_every=4,
  )
  config.measure_sums = dict(
      kind="evaluate",
      problems=dict(
          task=f"{SUMS}:problems", split="test", args=dict(count=20)),
      reward=f"{SUMS}:reward",
      extract=f"{SUMS}:extract",
      samples_per_problem=2 if debug else 8,
      pass_at=(1, 2) if debug else (1, 8),
      rollout=dict(
          max_prompt_tokens=48, max_tokens=8 if debug else 32,
          # The shapes of a rollout of `reason`: its programs serve again.
          max_num_seqs=32),
  )
  config.measure_gsm8k = dict(
      kind="evaluate",
      problems=dict(task=f"{GSM8K}:problems", args=dict(path=data_dir),
                    count=32),
      reward=f"{GSM8K}:reward",
      extract=f"{GSM8K}:extract",
      rollout=dict(
          max_prompt_tokens=224, max_tokens=160, temperature=0.0,
          chunk=160,  # One size of the cache, so one program to compile.
          max_num_seqs=32),
  )
  return config
