"""Keys and checks shared by the kinds of stages that sample completions."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from posttrain.config import checks, keys
from posttrain.config.keys import REQUIRED, Key, Needs, Renamed, Section
from posttrain.model.config import SAMPLING_DTYPES
from posttrain.text import budget_rules


def problems(split: str, **extra: Key) -> Section:
  """Keys for the source of a stage's prompts."""
  return Section(
      "Source of the prompts.",
      task=Key(str, REQUIRED, "Function that gives the problems.",
               function=True),
      split=Key(str, split, "The task's split."),
      args=Key(dict, {}, "Further keyword arguments of the task."),
      **extra)


SINGLE_TURN = "posttrain.episodes.single_turn:single_turn"
# Keys of a stage that samples episodes.
EPISODE: dict[str, Any] = dict(
    episode=Key(
        str, SINGLE_TURN, "Episode: a generator function, function(task, "
        "**episode_args), that asks for tokens and for host work, and ends "
        "with what is scored; see docs/episodes.md. The default is one "
        "completion of the problem's prompt.", function=True),
    episode_args=Key(dict, {}, "Its keyword arguments.",
                     needs=Needs("episode", "!=", SINGLE_TURN)))

# Keys of the section `rollout`.
ROLLOUT: dict[str, Any] = dict(
    max_prompt_tokens=Key(int, REQUIRED, "Longest prompt, in tokens. A longer "
                          "one is an error.", "[1, inf)"),
    max_tokens=Key(int, REQUIRED, "Longest completion, in tokens, thinking "
                   "included (TRL: max_completion_length).", "[1, inf)"),
    max_episode_tokens=Key(
        int, 0, "Most tokens of an episode behind its prompt, in turns of up "
        "to max_tokens and the observations between them. Turns may then go on "
        "from others, which are kept in a prefix cache, and end at strings. "
        "0: they may not, and a turn is a completion.", "[0, inf)",
        needs=Needs("episode", "!=", SINGLE_TURN)),
    prefix_cache_tokens=Key(
        int, 0, "Size of that prefix cache, in tokens. What it cannot hold is "
        "computed again. 0: as large as the KV cache.", "[0, inf)",
        needs=Needs("rollout.max_episode_tokens", ">", 0)),
    truncate=Key(bool, False, "A completion that reaches its maximum of "
                 "thinking tokens or steps stops there. Otherwise budget "
                 "forcing closes its thinking, and it answers."),
    chunk=Key(int, 32, "Decode chunk: tokens that one call of the compiled "
              "decode loop samples. It changes no token. Preemption (SIGTERM) "
              "is noticed between two chunks, so a chunk should take well "
              "under the grace period.", "[1, 65536]"),
    cache_dtype=Key(str, "compute", "Precision of the KV cache: compute.dtype, "
                    "or int8 with a float32 scale for each head and token.",
                    choices=SAMPLING_DTYPES),
    weights_dtype=Key(
        str, "compute", "Precision of the matrices in the decode loop: as they "
        "are, or int8 with a float32 scale for each output, quantised again "
        "at each call. Not for experts.", choices=SAMPLING_DTYPES),
    wait_order=Key(str, "cycle", "Order of the wait texts: thinking.wait_text "
                   "and thinking.more_wait_texts in turn, or drawn at random.",
                   choices=("cycle", "draw")),
    budget_schedule=Key(str, "", "Budget schedule: function(budgets, state) -> "
                        "budgets, which may change each row's thinking budget "
                        "at every step; see docs/sampler.md.", function=True),
    confidence_window=Key(
        int, 0, "Tokens in the sliding window of the group confidence "
        "(DeepConf, arXiv 2508.15260). Each row's running entropy and "
        "confidence are then kept for records, metrics and budget schedules. "
        "0: off.", "[0, inf)"),
    confidence_top_k=Key(
        int, 20, "Largest logprobs that a token's confidence averages.",
        "[1, inf)", needs=Needs("rollout.confidence_window", ">", 0)),
    policy=Renamed("rollout.budget_schedule"))


def max_num_seqs(default: int, bounds: str, more: str = "") -> Key:
  """Makes the key for the number of sequences that decode together."""
  return Key(
      int, default, "Sequences that decode together at most (vLLM: "
      "max_num_seqs); the KV cache holds this many. A completion that ends "
      f"makes room for the next (continuous batching).{more}", bounds)


