"""From a config's `rollout` section to a sampler and its limits."""

from ml_collections import config_dict

from posttrain.sampler import budget_tables, choice, sampler
from posttrain.stages.context import StageContext
from posttrain.text import tokenizer as tokenizer_lib


def make_sampler(
    context: StageContext, rollout: config_dict.ConfigDict,
) -> sampler.Sampler:
  """The sampler of a stage; the truncations are an evaluation's only."""
  tokenizer = context.renderer.tokenizer
  truncations = {
      name: rollout[name] for name in ("top_k", "top_p", "min_p")
      if name in rollout}
  return sampler.Sampler(
      ids=context.thinking_ids,
      tables=budget_tables.BudgetTables.build(
          context.thinking_ids, tokenizer.stop_ids,
          tokenizer_lib.newline_ends(tokenizer), tokenizer.vocab_size),
      params=choice.SamplingParams(
          temperature=rollout.temperature, **truncations),
      max_prompt_tokens=rollout.max_prompt_tokens, chunk=rollout.chunk)
