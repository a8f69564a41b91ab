"""The programs of the sampler: rows that wait for the longest.

Those of an engine, whose rows are refilled, are in `engine_programs`.

  P: prompts  G: samples of each  B: rows  S: slots of the cache
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from posttrain import sharding, weights
from posttrain.model.transformer import Transformer
from posttrain.plan import abstract, engine_programs
from posttrain.plan.program import Program
from posttrain.plan.setup import Setup
from posttrain.sampler import decode
from posttrain.sampler import sampler as sampler_lib
from posttrain.sampler.requests import Request
from posttrain.stages import sampling


def of_rollout(
    setup: Setup, stage: str, model: Transformer,
    rollout: config_dict.ConfigDict, *, groups: int, group_size: int,
    limits: sampler_lib.Limits, beside: dict[str, Any], detail: str = "",
    steps: bool = True,
) -> Iterator[Program]:
  """Yields the programs of one sampler call on the current mesh.

  Calls are for completions that all run to their maximum.

  Args:
    beside: abstract arrays that are on the devices meanwhile.
    detail: of the names.
    steps: the stage has steps, of each of which the call is a part.
  """
  sampler = sampling.of_tables(
      setup.thinking_ids, setup.tables_of(rollout), rollout)
  asked = sampler.make_requests(
      [[0]] * groups, limits, prompt_id=[0] * groups, group_size=group_size)
  named = functools.partial(_named, stage, detail, steps)
  if sampler.max_num_seqs:
    yield from engine_programs.of_engine(
        named, model, sampler.tables, sampler.engine_settings(asked),
        prompts=engine_programs.Prompts(
            groups, group_size, sampler.max_prompt_tokens),
        tokens=rollout.max_tokens, beside=beside)
  else:
    yield from _waiting(
        named, stage, model, sampler, asked, group_size, beside,
        end=sampler.max_prompt_tokens + rollout.max_tokens)


def _named(
    stage: str, detail: str, steps: bool, kind: str,
    lower: Callable[[], jax.stages.Lowered], arguments: Any,
    beside: dict[str, Any], calls: float = 1, sizes: str = "", note: str = "",
) -> Program:
  """A program of one call of the sampler."""
  return Program(
      stage, kind, lower, arguments, beside, float(calls * steps),
      detail=" ".join(filter(None, (detail, sizes))),
      note=note if steps else "")


def _waiting(
    named: Callable[..., Program], stage: str, model: Transformer,
    sampler: sampler_lib.Sampler, asked: Sequence[Request], group_size: int,
    beside: dict[str, Any], *, end: int,
) -> Iterator[Program]:
  """Prefill, then a chunk of decoding for each size of the cache."""
  inputs = sampler.inputs(
      asked, group_size=group_size, put=sharding.abstract)
  prompts = [inputs[key] for key in (
      "tokens", "segment_ids", "in_thinking", "done")]
  fixed = sampler.tables, inputs["budgets"]
  whole, blocks, kept = abstract.unstacked(
      model, sampler.weights_dtype)
  looping = beside | kept
  # A cache of any size has the layout that prefill would give it.
  carry_of = lambda slots: dataclasses.replace(
      weights.on_mesh(decode.prefill.eval_shape(
          model, *prompts, *fixed, group_size=group_size, slots=slots,
          cache_dtype=sampler.cache_dtype)),
      processor_state=inputs["processor_state"])
  rows, script = _draws(stage, sampler, inputs)
  first = sampler.first_slots
  yield named("prefill", functools.partial(
      decode.prefill.lower, model, *prompts, *fixed, group_size=group_size,
      slots=first, cache_dtype=sampler.cache_dtype),
      (model, prompts, inputs["budgets"]), beside)
  yield named("unstack", functools.partial(
      decode.unstacked.lower, model, weights_dtype=sampler.weights_dtype),
      (model,), {"carry": carry_of(first), **beside})
  slots, used, carry = first, sampler.max_prompt_tokens, carry_of(first)
  while used < end:
    chunks = math.ceil((min(slots, end) - used) / sampler.chunk)
    yield named("decode", functools.partial(
        decode.decode.lower, whole, blocks, carry, rows, script,
        np.int32(len(inputs["done"])), sampler.tables, steps=sampler.chunk,
        logits_processor=sampler.options.logits_processor,
        budget_schedule=sampler.options.budget_schedule),
        (whole, blocks, carry, rows, script), looping, chunks, f"S={slots}")
    used += chunks * sampler.chunk
    if used < end:
      larger = sampler.next_slots(slots)
      yield named("grow", functools.partial(
          decode.resize.lower, carry, slots=larger), (carry,),
          {"model": whole, "layers": blocks, **looping},
          sizes=f"S={slots} to {larger}")
      slots, carry = larger, carry_of(larger)


def _draws(
    stage: str, sampler: sampler_lib.Sampler, inputs: dict[str, Any],
) -> tuple[Any, Any]:
  """What `decode` takes beside the weights and the carry."""
  keys = jax.eval_shape(
      lambda prompt, sample: sampler_lib.row_keys(
          seed=np.uint32(0), stage=stage, step=0, prompt_id=prompt,
          sample_id=sample), inputs["prompt_id"], inputs["sample_id"])
  script = sampler_lib.script_window(
      None, len(inputs["done"]), 0, sampler.chunk, put=sharding.abstract)
  return sampler.rows(inputs, weights.on_mesh(keys)), script
