r"""A 70B model learns from the traces of a larger one.

Reproduces the recipe of DeepSeek-R1-Distill-Llama-70B (arXiv 2501.12948): SFT
of Llama 3.3 70B Instruct on 800,000 traces of R1 for two epochs, up to 32,768
tokens, batches of 64, a cosine from 2e-5 to a tenth. The traces were not
published: `distill.data.sources` wants a file of yours, of `messages`, or
`prompt` and `completion`. Rows are packed; `num_steps` is for two examples in
each.

  hf download meta-llama/Llama-3.3-70B-Instruct --local-dir=data/llama3.3-70b
  posttrain train --config=configs/distill_70b.py --workdir=/mnt/runs/distill
  posttrain plan --config=configs/distill_70b.py --topology=v5p:8x8x8

`:4k` has 512 rows of 4,096 tokens: as many in a step, for short examples.
`:debug` is a tiny random model on demonstrations of our own.

Cost: sized for 512 chips of v5p, see docs/pods.md for what is known of it. It
has not run. Expected, by the paper: 70.0 on AIME24 and 94.5 on MATH-500, pass@1
at temperature 0.6.
"""

import ml_collections

SIGNS = "posttrain.tasks.signs"  # What `:debug` trains on.


def get_config(arg=""):
  if arg not in ("", "4k", "debug"):
    raise ValueError(
        f"configs/distill_70b.py knows no {arg!r}, only 4k and debug.")
  debug, short = arg == "debug", arg == "4k"
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.stages = ("distill",)
  if debug:
    config.model = "tiny"
    config.model_overrides = dict(layers=2, embed=64, mlp=128, head_dim=16)
    config.tokenizer = dict(
        train=f"{SIGNS}:corpus", model_type="word",
        symbols=("<think>", "</think>"))
    config.chat_template = "plain"
    config.thinking = dict(newline="")
    source = dict(task=f"{SIGNS}:demonstrations", args=dict(count=200))
  else:
    config.model = "llama3.1-70b"  # The shape of 3.3 too.
    config.init = dict(kind="preset", path="data/llama3.3-70b")
    source = dict(path="data/distill.jsonl")
  config.mesh = dict(fsdp=-1, context=1 if debug or short else 8)
  config.compute = dict(
      dtype="bfloat16", remat="full", loss_chunk=512,
      attention="blocks" if debug else "splash",  # A kernel of TPUs.
      attention_block=512)
  config.distill = dict(
      kind="sft",
      num_steps=4 if debug else 12_500,
      sequence_length=192 if debug else 4096 if short else 32_768,
      rows=4 if debug else 512 if short else 64,
      learning_rate=2e-5,
      final_learning_rate=2e-6,
      warmup_steps=1 if debug else 100,
      beta2=0.95,
      moments_dtype="bfloat16",
      data=dict(sources=(source,)),
      checkpoint=dict(every=0 if debug else 500),
      log_every=1 if debug else 10,
  )
  return config
