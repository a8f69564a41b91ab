"""The shapes of a config, without its weights and its data."""

import numpy as np
from ml_collections import config_dict

from posttrain import weights
from posttrain.plan.environment import PlanError
from posttrain.sampler import budget_tables
from posttrain.stages import sampling
from posttrain.stages.stage import Setup, stage_of
from posttrain.text import thinking

# Fields of a kind's record, and what a plan does without them.
LACKING = {
    "programs": "no program of it is compiled",
    "memory": "its memory is that of its parameters alone",
    "work": "its steps are in no estimate of time"}


def set_up(config: config_dict.ConfigDict) -> Setup:
  """Finds the shapes of a config, with its tokenizer or without.

  Raises:
    PlanError: the vocabulary is the tokenizer's, and that cannot be read.
  """
  strings = thinking.Thinking(**config.thinking)
  notes = tuple(
      f"{name}: the kind {config[name].kind} gives no `{field}`, so {effect}."
      for name in config.stages for field, effect in LACKING.items()
      if getattr(stage_of(config[name].kind), field) is None)
  try:
    tokenizer = weights.tokenizer(config, None)
  except (ValueError, OSError) as error:
    return _without_tokenizer(config, strings, error, notes)
  ids = thinking.resolve(strings, tokenizer)
  return Setup(
      config, weights.model_config(config, tokenizer.vocab_size), ids,
      sampling.make_tables(tokenizer, ids), tokenizer, notes)


def _without_tokenizer(
    config: config_dict.ConfigDict, strings: thinking.Thinking,
    error: Exception, notes: tuple[str, ...],
) -> Setup:
  size = weights.model_config(config, 0).vocab_size
  if not size:
    raise PlanError(
        "the vocabulary is that of the tokenizer, which cannot be read here: "
        f"{error} Set model_overrides.vocab_size for the plan.") from error
  numbers = iter(range(1, size))
  one = lambda text: (next(numbers),) if text else ()
  end = one(strings.end)
  ids = thinking.ThinkingIds() if not end else thinking.ThinkingIds(
      start=one(strings.start), end=end,
      delimiters=(end, *map(one, strings.delimiters)),
      newline=one(strings.newline), final_answer=one(strings.final_answer),
      wait=one(strings.wait_text),
      more_waits=tuple(map(one, strings.more_wait_texts)),
      step=one(strings.step))
  tables = budget_tables.BudgetTables.build(
      ids, (0,), np.zeros(size, bool), size)
  return Setup(
      config, weights.model_config(config, size), ids, tables, None, (
          *notes, f"The tokenizer is not here ({error}): the vocabulary is the "
          f"model's {size}, and each thinking string counts as one token.",))
