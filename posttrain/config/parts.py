"""Groups of keys that several kinds of stages have; see `schema`."""

from typing import Any

from posttrain.config.keys import REQUIRED, Key, Needs, Section
from posttrain.model.config import INPUT_AXES, LORA_DECODE
from posttrain.text.instructions import CLASSES, TEXTS


def optimizer(schedule: str) -> dict[str, Key]:
  decays = Needs("schedule", "!=", "constant")
  return dict(
      learning_rate=Key(float, REQUIRED, "Peak learning rate.", "[1e-12, 10]"),
      schedule=Key(
          str, schedule, "What follows the warm-up.",
          choices=("cosine", "linear", "constant")),
      warmup_steps=Key(
          int, 0, "Steps of linear warm-up from zero.", "[0, inf)"),
      final_learning_rate=Key(
          float, 0.0, "Learning rate at the last step.", "[0, inf)",
          needs=decays),
      weight_decay=Key(
          float, 0.0, "Decoupled decay; skips norms and biases.", "[0, 100]"),
      optimizer=Key(
          str, "adamw", "Adafactor keeps the rows' and columns' means of the "
          "squared gradients in place of the squares. Its steps are of AdamW's "
          "size.", choices=("adamw", "adafactor")),
      moments_dtype=Key(
          str, "float32", "Of what the optimizer keeps that has the shape of "
          "the parameters: AdamW's mean and square (this one rounded at "
          "random, so that small changes count on average), Adafactor's mean.",
          choices=("float32", "bfloat16")),
      beta1=Key(float, 0.9, "Decay of the mean, which is of gradients (AdamW) "
                "or of their directions (Adafactor; 0: none is kept).",
                "[0, 1)"),
      beta2=Key(float, 0.999, "Decay of the square; Adafactor's is "
                "1 - step**-0.8 until that is larger.", "[0, 1)"),
      eps=Key(float, 1e-8, "Added to the denominator.", "[1e-30, 1]",
              needs=Needs("optimizer", "==", "adamw")),
      max_grad_norm=Key(
          float, 1.0, "Global norm to which gradients are clipped.",
          "[1e-6, 1e12]"),
      router_aux_coef=Key(
          float, 0.0, "Weight of the loss that spreads tokens over experts, "
          "with counts of the whole batch. For a model with experts.",
          "[0, 1000]"),
  )


def weights() -> dict[str, Any]:
  """Keys for the trainable parameters of a stage."""
  adapted = Needs("lora.rank", ">", 0)
  return dict(
      trained=Key(
          str, "", "A regular expression that matches the whole path of each "
          'parameter that is trained, such as "blocks/(q|k|v|o)"; "": the '
          "adapters if lora.rank is above 0, else everything. The rest is kept "
          "as compute.frozen_dtype says."),
      lora=Section(
          "Low-rank adapters. A stage goes on with those of the stage before "
          "if they are alike; others are first added to the weights.",
          rank=Key(int, 0, "Of the adapters; 0: none.", "[0, 65536]"),
          alpha=Key(
              float, 16.0, "The adapter's product counts alpha / rank times.",
              "[1e-3, 1e6]", needs=adapted),
          targets=Key(
              tuple[str, ...], tuple(INPUT_AXES), "The matrices beside which "
              "adapters stand.", choices=tuple(INPUT_AXES), needs=adapted),
          rslora=Key(
              bool, False, "alpha / sqrt(rank) instead (rsLoRA).",
              needs=adapted),
          decode=Key(
              str, "live", "What the sampler's decode loop multiplies by: "
              "weights and adapters, or their sum, which is made anew for "
              "each of its calls. The logprobs are the same to rounding.",
              choices=LORA_DECODE, needs=adapted)))


def health(**more: Key) -> Section:
  return Section(
      "When to stop with advice, or to skip an update.",
      on_bad_step=Key(
          str, "stop", "A loss or gradient norm that is not finite, or a "
          "spike: the run stops and its batch is saved, or the update is "
          "skipped and counted.", choices=("stop", "skip")),
      max_skips=Key(
          int, 5, "Updates skipped so in a row before the run stops.",
          "[1, inf)", needs=Needs("health.on_bad_step", "==", "skip")),
      spike_mads=Key(
          float, 0.0, "A loss is a spike if it is above the median of the last "
          "losses by more than so many of their median absolute deviations, "
          "such as 10; 0: none is.", "0 or [0.01, 1e6]"),
      spike_window=Key(
          int, 64, "Losses that the median is of; before there are so many, "
          "none is a spike.", "[4, 65536]",
          needs=Needs("health.spike_mads", ">", 0)),
      **more)


