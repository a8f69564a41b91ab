"""Programs of the sampler with static batching: rows wait for the longest.

`programs.engine` has those of continuous batching.

  P: prompts  G: samples of each  B: rows  S: slots of the cache
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from posttrain import sharding, weights
from posttrain.model.transformer import Transformer
from posttrain.programs import engine
from posttrain.programs.program import SAMPLING, Program, unstacked
from posttrain.sampler import decode
from posttrain.sampler import sampler as sampler_lib
from posttrain.sampler.requests import Request


def of_rollout(
    stage: str, sampler: sampler_lib.Sampler, model: Transformer, *,
    groups: int, group_size: int, limits: sampler_lib.Limits,
    beside: dict[str, Any], detail: str = "", steps: bool = True,
) -> Iterator[Program]:
  """Yields the programs of one sampler call on the current mesh.

  Calls are for completions that all run to their maximum.

  Args:
    stage: the name of the stage that makes the call.
    groups, group_size: prompts, and samples of each.
    beside: abstract arrays that are on the devices meanwhile.
    detail: a part of the programs' names.
    steps: the call is a part of each step of the stage.
  """
  asked = sampler.make_requests(
      [[0]] * groups, limits, prompt_id=[0] * groups, group_size=group_size)
  named = functools.partial(_named, stage, detail, steps)
  tokens = int(np.max(limits.max_tokens))
  if sampler.max_num_seqs:
    yield from engine.of_engine(
        named, model, sampler.tables, sampler.engine_settings(asked),
        prompts=engine.Prompts(
            groups, group_size, sampler.max_prompt_tokens),
        tokens=tokens, beside=beside)
  else:
    yield from _waiting(
        named, stage, model, sampler, asked, group_size, beside,
        end=sampler.max_prompt_tokens + tokens)


def _named(
    stage: str, detail: str, steps: bool, kind: str,
    lower: Callable[[], jax.stages.Lowered], arguments: Any,
    beside: dict[str, Any], calls: float = 1, sizes: str = "", note: str = "",
) -> Program:
  """Makes a program of one call of the sampler."""
  return Program(
      stage, kind, lower, arguments, SAMPLING, beside, float(calls * steps),
      detail=" ".join(filter(None, (detail, sizes))),
      note=note if steps else "")


def _waiting(
    named: Callable[..., Program], stage: str, model: Transformer,
    sampler: sampler_lib.Sampler, asked: Sequence[Request], group_size: int,
    beside: dict[str, Any], *, end: int,
) -> Iterator[Program]:
  """Yields prefill, then a chunk of decoding for each size of the cache."""
  inputs = sampler.inputs(
      asked, group_size=group_size, put=sharding.abstract)
  prompts = [inputs[key] for key in (
      "tokens", "segment_ids", "in_thinking", "done")]
  fixed = sampler.tables, inputs["budgets"]
  whole, blocks, kept = unstacked(
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
  """Arguments of `decode` besides the weights and the carry."""
  keys = jax.eval_shape(
      lambda prompt, sample: sampler_lib.row_keys(
          seed=np.uint32(0), stage=stage, step=0, prompt_id=prompt,
          sample_id=sample), inputs["prompt_id"], inputs["sample_id"])
  script = sampler_lib.script_window(
      None, len(inputs["done"]), 0, sampler.chunk, put=sharding.abstract)
  return sampler.rows(inputs, weights.on_mesh(keys)), script
