"""Keys and checks that all kinds of stages have which sample completions."""

from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.config import checks
from posttrain.config.keys import REQUIRED, Key, Needs, Section
from posttrain.model.config import SAMPLING_DTYPES


def problems(split: str, **extra: Key) -> Section:
  return Section(
      "Where prompts come from.",
      task=Key(str, REQUIRED, "What gives problems.", function=True),
      split=Key(str, split, "The task's split."),
      args=Key(dict, {}, "More keyword arguments of the task."),
      **extra)


PROMPT_TOKENS = Key(
    int, REQUIRED, "Room for the prompt; a longer one is an error.",
    "[1, inf)")
MAX_TOKENS = Key(
    int, REQUIRED, "Room for the completion, thinking included.", "[1, inf)")
TRUNCATE = Key(
    bool, False, "At a maximum of thinking tokens or steps the completion "
    "stops, unclosed.")
CHUNK = Key(
    int, 32, "Tokens decoded per device call; changes no token. SIGTERM is "
    "looked at in between: a call should take well under the grace period.",
    "[1, 65536]")
DTYPES = dict(
    cache_dtype=Key(
        str, "compute", "Of cached keys and values: as compute.dtype, or 8 "
        "bits with a float32 for each head and token.",
        choices=SAMPLING_DTYPES),
    weights_dtype=Key(
        str, "compute", "Of the matrices that the decode loop multiplies by: "
        "as they are, or 8 bits with a float32 for each output, made anew "
        "for each call. Not for experts.", choices=SAMPLING_DTYPES))


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


def check_weights_dtype(config, name: str, stage: Mapping) -> Iterator[str]:
  dtype = stage["rollout"]["weights_dtype"]
  if dtype == "int8" and checks.experts(config):
    yield (f"rollout.weights_dtype: {dtype!r} does not quantise experts yet, "
           "and the model has them. Use 'compute'.")


def draws_waits(
    config: Mapping, rollout: Mapping, num_waits: int,
) -> Iterator[str]:
  if rollout["wait_order"] == "cycle":
    return
  if not config["thinking"]["more_wait_texts"]:
    yield ("rollout.wait_order: set to 'draw', but there is one text to draw "
           "from; set thinking.more_wait_texts.")
  if not num_waits:
    yield ("rollout.wait_order: set to 'draw', but it has no effect unless "
           "there are waits; set num_waits.")


def truncates(
    rollout: Mapping, maximum: Any, keys: str,
) -> Iterator[str]:
  """A policy may set a maximum too."""
  if rollout["truncate"] and not (maximum or rollout["policy"]):
    yield ("rollout.truncate: set, but it has no effect without a maximum of "
           f"thinking; set {keys}.")


def counts_steps(config: Mapping, path: str) -> Iterator[str]:
  if not config["thinking"]["step"]:
    yield (f"{path}: set, but thinking.step is empty; set it to the string "
           'that ends a step, such as "\\n\\n".')


def thinks(config: Mapping, path: str) -> Iterator[str]:
  if not config["thinking"]["end"]:
    yield f"{path}: set, but thinking.end is empty; set thinking.end."
