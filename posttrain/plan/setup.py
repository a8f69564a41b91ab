"""What a config says about shapes, without its weights and its data."""

import dataclasses

import numpy as np
from ml_collections import config_dict

from posttrain import weights
from posttrain.model.config import ModelConfig
from posttrain.plan.environment import PlanError
from posttrain.sampler import budget_tables
from posttrain.stages import sampling
from posttrain.text import thinking
from posttrain.text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Setup:
  """A config as far as its programs need it.

  Attributes:
    model: with the vocabulary filled in.
    tokenizer: None where it is not on this machine.
    notes: what had to be assumed, for the report.
  """

  config: config_dict.ConfigDict
  model: ModelConfig
  thinking_ids: thinking.ThinkingIds
  tables: budget_tables.BudgetTables
  tokenizer: tokenizer_lib.Tokenizer | None
  notes: tuple[str, ...] = ()

  def tables_of(
      self, rollout: config_dict.ConfigDict) -> budget_tables.BudgetTables:
    """The tables of a section, which may suppress words of reflection."""
    words = rollout.get("suppress", ())
    if not words:
      return self.tables
    if self.tokenizer is None:  # Which tokens they are is data.
      return dataclasses.replace(
          self.tables, reflections=np.zeros(self.tables.vocab_size, bool))
    return sampling.make_tables(self.tokenizer, self.thinking_ids, words)


def set_up(config: config_dict.ConfigDict) -> Setup:
  """The shapes of a config; a tokenizer that is not here is made up for.

  Raises:
    PlanError: the vocabulary is the tokenizer's, and that cannot be read.
  """
  strings = thinking.Thinking(**config.thinking)
  try:
    tokenizer = weights.tokenizer(config, None)
  except (ValueError, OSError) as error:
    return _without_tokenizer(config, strings, error)
  ids = thinking.resolve(strings, tokenizer)
  return Setup(
      config, weights.model_config(config, tokenizer.vocab_size), ids,
      sampling.make_tables(tokenizer, ids), tokenizer)


def _without_tokenizer(
    config: config_dict.ConfigDict, strings: thinking.Thinking,
    error: Exception,
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
          f"The tokenizer is not here ({error}): the vocabulary is the "
          f"model's {size}, and each thinking string counts as one token.",))
