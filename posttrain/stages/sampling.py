"""Makes samplers from the strings and settings of a config."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import config_dict

from posttrain.sampler import (
  budget_tables,
  confidence,
  logits_processors,
  sampler,
  sampling_options,
  token_sampling,
)
from posttrain.stages.run_context import RunContext
from posttrain.tasks import loading
from posttrain.text import symbols, thinking
from posttrain.text import tokenizer as tokenizer_lib
from posttrain.train import preemption

# Defaults of a command's flags, for `make_sampling_options`.
PLAIN: Mapping[str, Any] = {
    "suppress": (), "wait_order": "cycle", "logits_processor": "",
    "logits_processor_args": {}, "budget_schedule": "",
    "confidence_window": 0, "confidence_top_k": 20}


def make_sampler(
    context: RunContext, rollout: config_dict.ConfigDict,
) -> sampler.Sampler:
  """Makes the sampler of a stage."""
  tokenizer = context.renderer.tokenizer
  tables = make_tables(
      tokenizer, context.thinking_ids, rollout.get("suppress", ()))
  return of_tables(tables, rollout, symbols.SymbolTable.of(tokenizer)
                   if rollout.max_episode_tokens else None)


def of_tables(
    tables: budget_tables.BudgetTables, rollout: config_dict.ConfigDict,
    table: symbols.SymbolTable | None = None,
) -> sampler.Sampler:
  """Makes the sampler of a section; only evaluation has top-k and the like.

  Args:
    table: of the tokenizer, where turns may end at strings.
  """
  truncations = {
      name: rollout[name] for name in ("top_k", "top_p", "min_p")
      if name in rollout}
  return sampler.Sampler(
      tables=tables, params=token_sampling.SamplingParams(
          temperature=rollout.temperature, **truncations),
      max_prompt_tokens=rollout.max_prompt_tokens, chunk=rollout.chunk,
      cache_dtype=rollout.cache_dtype, weights_dtype=rollout.weights_dtype,
      max_num_seqs=rollout.max_num_seqs,
      max_episode_tokens=rollout.max_episode_tokens,
      prefix_cache_tokens=rollout.prefix_cache_tokens, symbols=table,
      options=make_sampling_options(rollout, tables.vocab_size),
      before_chunk=preemption.leave_if_requested)


def make_limits(rollout: config_dict.ConfigDict) -> sampler.Limits:
  """Makes the budgets of an RL stage, the same for all completions."""
  return sampler.Limits(**{name: rollout[name] for name in (
      "max_tokens", "max_thinking_tokens", "min_thinking_tokens", "num_waits",
      "truncate", "max_thinking_steps")})


def make_sampling_options(
    settings: Mapping[str, Any], vocab_size: int,
) -> sampling_options.SamplingOptions:
  """Loads the functions that a section, or flags of a command, name.

  Args:
    settings: `wait_order`, `budget_schedule`, `confidence_window` and
      `confidence_top_k`, and where they are allowed `suppress`,
      `logits_processor` and `logits_processor_args`.

  Raises:
    ValueError: a function is not there, or makes no logits processor.
  """
  name, processor = settings.get("logits_processor"), None
  if name:
    processor = loading.load_function(name)(vocab_size)
    if not isinstance(processor, logits_processors.LogitsProcessor):
      raise ValueError(
          f"{name} returned a {type(processor).__name__}, and a logits "
          "processor is needed: function(vocab_size) -> "
          "posttrain.sampler.logits_processors.LogitsProcessor.")
  args = settings.get("logits_processor_args")
  return sampling_options.SamplingOptions(
      suppress=bool(settings.get("suppress")),
      draw_waits=settings["wait_order"] == "draw",
      logits_processor=processor,
      logits_processor_args=dict(args) if args else None,
      budget_schedule=loading.load_function(settings["budget_schedule"])
      if settings["budget_schedule"] else None,
      confidence=confidence.Confidence(
          settings["confidence_top_k"], settings["confidence_window"])
      if settings["confidence_window"] else None)


def with_sources(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Adds hashes of the functions' sources to the options, for the record."""
  names = [settings[key] for key in ("logits_processor", "budget_schedule")
           if settings[key]]
  return {
      **settings, "suppress": list(settings["suppress"]),
      "sources": {name: loading.source_hash(name) for name in names}}


def make_tables(
    tokenizer: tokenizer_lib.Tokenizer, ids: thinking.ThinkingIds,
    suppress: Sequence[str] = (),
) -> budget_tables.BudgetTables:
  """Builds the tables by which budgets are counted and forced, for a tokenizer.

  Args:
    suppress: words that are not sampled while a row thinks; tokens that spell
      the delimiters stay.
  """
  spell = symbols.speller(tokenizer, ids.tokens)
  reflections = None
  if suppress:
    reflections = tokenizer_lib.spellings(tokenizer, suppress)
    # Such as "</think>" of a word "think": the thinking has to end.
    reflections &= ~np.isin(np.arange(tokenizer.vocab_size), list(
        itertools.chain(*map(spell, ids.strings.delimiters))))
  return budget_tables.BudgetTables.build(
      ids, spell, tokenizer.stop_ids, tokenizer_lib.newline_ends(tokenizer),
      reflections)
