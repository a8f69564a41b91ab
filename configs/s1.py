r"""s1: a 32B model learns to think from 1,000 traces of up to 32,768 tokens.

Reproduces the training of s1-32B (arXiv 2501.19393, appendix D): full
fine-tuning of Qwen2.5-32B-Instruct for 5 epochs of 16 examples a step, 315
steps, AdamW (0.9, 0.95), weight decay 1e-4, a peak of 1e-5 after 16 steps of
warm-up, then a cosine to zero. One example per row, as there: a step is 16
examples, whatever their length, and most of a row is padding (`data.packing`
packs them; the steps are then fewer and other ones).

  pip install 'huggingface_hub[cli]'
  hf download Qwen/Qwen2.5-32B-Instruct --local-dir=data/Qwen2.5-32B-Instruct
  hf download simplescaling/s1K --repo-type=dataset --local-dir=data/s1K
  posttrain train --config=configs/s1.py --workdir=/mnt/runs/s1
  posttrain plan --config=configs/s1.py --topology=v5p:4x4x4

Cost: an update takes at least 6.9 s on 64 chips of v5p, all 315 36 minutes
(modelled; the plan is in docs/pods.md). It has not run. The paper's run took 7
H100-hours. Expected, by the paper, greedy: 50.0 on AIME24 and 92.6 on MATH-500,
and 56.7 on AIME24 with four waits.

`:debug` is a tiny random model on traces of our own.
"""

import ml_collections
import pyarrow.parquet

SIGNS = "posttrain.tasks.signs"  # What `:debug` trains on.


def get_config(arg=""):
  if arg not in ("", "debug"):
    raise ValueError(f"configs/s1.py knows no {arg!r}, only debug.")
  debug = arg == "debug"
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.stages = ("think",)
  if debug:
    config.model = "tiny"
    config.model_overrides = dict(layers=2, embed=64, mlp=128, head_dim=16)
    config.tokenizer = dict(
        train=f"{SIGNS}:corpus", model_type="word",
        symbols=("<think>", "</think>"))
    config.chat_template = "plain"
    config.thinking = dict(newline="")
    source = dict(task=f"{SIGNS}:demonstrations", args=dict(count=64))
  else:
    config.model = "qwen2.5-32b"
    config.init = dict(kind="preset", path="data/Qwen2.5-32B-Instruct")
    config.thinking = dict(
        start="<|im_start|>think", end="<|im_start|>answer")
    source = dict(
        task="configs/s1.py:demonstrations",
        args=dict(path="data/s1K/data/train-00000-of-00001.parquet"))
  config.mesh = dict(fsdp=-1, context=1 if debug else 4)
  config.compute = dict(
      dtype="bfloat16", remat="full", loss_chunk=512,
      attention="blocks" if debug else "splash",  # A kernel of TPUs.
      attention_block=512)
  config.think = dict(
      kind="sft",
      num_steps=2 if debug else 315,
      sequence_length=192 if debug else 32_768,
      rows=4 if debug else 16,
      learning_rate=1e-5,
      warmup_steps=1 if debug else 16,
      weight_decay=1e-4,
      beta2=0.95,
      data=dict(sources=(source,), packing=False),
      checkpoint=dict(every=0 if debug else 63),  # An epoch.
      log_every=1,
  )
  return config


def demonstrations(split, *, path):
  """s1K in s1's format: thinking and answer behind <|im_start|>.

  The thinking strings of the config make this the control token; in a question
  it stays text.
  """
  if split != "train":
    raise ValueError(f"s1K has no split {split!r}, only 'train'.")
  rows = pyarrow.parquet.read_table(path).to_pylist()
  return [dict(id=i, prompt=row["question"], completion=_completion(row))
          for i, row in enumerate(rows)]


def _completion(row):
  thinking = "\n<|im_start|>think\n".join(row["thinking_trajectories"])
  answer = row["attempt"]
  if "Answer:" not in answer:
    answer = f"Answer: {answer}"
  return (f"<|im_start|>think\n{thinking.strip()}\n"
          f"<|im_start|>answer\n{answer.strip()}")
