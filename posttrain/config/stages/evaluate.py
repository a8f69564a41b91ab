"""Stages of kind `evaluate`: accuracy, and how it scales with thinking."""

from collections.abc import Iterator, Mapping

from posttrain.config import checks, keys, reader
from posttrain.config.keys import REQUIRED, Key, Needs, Section, shown
from posttrain.config.stages import StageSchema, sampling
from posttrain.text.instructions import CLASSES, TEXTS

_text = lambda name, asked: Key(
    str, TEXTS[name], "Text that is put after the question"
    + ("; {n} is the amount." if "{n}" in TEXTS[name] else "."),
    needs=Needs(f"instructions.{asked}", "!=", ()))
INSTRUCTIONS = Section(
    "Cells whose prompts ask for an amount of thinking (s1's token-, step- "
    "and class-conditional control).",
    tokens=Key(tuple[int, ...], (), "Amounts of thinking tokens, each a "
               "cell.", "[1, inf)"),
    steps=Key(tuple[int, ...], (), "Amounts of steps that end in "
              "thinking.step, each a cell.", "[1, inf)"),
    classes=Key(tuple[str, ...], (), "Classes of length, each a cell.",
                choices=CLASSES),
    forced=Key(bool, False, "Budget forcing: each amount is a second cell, "
               "in which it is forced as well."),
    token_text=_text("tokens", "tokens"), step_text=_text("steps", "steps"),
    short_text=_text("short", "classes"), long_text=_text("long", "classes"))
ROLLOUT = Section(
    "Sampling of completions.",
    **sampling.ROLLOUT,
    temperature=sampling.TEMPERATURE,
    **sampling.TRUNCATIONS,
    max_num_seqs=sampling.max_num_seqs(64, "[1, inf)"),
    batch_rows=keys.Renamed("rollout.max_num_seqs"),
    **{name: keys.Refused(
        "sampling is always continuous batching now. Remove the key; "
        "rollout.max_num_seqs is the number of sequences that decode together")
       for name in ("continuous_batching", "refill")},
    **sampling.LOGITS,
)

KEYS = Section(
    "Accuracy, and how it scales with thinking tokens. A cell is one budget or "
    "instruction, under which every problem is asked.",
    problems=sampling.problems(
        "test", count=Key(
            int, 0, "Problems that are asked, the first of the split. 0: all.",
            "[0, inf)")),
    **sampling.EPISODE,
    reward=Key(str, REQUIRED, "Reward function that scores a completion. 1 is "
               "correct.", function=True),
    extract=Key(str, "", "Function that turns a completion into its canonical "
                "answer, for majority votes.", function=True),
    baseline=Key(str, "", "Function that scores the best constant answer: "
                 "function(split, count=..., **args) -> answer, correct.",
                 function=True),
    workers=sampling.WORKERS,
    checkpoints=Key(tuple[str, ...], (), "Weights that are evaluated: earlier "
                    'stages, "init", or checkpoint directories. Unset: "init" '
                    "and every earlier training stage."),
    samples_per_problem=Key(int, 1, "Completions per problem and cell.",
                            keys.SAMPLES, needs=sampling.SAMPLED),
    pass_at=Key(tuple[int, ...], (1,), "Values of k for pass@k.", "[1, inf)"),
    max_thinking_tokens=Key(
        tuple[int, ...], (), "Budget forcing: budgets of thinking tokens, each "
        "a cell and a point of the scaling curve.", "[0, inf)"),
    num_waits=Key(tuple[int, ...], (), "Budget forcing: numbers of forced "
                  "waits, each a cell.", keys.WAITS),
    wait_max_thinking_tokens=Key(
        tuple[int, ...], (), "Budgets of the cells of waits, each with every "
        "number of waits. -1: no maximum, so that a completion may use up its "
        "tokens without an answer. Unset: the largest of max_thinking_tokens, "
        "or no maximum without any.", "[-1, inf)",
        needs=Needs("num_waits", "!=", ())),
    instructions=INSTRUCTIONS,
    majority=Section(
        "Majority vote (self-consistency) at equal tokens, as a baseline.",
        max_samples=Key(
            int, 0, "Most votes. 0: no baseline.", f"0 or {keys.SAMPLES}",
            needs=Needs("extract", "!=", ""))),
    rollout=ROLLOUT,
)


def check_checkpoints(config, name: str, stage: Mapping) -> Iterator[str]:
  for checkpoint in stage["checkpoints"]:
    yield from checks.weights_problem(config, name, "checkpoints", checkpoint)


# What names budgets, a cell for each: the field of a request that it sets.
CELLS = {
    "max_thinking_tokens": "max_thinking_tokens",
    "wait_max_thinking_tokens": "max_thinking_tokens",
    "num_waits": "num_waits", "instructions.tokens": "max_thinking_tokens",
    "instructions.steps": "max_thinking_steps"}


def check_cells(config, name: str, stage: Mapping) -> Iterator[str]:
  rollout, asked = stage["rollout"], stage["instructions"]
  for path, field in CELLS.items():
    for value in reader.at(stage, path):
      budget = {field: value, "max_tokens": rollout["max_tokens"]}
      if path.startswith("instructions.") and not asked["forced"]:
        del budget["max_tokens"]  # The model is asked, and may not obey.
      yield from sampling.budget_problems(config, budget, {field: path})
  yield from sampling.budget_problems(
      config, {"suppress": asked["classes"]},
      {"suppress": "instructions.classes"})
  waits = max(stage["num_waits"], default=0)
  yield from sampling.budget_problems(
      config, {**rollout, "num_waits": waits}, {"num_waits": "num_waits"})
  yield from sampling.check_truncate(
      rollout, stage["max_thinking_tokens"] or asked["forced"]
      or max(stage["wait_max_thinking_tokens"], default=-1) >= 0,
      "max_thinking_tokens or instructions.forced")


def check_twice(config, name: str, stage: Mapping) -> Iterator[str]:
  for path in (*CELLS, "instructions.classes", "pass_at", "checkpoints"):
    values = reader.at(stage, path)
    if len(set(values)) < len(values):
      yield f"{path}: a value is there twice in {shown(values)}."


def check_samples(config, name: str, stage: Mapping) -> Iterator[str]:
  for k in stage["pass_at"]:
    if k > stage["samples_per_problem"]:
      yield (f"pass_at: {k} needs as many samples; found "
             f"samples_per_problem={stage['samples_per_problem']}.")
  if stage["majority"]["max_samples"] and not stage["rollout"]["temperature"]:
    yield ("majority.max_samples: votes are all the same at "
           "rollout.temperature=0; raise it.")


def check_instructions(config, name: str, stage: Mapping) -> Iterator[str]:
  asked = stage["instructions"]
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


SCHEMA = StageSchema(
    keys=KEYS, checks=(
        check_checkpoints, check_cells, check_twice, check_samples,
        check_instructions, sampling.check_episode,
        sampling.check_weights_dtype),
    samples=True)
