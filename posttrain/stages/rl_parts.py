"""What a GRPO section names: shapes, the loss, what draws and scores, the
reference; and what is shown and saved of a batch."""

import inspect
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import config_dict

from posttrain import sharding
from posttrain.config import checks
from posttrain.config.stages import rl as schema
from posttrain.data.problem_cursor import ProblemCursor
from posttrain.model import lora
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.objectives import policy as policy_objective
from posttrain.rl import (
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


def make_shapes(section: config_dict.ConfigDict) -> packing.Shapes:
  """Makes the packing shapes on the current mesh."""
  return packing.Shapes(
      length=section.sequence_length,
      rows=_round_up(section.rows_per_microbatch),
      num_minibatches=section.num_minibatches,
      completions=-(-section.num_groups // section.num_minibatches)
      * section.group_size,
      share_prompts=section.share_prompts)


def make_loss(
    section: config_dict.ConfigDict, *, loss_chunk: int,
) -> packing.PolicyLoss:
  """The loss that the section names.

  Raises:
    ValueError: it wants what there is not, or does not use what the section
      sets.
  """
  loss, function = section.loss, loading.load_function(section.loss.function)
  check_loss(loss, function)
  return packing.PolicyLoss(
      function=function,
      temperature=section.rollout.temperature, chunk=loss_chunk,
      clip_low=loss.clip_low, clip_high=loss.clip_high,
      kl_coef=loss.kl_coef if loss.kl_in == "loss" else 0.0,
      kl_estimator=loss.kl_estimator,
      correction=loss.importance_sampling, cap=loss.importance_sampling_cap,
      floor=loss.importance_sampling_floor)


def check_loss(
    loss: config_dict.ConfigDict, function: Callable[..., Any]) -> None:
  """Raises ValueError where a key has no effect under the loss function."""
  missing = [
      name for n, (name, p) in enumerate(
          inspect.signature(function).parameters.items())
      if n > 3 and name not in packing.KEYWORDS and p.default is p.empty
      and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
  if missing:
    raise ValueError(
        f"loss.function={loss.function} needs {', '.join(missing)}; a loss is "
        f"given four arrays and {', '.join(packing.KEYWORDS)}.")
  in_loss = loss.kl_coef and loss.kl_in == "loss"
  keys = {
      "clip_low": ("clip_low", loss.clip_low != schema.CLIP),
      "clip_high": ("clip_high", loss.clip_high != schema.CLIP),
      "kl_coef": ("kl_coef", in_loss), "kl_in": ("ref_logprobs", in_loss),
      "kl_estimator": (
          "kl_estimator", in_loss and loss.kl_estimator != schema.ESTIMATOR),
      "aggregation": (
          "token_weights", loss.aggregation != schema.AGGREGATION),
      "importance_sampling": (
          "importance_weights", loss.importance_sampling != "none")}
  for key, (keyword, is_set) in keys.items():
    if is_set and not packing.takes(function, keyword):
      raise ValueError(
          f"loss.{key} is {loss[key]!r} and has no effect: "
          f"loss.function={loss.function} does not take {keyword}. Leave the "
          "key out, or use the argument.")


def needs_all(
    section: config_dict.ConfigDict, loss: packing.PolicyLoss) -> bool:
  """Tests if completions of zero-variance groups move the weights too.

  They do by a KL to the reference and by the balance of a router; and a loss
  of one's own may do with them what it likes.
  """
  return bool(
      section.loss.kl_coef or section.router_aux_coef
      or loss.function is not policy_objective.policy_loss)


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
  loss = context.section.loss
  check_loss(loss, loading.load_function(loss.function))
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
) -> Transformer | None:
  """Makes the KL's reference; it shares all that the policy does not move.

  What it does not share waits in the hosts' memory if it is to be offloaded.

  Args:
    state: the policy.
    fresh: the policy's adapters are new, and so add nothing yet.
  """
  section, compute = context.section, context.config.compute
  name, dtype = section.reference, compute.frozen_dtype
  if not section.loss.kl_coef:
    return None
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


def _round_up(rows: int) -> int:
  """To what the mesh divides; the added rows are padding."""
  parts = sharding.axis_size("batch")
  return -(-rows // parts) * parts
