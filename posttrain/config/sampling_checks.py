"""Checks of what stages sample: budgets, cells, instructions.

As in `checks`, each is a small function that yields problems which begin with
a path inside the stage.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.config.keys import shown
from posttrain.text.instructions import CLASSES, TEXTS


def check_rollout_budgets(config, name: str, stage: Mapping) -> Iterator[str]:
  rollout = stage["rollout"]
  low, high = (rollout[f"{end}_thinking_tokens"] for end in ("min", "max"))
  if 0 <= high < low:
    yield (f"rollout.min_thinking_tokens: {low} is above "
           f"rollout.max_thinking_tokens={high}.")
  for key, value in (("min_thinking_tokens", low),
                     ("max_thinking_tokens", high)):
    if value > rollout["max_tokens"]:
      yield (f"rollout.{key}: {value} is more than "
             f"rollout.max_tokens={rollout['max_tokens']}.")
  if rollout["max_thinking_steps"] >= 0:
    yield from _counts_steps(config, "rollout.max_thinking_steps")
  if high >= 0 or low > 0 or rollout["num_waits"]:
    yield from _thinks(config, "rollout.max_thinking_tokens" if high >= 0 else
                       "rollout.min_thinking_tokens" if low > 0 else
                       "rollout.num_waits")
  yield from _draws_waits(config, rollout, rollout["num_waits"])
  yield from _truncates(rollout, high >= 0 or (
      rollout["max_thinking_steps"] >= 0), "rollout.max_thinking_tokens or "
      "rollout.max_thinking_steps")


def check_slots(config, name: str, stage: Mapping) -> Iterator[str]:
  slots = stage["rollout"]["slots"]
  completions = stage["num_groups"] * stage["group_size"]
  if slots >= completions:
    yield (f"rollout.slots: {slots} is not below the num_groups x group_size "
           f"= {completions} completions of a batch, so no place would be "
           "refilled. Use fewer, or 0 for all of them at once.")


def check_cells(config, name: str, stage: Mapping) -> Iterator[str]:
  room = stage["rollout"]["max_tokens"]
  for key in ("max_thinking_tokens", "wait_max_thinking_tokens"):
    for budget in stage[key]:
      if budget > room:
        yield (f"{key}: {budget} is more than rollout.max_tokens={room}.")
  for key in ("max_thinking_tokens", "num_waits", "wait_max_thinking_tokens",
              "pass_at", "checkpoints"):
    if len(set(stage[key])) < len(stage[key]):
      yield f"{key}: a value is there twice in {shown(stage[key])}."
  for key in ("max_thinking_tokens", "num_waits"):
    if any(stage[key]):
      yield from _thinks(config, key)
  if stage["rollout"]["suppress"]:
    yield from _thinks(config, "rollout.suppress")
  yield from _draws_waits(
      config, stage["rollout"], max(stage["num_waits"], default=0))
  yield from _truncates(
      stage["rollout"], stage["max_thinking_tokens"]
      or max(stage["wait_max_thinking_tokens"], default=-1) >= 0
      or stage["instructions"]["forced"], "max_thinking_tokens or "
      "instructions.forced")


def check_instructions(config, name: str, stage: Mapping) -> Iterator[str]:
  asked = stage["instructions"]
  for key in ("tokens", "steps", "classes"):
    if len(set(asked[key])) < len(asked[key]):
      yield (f"instructions.{key}: a value is there twice in "
             f"{shown(asked[key])}.")
    if asked[key]:
      yield from _thinks(config, f"instructions.{key}")
  if asked["steps"]:
    yield from _counts_steps(config, "instructions.steps")
  for key in ("token_text", "step_text"):
    if "{n}" not in asked[key]:
      yield (f"instructions.{key}: found {shown(asked[key])}, needed a text "
             "with {n} where the amount stands.")
  if asked["forced"] and not (asked["tokens"] or asked["steps"]):
    yield ("instructions.forced: set, but it has no effect unless "
           "instructions.tokens or instructions.steps is set.")
  for kind in CLASSES:
    if asked[f"{kind}_text"] != TEXTS[kind] and kind not in asked["classes"]:
      yield (f"instructions.{kind}_text: set, but it has no effect: the class "
             f"is not in instructions.classes={shown(asked['classes'])}.")
  room = stage["rollout"]["max_tokens"]
  for amount in asked["tokens"] if asked["forced"] else ():
    if amount > room:
      yield (f"instructions.tokens: {amount} is more than "
             f"rollout.max_tokens={room}.")


def check_samples(config, name: str, stage: Mapping) -> Iterator[str]:
  for k in stage["pass_at"]:
    if k > stage["samples_per_problem"]:
      yield (f"pass_at: {k} needs as many samples; found "
             f"samples_per_problem={stage['samples_per_problem']}.")
  if stage["majority"]["max_samples"] and not stage["rollout"]["temperature"]:
    yield ("majority.max_samples: votes are all the same at "
           "rollout.temperature=0; raise it.")


def _draws_waits(
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


def _truncates(
    rollout: Mapping, maximum: Any, keys: str,
) -> Iterator[str]:
  """A policy may set a maximum too."""
  if rollout["truncate"] and not (maximum or rollout["policy"]):
    yield ("rollout.truncate: set, but it has no effect without a maximum of "
           f"thinking; set {keys}.")


def _counts_steps(config: Mapping, path: str) -> Iterator[str]:
  if not config["thinking"]["step"]:
    yield (f"{path}: set, but thinking.step is empty; set it to the string "
           'that ends a step, such as "\\n\\n".')


def _thinks(config: Mapping, path: str) -> Iterator[str]:
  if not config["thinking"]["end"]:
    yield f"{path}: set, but thinking.end is empty; set thinking.end."


GRPO = (check_rollout_budgets, check_slots)
EVALUATE = (check_cells, check_samples, check_instructions)
