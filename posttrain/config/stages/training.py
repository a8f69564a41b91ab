"""Keys and checks shared by the kinds of stages that train."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.config import checks, keys
from posttrain.config.keys import REQUIRED, Key, Needs, Section
from posttrain.model.config import INPUT_AXES, LORA_DECODE


def shared(schedule: str, **more_health: Key) -> dict[str, Any]:
  """Keys of every kind that trains: the loop and the optimizer need them.

  Args:
    schedule: of the learning rate, by default.
    **more_health: keys that the kind adds to `health`.
  """
  return dict(
      **WEIGHTS, **optimizer(schedule), health=health(**more_health),
      checkpoint=CHECKPOINT, log_every=Key(
          int, 10, "Steps between rows of the console's table. metrics.jsonl "
          "has a row for every step.", "[1, inf)"))


def optimizer(schedule: str) -> dict[str, Key]:
  """Keys for the optimizer and its learning rate."""
  return dict(
      learning_rate=Key(float, REQUIRED, "Peak learning rate.", "[1e-12, 10]"),
      schedule=Key(str, schedule, "Learning rate schedule after the warm-up.",
                   choices=("cosine", "linear", "constant")),
      warmup_steps=Key(
          int, 0, "Steps of linear warm-up from zero.", "[0, inf)"),
      final_learning_rate=Key(
          float, 0.0, "Learning rate at the last step.", "[0, inf)",
          needs=Needs("schedule", "!=", "constant")),
      weight_decay=Key(float, 0.0, "Decoupled weight decay. Norms and biases "
                       "are left out.", "[0, 100]"),
      optimizer=Key(str, "adamw", "AdamW, or Adafactor, which factors the "
                    "second moment into means over rows and columns. Its steps "
                    "are of AdamW's size.", choices=("adamw", "adafactor")),
      moments_dtype=Key(
          str, "float32", "Precision of the optimizer state that has the shape "
          "of the parameters: AdamW's two moments (the second is rounded "
          "stochastically, so that small changes count on average), or "
          "Adafactor's first moment.", choices=("float32", "bfloat16")),
      beta1=Key(
          float, 0.9, "Decay of the first moment: a mean of gradients (AdamW) "
          "or of their directions (Adafactor; 0: none is kept).", "[0, 1)"),
      beta2=Key(float, 0.999, "Decay of the second moment. Adafactor's is 1 - "
                "step**-0.8 until that is larger.", "[0, 1)"),
      eps=Key(float, 1e-8, "Epsilon: added to AdamW's denominator.",
              "[1e-30, 1]", needs=Needs("optimizer", "==", "adamw")),
      max_grad_norm=Key(float, 1.0, "Gradient clipping: the largest global "
                        "norm.", "[1e-6, 1e12]"),
      router_aux_coef=Key(
          float, 0.0, "Weight of the load-balancing loss, which spreads tokens "
          "over experts, with counts of the whole batch. Only for a model with "
          "experts.", "[0, 1000]"),
  )


# Keys for the trainable parameters of a stage.
_ADAPTED = Needs("lora.rank", ">", 0)
WEIGHTS: dict[str, Any] = dict(
    trained=Key(str, "", "Trainable parameters: a regular expression that "
                'matches the whole path of each, such as "blocks/(q|k|v|o)". '
                '"": the LoRA adapters if lora.rank is above 0, else '
                "everything. The rest is frozen, in compute.frozen_dtype."),
    lora=Section(
        "LoRA: low-rank adapters. A stage goes on with the adapters of the "
        "stage before if they are alike; others are first merged into the "
        "weights.",
        rank=Key(int, 0, "Rank of the adapters. 0: no LoRA.", "[0, 65536]"),
        alpha=Key(float, 16.0, "Scale of the adapters: their product counts "
                  "alpha / rank times.", "[1e-3, 1e6]", needs=_ADAPTED),
        targets=Key(
            tuple[str, ...], tuple(INPUT_AXES), "Matrices that get adapters "
            "(target modules).", choices=tuple(INPUT_AXES), needs=_ADAPTED),
        rslora=Key(bool, False, "Scales by alpha / sqrt(rank) instead "
                   "(rsLoRA).", needs=_ADAPTED),
        decode=Key(str, "live", "Weights and adapters in the sampler's "
                   "decode loop: multiplied one by one (live), or merged at "
                   "each call of the sampler (merged). The logprobs are the "
                   "same to rounding.", choices=LORA_DECODE, needs=_ADAPTED)))


def health(**more: Key) -> Section:
  """Keys for the conditions that stop a run."""
  return Section(
      "Conditions that stop the run with advice, or skip an update.",
      on_bad_step=Key(
          str, "stop", "A loss or gradient norm that is not finite (NaN), or a "
          "spike of the loss: the run stops and its batch is saved, or the "
          "update is skipped and counted.", choices=("stop", "skip")),
      max_skips=Key(
          int, 5, "Updates skipped in a row before the run stops.", "[1, inf)",
          needs=Needs("health.on_bad_step", "==", "skip")),
      spike_mads=Key(
          float, 0.0, "Loss spike: a loss that is above the median of the last "
          "losses by more than this many median absolute deviations, such as "
          "10. 0: none is a spike.", "0 or [0.01, 1e6]"),
      spike_window=Key(int, 64, "Losses that the median is taken over. Until "
                       "there are that many, none is a spike.", "[4, 65536]",
                       needs=Needs("health.spike_mads", ">", 0)),
      **more)


# Keys for checkpoints.
_BEST = Needs("checkpoint.keep_best", ">", 0)
CHECKPOINT = Section(
    "Checkpoints. One is also saved at preemption (SIGTERM), and the same "
    "command resumes from it.",
    every=Key(
        int, 0, "Steps between checkpoints. 0: one, at the end.", "[0, inf)"),
    keep=Key(int, 2, "Most recent checkpoints that are kept.", "[1, inf)"),
    keep_best=Key(
        int, 0, "Best checkpoints that are kept in addition.", "[0, inf)"),
    best_metric=Key(
        str, "", "Name in metrics.jsonl that ranks checkpoints.", needs=_BEST),
    best_mode=Key(str, "max", "End of the metric that is best.",
                  choices=("max", "min"), needs=_BEST),
    on_damaged=Key(str, "error", "The newest checkpoint cannot be read at a "
                   "resume: stop, or move it away and resume from the one "
                   "before.", choices=("error", "previous")),
)


def check_optimizer(config, name: str, stage: Mapping) -> Iterator[str]:
  if stage["warmup_steps"] > stage["num_steps"]:
    yield (f"warmup_steps: {stage['warmup_steps']} is more than "
           f"num_steps={stage['num_steps']}.")
  if stage["final_learning_rate"] > stage["learning_rate"]:
    yield (f"final_learning_rate: {stage['final_learning_rate']} is above "
           f"learning_rate={stage['learning_rate']}.")
  if (stage["optimizer"] == "adafactor" and not stage["beta1"]
      and stage["moments_dtype"] != "float32"):
    yield (f"moments_dtype: set to {stage['moments_dtype']!r}, but it has no "
           "effect: Adafactor keeps no mean if beta1 is 0.")


def check_router(config, name: str, stage: Mapping) -> Iterator[str]:
  if stage["router_aux_coef"] and checks.experts(config) == 0:
    yield (f"router_aux_coef: set to {stage['router_aux_coef']}, but it has "
           "no effect: the model has no experts.")


def check_trained(config, name: str, stage: Mapping) -> Iterator[str]:
  targets = stage["lora"]["targets"]
  if not targets or len(set(targets)) < len(targets):
    yield (f"lora.targets: found {keys.shown(targets)}, needed different "
           "matrices.")
  try:
    re.compile(stage["trained"])
  except re.error as error:
    yield (f"trained: {keys.shown(stage['trained'])} is no regular "
           f"expression: {error}.")


def check_checkpoint(config, name: str, stage: Mapping) -> Iterator[str]:
  checkpoint = stage["checkpoint"]
  if checkpoint["keep_best"] and not checkpoint["best_metric"]:
    yield ("checkpoint.best_metric: missing; checkpoint.keep_best="
           f"{checkpoint['keep_best']} needs the name of a metric.")


def divides(stage: Mapping, part: str, whole: str) -> Iterator[str]:
  if stage[whole] % stage[part]:
    yield (f"{whole}: {stage[whole]} is not a multiple of "
           f"{part}={stage[part]}.")


CHECKS = (check_optimizer, check_router, check_trained, check_checkpoint)