def checkpoint() -> Section:
  best = Needs("checkpoint.keep_best", ">", 0)
  return Section(
      "What is saved and kept.",
      every=Key(
          int, 0, "Steps between checkpoints; 0: one, at the end.",
          "[0, inf)"),
      keep=Key(int, 2, "Most recent checkpoints kept.", "[1, inf)"),
      keep_best=Key(
          int, 0, "Best checkpoints kept beside the recent ones.",
          "[0, inf)"),
      best_metric=Key(
          str, "", "A name in metrics.jsonl that ranks checkpoints.",
          needs=best),
      best_mode=Key(
          str, "max", "Which end of the metric is best.",
          choices=("max", "min"), needs=best),
      on_damaged=Key(
          str, "error", "The newest checkpoint cannot be read at a resume: "
          "stop, or move it away and go on from the one before.",
          choices=("error", "previous")),
  )


def thinking() -> Section:
  used = Needs("thinking.end", "!=", "")
  return Section(
      "The strings around the thinking, for budgets and for metrics.",
      start=Key(str, "<think>", 'Opens the thinking; "": a completion '
                "begins in it.", needs=used),
      end=Key(str, "</think>", 'Closes it; "": the model does not think.'),
      delimiters=Key(
          tuple[str, ...], (), "Further strings that end thinking when the "
          "model samples them.", needs=used),
      newline=Key(
          str, "\n", "Put before a forced `end` unless the last token ends "
          "in a newline.", needs=used),
      final_answer=Key(
          str, "", "Put after an `end` forced at the maximum.",
          needs=used),
      wait_text=Key(
          str, "Wait", "Replaces a delimiter while waits are left.",
          needs=used),
      more_wait_texts=Key(
          tuple[str, ...], (), "Further wait texts: the waits of a "
          "completion take that one and these in turn.",
          needs=used),
      step=Key(
          str, "", "Ends a step of the thinking, such as a blank line; "
          '"": steps are not counted.',
          needs=used),
  )


def steering() -> dict[str, Key]:
  """Keys for sampling options of a rollout other than its budgets."""
  return dict(
      wait_order=Key(
          str, "cycle", "Which text a wait takes: thinking.wait_text and "
          "thinking.more_wait_texts in turn, or one that is drawn.",
          choices=("cycle", "draw")),
      policy=Key(
          str, "", "What changes the budgets of every step: function(budgets, "
          "state) -> budgets; see docs/sampler.md.", function=True))


def changed_logits() -> dict[str, Key]:
  """Names the keys that change the sampling distribution."""
  return dict(
      suppress=Key(
          tuple[str, ...], (), "Words that are not sampled while thinking "
          "(NoWait), each a token of its own."),
      hook=Key(
          str, "", "What changes the logits of every step: "
          "function(vocab_size) -> Hook; see docs/sampler.md.",
          function=True),
      hook_args=Key(
          dict, {}, "What every completion gives to the hook.",
          needs=Needs("rollout.hook", "!=", "")))


def instructions() -> Section:
  """Cells of an evaluation whose prompts ask for an amount of thinking."""
  asks = lambda name: Needs(f"instructions.{name}", "!=", ())
  text = lambda name, needs: Key(
      str, TEXTS[name], "What is put behind the question"
      + ("; {n} is the amount." if "{n}" in TEXTS[name] else "."),
      needs=asks(needs))
  return Section(
      "Cells whose prompts ask for an amount of thinking (s1's token-, step- "
      "and class-conditional control).",
      tokens=Key(tuple[int, ...], (), "Amounts of thinking tokens, each a "
                 "cell.", "[1, inf)"),
      steps=Key(tuple[int, ...], (), "Amounts of steps that end in "
                "thinking.step, each a cell.", "[1, inf)"),
      classes=Key(tuple[str, ...], (), "Classes, each a cell.",
                  choices=CLASSES),
      forced=Key(bool, False, "Each amount is a second cell, in which it is "
                 "forced as well."),
      token_text=text("tokens", "tokens"), step_text=text("steps", "steps"),
      short_text=text("short", "classes"), long_text=text("long", "classes"))
