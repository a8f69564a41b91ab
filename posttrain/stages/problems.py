"""Loads a stage's problems, and checks them before the first step.

Rewards and graders run in worker processes of process 0 alone.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from posttrain import distributed, sharding
from posttrain.episodes import score_calls
from posttrain.episodes.workers import Settings, WorkerPool
from posttrain.evaluation import summary
from posttrain.sampler import sampler as sampler_lib
from posttrain.stages import sampling
from posttrain.stages.run_context import RunContext
from posttrain.tasks import checks, loading

Problem = Mapping[str, Any]
EVERY = 10.0  # Seconds between lines of a check that takes long.


def load(context: RunContext, count: int = 0) -> list[Problem]:
  """Loads the first `count` problems that the section names; 0: all.

  Raises:
    ValueError: the task gives something else, or fewer.
  """
  section = context.section.problems
  found = loading.load_function(section.task)(section.split, **section.args)
  try:
    size = len(found)
  except TypeError as error:
    raise ValueError(
        f"{context.name}.problems.task: {section.task} returned a "
        f"{type(found).__name__}, and a list of problems is needed.") from error
  if count > size:
    raise ValueError(
        f"{context.name}.problems.count={count}, and the {section.split} split "
        f"has {size} problems.")
  rows = [found[i] for i in range(count or size)]
  for number, row in enumerate(rows):
    if not isinstance(row, Mapping):
      raise ValueError(
          f"{context.name}.problems.task: problem {number} of {section.task} "
          f"is a {type(row).__name__}, and a dict is needed.")
  if not rows:
    raise ValueError(
        f"{context.name}.problems: the {section.split} split of "
        f"{section.task} has no problems.")
  return rows


def load_on_all_hosts(context: RunContext, count: int = 0) -> list[Problem]:
  """Loads the problems on each host, which all have to find the same.

  Raises:
    ValueError: as `load`; or the hosts' problems differ, on every host.
  """
  rows = load(context, count)
  digest = hashlib.sha256(
      repr([row.get("id") for row in rows]).encode()).digest()
  # Process 0's first: a host may load for longer than a collective waits.
  first = distributed.on_first_host(lambda: digest)
  if sharding.on_any_host(digest != first):
    raise ValueError(
        f"{context.name}.problems.task: {context.section.problems.task} gives "
        "another list of problems on another host (the ids, their order or "
        "their number), and all hosts must ask the same. Is a file older "
        "there, or does the order come from a set or an unseeded shuffle?")
  return rows


@contextlib.contextmanager
def worker_pool(context: RunContext) -> Iterator[WorkerPool | None]:
  """Runs the stage's worker processes, on process 0; None on the others."""
  if jax.process_index():
    yield None
    return
  section = context.section.workers
  settings = Settings(
      num_workers=section.num_workers, seconds=section.seconds,
      memory_bytes=int(section.memory_gb * 2**30),
      output_bytes=section.output_bytes)
  with WorkerPool(settings, context.console.warning) as pool:
    yield pool


def check(
    context: RunContext, rows: Sequence[Problem], rewards: Sequence[str],
    prompts_of: Callable[[Problem], Iterable[Sequence[int]]], *,
    extract: str = "",
) -> None:
  """Checks all problems: ids, prompts, the rewards' arguments, golds.

  Args:
    rewards: as "module:function", the verifier first.
    prompts_of: the prompts that a problem is asked with.
    extract: an extractor that has to read every gold; "" for none.

  Raises:
    ValueError: one is not fit to be asked; names the stage and the problem.
  """
  try:
    checks.check_ids(rows)
    for name in rewards:
      checks.check_arguments(name, loading.load_function(name), rows)
    check_prompts(context, rows, prompts_of)
    with worker_pool(context) as pool:
      assert pool is not None  # Process 0 alone makes checks.
      score_calls.check_gold(
          rewards[0], rows, pool,
          progress=progress_of(context, "gold answers", len(rows)))
      if extract:
        score_calls.check_extract(
            extract, rows, pool, progress=progress_of(
                context, "extracted gold answers", len(rows)))
  except ValueError as error:
    raise ValueError(f"{context.name}.problems: {error}") from error


def check_budgets(
    context: RunContext, of_calls: Iterable[sampler_lib.Limits]) -> None:
  """Raises ValueError where the stage's sampler would refuse its budgets."""
  sampler = sampling.make_sampler(context, context.section.rollout)
  for limits in of_calls:
    try:
      sampler.make_requests([[0]], limits, prompt_id=[0])
    except ValueError as error:
      raise ValueError(f"{context.name}: {error}") from error


def check_prompts(
    context: RunContext, rows: Sequence[Problem],
    prompts_of: Callable[[Problem], Iterable[Sequence[int]]],
) -> None:
  """Raises ValueError where a prompt is empty, or longer than its room."""
  most = context.section.rollout.max_prompt_tokens
  progress = progress_of(context, "prompts", len(rows))
  longest, wrong = 0, []
  for done, row in enumerate(rows):
    progress(done)
    try:
      lengths = [len(prompt) for prompt in prompts_of(row)]
    except ValueError as error:
      raise ValueError(f"problem {row['id']}: {error}") from error
    longest = max(longest, *lengths)
    if not all(1 <= length <= most for length in lengths):
      wrong.append((row["id"], max(lengths)))
  if wrong:
    number, length = wrong[0]
    raise ValueError(
        f"the prompt of problem {number} has {length} tokens, and "
        f"rollout.max_prompt_tokens allows 1 to {most}; of {len(rows)} "
        f"problems {len(wrong)} do not fit, and the longest has {longest} "
        "tokens. Raise rollout.max_prompt_tokens, or leave them out.")


def progress_of(
    context: RunContext, what: str, size: int) -> Callable[[int], None]:
  """Makes a function that says how far a check is, where it takes long."""
  last = time.monotonic()

  def progress(done: int) -> None:
    nonlocal last
    if time.monotonic() - last >= EVERY:
      last = time.monotonic()
      context.console.line(
          f"{context.name}: {done:,} of {size:,} {what} checked")
  return progress


def constant_baseline(
    section: config_dict.ConfigDict, count: int, cluster: np.ndarray | None,
) -> dict[str, Any]:
  """Scores the best constant answer on the same problems.

  Raises:
    ValueError: the function fails, or does not judge each of them.
  """
  if not section.baseline:
    return {}
  where = f"The baseline {section.baseline}"
  try:
    found = loading.load_function(section.baseline)(
        section.problems.split, count=count, **section.problems.args)
    answer, correct = found["answer"], np.asarray(found["correct"], float)
  except Exception as error:
    raise ValueError(
        f"{where} failed with {type(error).__name__}: {error}. It is called "
        "with the task's split, count and args, and gives answer and correct."
    ) from error
  if correct.shape != (count,):
    raise ValueError(f"{where} judged {correct.shape} of {count} problems.")
  return {"constant_baseline": {
      "answer": answer, **summary.accuracy(correct, cluster)}}
