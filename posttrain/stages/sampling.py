"""From strings and settings to a sampler."""

from ml_collections import config_dict

from posttrain.sampler import budget_tables, choice, sampler
from posttrain.stages.context import StageContext
from posttrain.text import thinking
from posttrain.text import tokenizer as tokenizer_lib


def make_sampler(
    context: StageContext, rollout: config_dict.ConfigDict,
) -> sampler.Sampler:
  """The sampler of a stage; the truncations are an evaluation's only."""
  truncations = {
      name: rollout[name] for name in ("top_k", "top_p", "min_p")
      if name in rollout}
  return of_tokenizer(
      context.renderer.tokenizer, context.thinking_ids,
      choice.SamplingParams(temperature=rollout.temperature, **truncations),
      max_prompt_tokens=rollout.max_prompt_tokens, chunk=rollout.chunk)


def of_tokenizer(
    tokenizer: tokenizer_lib.Tokenizer, ids: thinking.ThinkingIds,
    params: choice.SamplingParams, *, max_prompt_tokens: int, chunk: int,
) -> sampler.Sampler:
  """A sampler whose budgets are counted in a tokenizer's tokens."""
  return sampler.Sampler(
      ids=ids, tables=budget_tables.BudgetTables.build(
          ids, tokenizer.stop_ids, tokenizer_lib.newline_ends(tokenizer),
          tokenizer.vocab_size),
      params=params, max_prompt_tokens=max_prompt_tokens, chunk=chunk)
