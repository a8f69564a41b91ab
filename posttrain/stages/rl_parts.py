"""Makes what an RL section names: columns and objective, rollout worker,
reference; shows and saves a batch."""

import json
import pathlib

import numpy as np
from ml_collections import config_dict

from posttrain import sharding
from posttrain.config import checks
from posttrain.data.problem_cursor import ProblemCursor
from posttrain.model import lora
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.rl import (
  experience,
  objective,
  packing,
  rollout_buffer,
  rollout_worker,
  weight_sync,
)
from posttrain.stages import problems, sampling, training
from posttrain.stages.run_context import RunContext
from posttrain.tasks import loading, scoring
from posttrain.train import offload, trainable
from posttrain.train import state as state_lib


def num_updates(section: config_dict.ConfigDict) -> int:
  """Optimizer updates from one batch of rollouts."""
  return section.num_minibatches * section.num_epochs


def make_preparation(
    section: config_dict.ConfigDict, *, loss_chunk: int,
) -> experience.Preparation:
  """Makes what turns rollouts into columns, with the objective of `loss`.

  Raises:
    ValueError: see `objective.make`.
  """
  return experience.Preparation(
      objective=objective.make(**section.loss),
      shapes=packing.make_shapes(**training.pick(
          section, "sequence_length rows_per_microbatch num_groups group_size "
          "num_minibatches share_prompts")),
      max_tokens=section.rollout.max_tokens, chunk=loss_chunk,
      temperature=section.rollout.temperature,
      several=num_updates(section) > 1,
      all_groups=bool(section.router_aux_coef))


def make_rollout_worker(context: RunContext) -> rollout_worker.RolloutWorker:
  """Makes the worker with the task, rewards and sampler of the section."""
  section, rewards = context.section, rewards_of(context)
  return rollout_worker.RolloutWorker(
      sampler=sampling.make_sampler(context, section.rollout),
      limits=sampling.make_limits(section.rollout),
      renderer=context.renderer, problems=problems.load_on_all_hosts(context),
      rewards=rewards, warn=context.console.warning,
      weights=section.reward_weights or (1.0,) * len(rewards),
      group_size=section.group_size, seed=context.config.seed,
      stage=context.name)


def make_rollout_buffer(
    context: RunContext, worker: rollout_worker.RolloutWorker,
    start: ModelConfig,
) -> rollout_buffer.RolloutBuffer:
  """Makes the empty buffer of a stage that starts from a model like `start`."""
  section, config, sync = context.section, context.config, None
  if config.mesh.roles == "split":
    _, sampling_mesh = sharding.roles_of(config.mesh)
    sync = weight_sync.WeightSync(weight_sync.wanted(
        start, training.plan(section, config.compute), sampling_mesh,
        weights_dtype=section.rollout.weights_dtype), sampling_mesh)
  updates = num_updates(section)
  return rollout_buffer.RolloutBuffer(
      worker, ProblemCursor(len(worker.problems), config.seed, context.name),
      num_groups=section.num_groups, num_batches=section.num_steps // updates,
      updates=updates, staleness=section.staleness, sync=sync)


def rewards_of(context: RunContext) -> dict[str, scoring.Reward]:
  """By the name that metrics have, the verifier first.

  Raises:
    ValueError: two have one name.
  """
  names = context.section.rewards
  rewards = {name.rpartition(":")[2]: loading.load_function(name)
             for name in names}
  if len(rewards) < len(names):
    raise ValueError(
        f"{context.name}.rewards has two functions of one name: "
        f"{', '.join(names)}. Metrics are named by it; rename one.")
  return rewards


def check(context: RunContext) -> None:
  """Looks at problems and budgets before the first stage; on one host.

  Raises:
    ValueError: there are too few problems, one is not fit to be asked, the
      budgets contradict each other, or a key has no effect under the loss.
  """
  objective.make(**context.section.loss)
  rows = problems.load(context)
  if len(rows) < context.section.num_groups:
    raise ValueError(
        f"{context.name}.num_groups={context.section.num_groups} different "
        f"problems are needed for a batch, and the task has {len(rows)}. Lower "
        "num_groups.")
  problems.check_budgets(
      context, [sampling.make_limits(context.section.rollout)])
  problems.check(context, rows, rewards_of(context), lambda row: [
      context.renderer.prompt_tokens(row)])


def make_reference(
    context: RunContext, state: state_lib.TrainState, *, fresh: bool,
) -> Transformer:
  """Makes the KL's reference; it shares all that the policy does not move.

  What it does not share waits in the hosts' memory if it is to be offloaded.

  Args:
    state: the policy.
    fresh: the policy's adapters are new, and so add nothing yet.
  """
  section, compute = context.section, context.config.compute
  name, dtype = section.reference, compute.frozen_dtype
  model, trained = state.model, trainable.paths(state.trained)
  if name not in ("", checks.ADAPTER_OFF):
    reference = trainable.at_rest(context.weights_of(name), (), dtype)
  else:
    like = lora.without(model) if (
        fresh or name == checks.ADAPTER_OFF) else model
    reference = trainable.reference(like, trained, dtype)
  if "reference" in compute.offload:
    reference = offload.to_host(reference, but=model)
  return reference


def show_and_save(
    context: RunContext, worker: rollout_worker.RolloutWorker,
    collected: rollout_worker.ScoredRollouts, advantages: np.ndarray, step: int,
) -> None:
  """A batch's completions to their file, one to the console, where due."""
  section, updates = context.section, num_updates(context.section)
  due = lambda every: every and step // updates % -(-every // updates) == 0
  if not (due(section.save_rollouts_every) or due(section.show_sample_every)):
    return
  records = rollout_worker.records(
      collected, advantages, list(worker.rewards), worker, step)
  if due(section.save_rollouts_every):
    context.workdir.write_text(
        pathlib.Path(context.name, "rollouts", f"step_{step:06d}.jsonl"),
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records))
  if due(section.show_sample_every):
    row = records[0]
    context.console.sample(
        f"{context.name} step {step}", row["segments"],
        prompt=row["prompt"], facts={
            "reward": "no score" if row["reward"] is None
            else row["reward"], "advantage": row["advantage"],
            "finish": row["finish_reason"],
            "thinking tokens": row["think_length"]})
