"""From strings and settings to a sampler."""

from typing import Any

from ml_collections import config_dict

from posttrain.sampler import budget_tables, choice, sampler
from posttrain.stages.context import StageContext
from posttrain.text import thinking
from posttrain.text import tokenizer as tokenizer_lib


def make_sampler(
    context: StageContext, rollout: config_dict.ConfigDict,
) -> sampler.Sampler:
  """The sampler of a stage."""
  ids = context.thinking_ids
  return of_tables(ids, make_tables(context.renderer.tokenizer, ids), rollout)


def of_tables(
    ids: thinking.ThinkingIds, tables: budget_tables.BudgetTables,
    rollout: config_dict.ConfigDict,
) -> sampler.Sampler:
  """The sampler of a section; the truncations are an evaluation's only."""
  truncations = {
      name: rollout[name] for name in ("top_k", "top_p", "min_p")
      if name in rollout}
  return sampler.Sampler(
      ids=ids, tables=tables, params=choice.SamplingParams(
          temperature=rollout.temperature, **truncations),
      max_prompt_tokens=rollout.max_prompt_tokens, chunk=rollout.chunk,
      cache_dtype=rollout.cache_dtype, weights_dtype=rollout.weights_dtype,
      slots=rollout.slots if "slots" in rollout
      else rollout.batch_rows if rollout.refill else 0)


def of_tokenizer(
    tokenizer: tokenizer_lib.Tokenizer, ids: thinking.ThinkingIds,
    params: choice.SamplingParams, **fields: Any,
) -> sampler.Sampler:
  """A sampler whose budgets are counted in a tokenizer's tokens.

  Args:
    **fields: others of `Sampler`.
  """
  return sampler.Sampler(
      ids=ids, tables=make_tables(tokenizer, ids), params=params,
      **fields)


def make_tables(
    tokenizer: tokenizer_lib.Tokenizer, ids: thinking.ThinkingIds,
) -> budget_tables.BudgetTables:
  """What budgets are counted and forced by, in a tokenizer's tokens."""
  return budget_tables.BudgetTables.build(
      ids, tokenizer.stop_ids, tokenizer_lib.newline_ends(tokenizer),
      tokenizer.vocab_size)