# Keys of the same section where all completions have one budget.
BUDGET: dict[str, Key] = dict(
    max_thinking_tokens=Key(
        int, -1, "Budget forcing: the thinking is closed at this many tokens. "
        "-1: no maximum.", "[-1, inf)"),
    min_thinking_tokens=Key(int, 0, "Budget forcing: the thinking cannot end "
                            "before this many tokens.", "[0, inf)"),
    num_waits=Key(int, 0, "Budget forcing: this many ends of the thinking are "
                  "replaced by thinking.wait_text.", keys.WAITS),
    max_thinking_steps=Key(
        int, -1, "Budget forcing: the thinking is closed after this many "
        "steps, which end in thinking.step. -1: no maximum.", "[-1, inf)"))

WORKERS = Section(
    "Worker processes for rewards, extractors and calls of episodes. They run "
    "on process 0 while completions are sampled. A run may be resumed with "
    "other values.",
    num_workers=Key(int, 2, "Worker processes, each with one call at a time.",
                    "[1, 1024]"),
    seconds=Key(float, 10.0, "Deadline of a call. One that takes longer is "
                "killed, with all that it has started, and its completion has "
                "no score (status timeout).", "(0, 1e6]"),
    memory_gb=Key(float, 4.0, "Address space of a worker, in GiB. A call that "
                  "needs more fails (status error).", "[0.5, 1e6]"),
    output_bytes=Key(int, 4096, "Bytes of a call's output that are kept with "
                     "the record. More is dropped.", "[0, 1048576]"))

SAMPLED = Needs("rollout.temperature", ">", 0)
TEMPERATURE = Key(float, 1.0, "Sampling temperature. 0: greedy, the likeliest "
                  "token.", f"0 or {keys.TEMPERATURES}")
TRUNCATIONS: dict[str, Key] = dict(
    top_k=Key(int, 0, "Top-k sampling: likeliest tokens that are kept. 0: all.",
              "[0, inf)", needs=SAMPLED),
    top_p=Key(float, 1.0, "Top-p (nucleus) sampling: probability mass that is "
              "kept.", "(0, 1]", needs=SAMPLED),
    min_p=Key(float, 0.0, "Min-p sampling: least probability that is kept, "
              "relative to the likeliest token's.", "[0, 1]", needs=SAMPLED))

# Keys of the same section where sampling may leave the model's distribution.
LOGITS: dict[str, Any] = dict(
    suppress=Key(tuple[str, ...], (), "Words that are not sampled while the "
                 "model thinks (NoWait). Each must be one token."),
    logits_processor=Key(
        str, "", "Logits processor: function(vocab_size) -> LogitsProcessor, "
        "which may change the logits of every step; see docs/sampler.md.",
        function=True),
    logits_processor_args=Key(
        dict, {}, "Arguments of the logits processor, the same for every "
        "completion.", needs=Needs("rollout.logits_processor", "!=", "")),
    hook=Renamed("rollout.logits_processor"),
    hook_args=Renamed("rollout.logits_processor_args"))


def longest(rollout: Mapping) -> int:
  """Returns the most tokens of a prompt and all that is behind it."""
  return rollout["max_prompt_tokens"] + max(
      rollout["max_tokens"], rollout["max_episode_tokens"])


def check_episode(config, name: str, stage: Mapping) -> Iterator[str]:
  rollout = stage["rollout"]
  if 0 < rollout["max_episode_tokens"] < rollout["max_tokens"]:
    yield (f"rollout.max_episode_tokens: {rollout['max_episode_tokens']} is "
           f"less than rollout.max_tokens={rollout['max_tokens']}, which no "
           "turn could then have. Raise the one or lower the other.")


def check_weights_dtype(config, name: str, stage: Mapping) -> Iterator[str]:
  dtype = stage["rollout"]["weights_dtype"]
  if dtype == "int8" and checks.experts(config):
    yield (f"rollout.weights_dtype: {dtype!r} does not quantise experts yet, "
           "and the model has them. Use 'compute'.")


def check_truncate(rollout: Mapping, maximum: Any, where: str) -> Iterator[str]:
  """Checks for a maximum, which a budget schedule may set too."""
  if rollout["truncate"] and not (maximum or rollout["budget_schedule"]):
    yield ("rollout.truncate: set, but it has no effect without a maximum of "
           f"thinking; set {where}.")


def budget_problems(
    config: Mapping, budget: Mapping[str, Any],
    paths: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[str]:
  """Checks the fields of a budget, which are at `paths`, else in `rollout`."""
  thinking = config["thinking"]
  return budget_rules.problems(
      budget, end=thinking["end"], step=thinking["step"],
      more_wait_texts=thinking["more_wait_texts"],
      name=lambda field: paths.get(
          field, field if "." in field else f"rollout.{field}"))
