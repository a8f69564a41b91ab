"""Programs of one call of the sampler, which is an engine's: `engine`.

  P: prompts  G: samples of each
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from posttrain.model.transformer import Transformer
from posttrain.programs import engine
from posttrain.programs.program import SAMPLING, Program
from posttrain.sampler import sampler as sampler_lib


def of_rollout(
    stage: str, sampler: sampler_lib.Sampler, model: Transformer, *,
    groups: int, group_size: int, limits: sampler_lib.Limits,
    beside: dict[str, Any], detail: str = "", steps: bool = True,
) -> Iterator[Program]:
  """Yields the programs of one sampler call on the current mesh.

  Args:
    stage: the name of the stage that makes the call.
    groups, group_size: prompts, and samples of each.
    beside: abstract arrays that are on the devices meanwhile.
    detail: a part of the programs' names.
    steps: the call is a part of each step of the stage.
  """
  asked = sampler.make_requests(
      [[0]] * groups, limits, prompt_id=range(groups), group_size=group_size)
  return engine.of_engine(
      functools.partial(_named, stage, detail, steps), model, sampler.tables,
      sampler.engine_settings(asked, group_size), prompts=engine.Prompts(
          groups, group_size, sampler.max_prompt_tokens),
      tokens=int(np.max(limits.max_tokens)), beside=beside)


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
