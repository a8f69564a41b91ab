"""Stages of kind `evaluate`: accuracy, and how it scales with thinking."""

from collections.abc import Iterator, Mapping

from posttrain.config import checks, keys
from posttrain.config.keys import REQUIRED, Key, Needs, Section, shown
from posttrain.config.stages import StageSchema, sampling
from posttrain.text.instructions import CLASSES, TEXTS


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


KEYS = Section(
    "Accuracy, and how it scales with thinking tokens.",
    problems=sampling.problems(
        "test", count=Key(
            int, 0, "The first so many problems; 0: all.", "[0, inf)")),
    reward=Key(
        str, REQUIRED, "What scores a completion; 1 is correct.",
        function=True),
    extract=Key(
        str, "", "What turns a completion into its canonical answer, for "
        "votes.", function=True),
    baseline=Key(
        str, "", "What scores the best constant answer: function(split, "
        "count=..., **args) -> answer, correct.", function=True),
    checkpoints=Key(
        tuple[str, ...], (), 'Earlier stages, "init", or checkpoint '
        'directories; unset: "init" and every earlier training stage.'),
    samples_per_problem=Key(
        int, 1, "Completions per problem and cell.", keys.SAMPLES,
        needs=Needs("rollout.temperature", ">", 0)),
    pass_at=Key(
        tuple[int, ...], (1,), "Values of k for pass@k.", "[1, inf)"),
    max_thinking_tokens=Key(
        tuple[int, ...], (), "Budgets of the curve, each a cell.",
        "[0, inf)"),
    num_waits=Key(
        tuple[int, ...], (), "Numbers of forced waits, each a cell.",
        keys.WAITS),
    wait_max_thinking_tokens=Key(
        tuple[int, ...], (), "Budgets of the cells of waits, each with every "
        "number of waits; -1: no maximum, so that a row may use up its tokens "
        "without an answer; unset: the largest of max_thinking_tokens, or no "
        "maximum without any.", "[-1, inf)",
        needs=Needs("num_waits", "!=", ())),
    instructions=instructions(),
    majority=Section(
        "The majority-vote baseline at equal tokens.",
        max_samples=Key(
            int, 0, "Votes at most; 0: no baseline.", f"0 or {keys.SAMPLES}",
            needs=Needs("extract", "!=", ""))),
    rollout=Section(
        "How completions are drawn.",
        max_prompt_tokens=sampling.PROMPT_TOKENS,
        max_tokens=sampling.MAX_TOKENS,
        temperature=Key(float, 1.0, "0: the likeliest token.",
                        f"0 or {keys.TEMPERATURES}"),
        top_k=Key(int, 0, "Likeliest tokens kept; 0: all.", "[0, inf)",
                  needs=Needs("rollout.temperature", ">", 0)),
        top_p=Key(float, 1.0, "Probability mass kept.", "(0, 1]",
                  needs=Needs("rollout.temperature", ">", 0)),
        min_p=Key(float, 0.0, "Least probability kept, relative to the "
                  "likeliest token's.", "[0, 1]",
                  needs=Needs("rollout.temperature", ">", 0)),
        truncate=sampling.TRUNCATE,
        batch_rows=Key(int, 64, "Completions decoded together.", "[1, inf)"),
        refill=Key(
            bool, False, "The place of a completion that ends is refilled; "
            "otherwise a batch waits for its longest."),
        chunk=sampling.CHUNK,
        **sampling.DTYPES,
        **sampling.steering(),
        **sampling.changed_logits(),
    ),
)


def check_checkpoints(config, name: str, stage: Mapping) -> Iterator[str]:
  for checkpoint in stage["checkpoints"]:
    yield from checks.weights_problem(config, name, "checkpoints", checkpoint)


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
      yield from sampling.thinks(config, key)
  if stage["rollout"]["suppress"]:
    yield from sampling.thinks(config, "rollout.suppress")
  yield from sampling.draws_waits(
      config, stage["rollout"], max(stage["num_waits"], default=0))
  yield from sampling.truncates(
      stage["rollout"], stage["max_thinking_tokens"]
      or max(stage["wait_max_thinking_tokens"], default=-1) >= 0
      or stage["instructions"]["forced"], "max_thinking_tokens or "
      "instructions.forced")


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
  for key in ("tokens", "steps", "classes"):
    if len(set(asked[key])) < len(asked[key]):
      yield (f"instructions.{key}: a value is there twice in "
             f"{shown(asked[key])}.")
    if asked[key]:
      yield from sampling.thinks(config, f"instructions.{key}")
  if asked["steps"]:
    yield from sampling.counts_steps(config, "instructions.steps")
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


SCHEMA = StageSchema(
    keys=KEYS, checks=(check_checkpoints, check_cells, check_samples,
                       check_instructions, sampling.check_weights_dtype),
    samples=True)
