"""Programs, sizes, work and charts of reinforcement learning.

They are for plans, estimates and the report.

  P: prompts  G: samples of each  M: microbatches  R: rows of one  T: length
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from posttrain import sharding, weights
from posttrain.config import checks
from posttrain.config.stages import sampling as schema
from posttrain.model import lora
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.programs import engine as engine_programs
from posttrain.programs import transfer
from posttrain.programs.program import SAMPLING, SCORING, TRAINING, Program
from posttrain.rl import experience as experience_lib
from posttrain.rl import objective as objective_lib
from posttrain.rl import packing
from posttrain.sampler import decode
from posttrain.stages import memory_estimate, sampling, training
from posttrain.stages.stage import Decoding, Pass, PlannedStage, Sizes
from posttrain.tasks import loading
from posttrain.telemetry.charts import LEARNING, MACHINE, Chart
from posttrain.text import render
from posttrain.train import state as state_lib
from posttrain.train import trainable

SAMPLED_PROMPTS = 1000  # Their lengths give the padding.


def num_updates(section: config_dict.ConfigDict) -> int:
  """Counts the optimizer updates from one batch of rollouts."""
  return section.num_minibatches * section.num_epochs


def _rows(section: config_dict.ConfigDict, parts: int) -> int:
  """Rows of a microbatch that the mesh divides; those added are padding."""
  return -(-section.rows_per_microbatch // parts) * parts


def make_preparation(
    section: config_dict.ConfigDict, *, loss_chunk: int,
) -> experience_lib.Preparation:
  """Makes the preparation of rollouts, with the objective of `loss`.

  Raises:
    ValueError: see `objective.make`.
  """
  return experience_lib.Preparation(
      objective=objective_lib.make(**section.loss),
      shapes=packing.Shapes(
          length=section.sequence_length,
          rows=_rows(section, sharding.axis_size("batch")),
          num_minibatches=section.num_minibatches,
          completions=-(-section.num_groups // section.num_minibatches)
          * section.group_size,
          share_prompts=section.share_prompts),
      max_tokens=max(section.rollout.max_tokens,
                     section.rollout.max_episode_tokens), chunk=loss_chunk,
      temperature=section.rollout.temperature,
      several=num_updates(section) > 1,
      all_groups=bool(section.router_aux_coef))


def programs(stage: PlannedStage) -> Iterator[Program]:
  """Yields the programs of a batch: rollouts, logprobs and updates."""
  section, (model, paths) = stage.section, stage.trained
  prepare = make_preparation(
      section, loss_chunk=stage.compute.loss_chunk)
  optimizer, update = training.make_update(section, prepare.loss)
  state = stage.state(optimizer)
  models, own = {"policy": model}, {"policy": model}
  if prepare.objective.needs_reference:
    reference = jax.eval_shape(lambda policy: reference_of(
        section, policy, stage.compute.frozen_dtype,
        fresh=model.config.lora != stage.start.config.lora), model)
    models["reference"] = own["reference"] = weights.on_mesh(reference)
    if is_of_policy(section):  # What the policy does not move is there once.
      own = {key: trainable.split(tree, paths)[0]
             for key, tree in own.items()}
  beside = lambda *running: {
      key: tree for key, tree in (*own.items(), ("optimizer", state.opt_state))
      if key not in running}
  for program in (
      *_draws(stage, beside("policy")),
      *_learning(stage, models, state, prepare, update, beside)):
    # Offloaded arrays that a program does not use are on the host.
    waiting = {name: tree for name, tree in program.beside.items()
               if name in stage.compute.offload}
    rest = {name: tree for name, tree in program.beside.items()
            if name not in waiting}
    yield dataclasses.replace(program, beside=rest, waiting=waiting)


def _learning(
    stage: PlannedStage, models: dict[str, Transformer],
    state: state_lib.TrainState, prepare: experience_lib.Preparation,
    update: Any, beside: Callable[..., dict[str, Any]],
) -> Iterator[Program]:
  """Yields the programs that `Learner` runs on the training devices.

  Args:
    models: "policy", and "reference" if there is one.
    beside: arrays on the devices, without those of the names it is given.
  """
  name, section = stage.name, stage.section
  shapes, updates = prepare.shapes, num_updates(section)
  experience = packing.empty_experience(shapes, _experts(models["policy"]))
  count = shapes.microbatches
  read = _arrays(experience_lib.of_model(experience))
  for kind, whose in (
      ("old_logprobs", "policy"), ("ref_logprobs", "reference")):
    if kind in prepare.columns or prepare.objective.kl_in_reward:
      yield Program(
          name, kind, functools.partial(
              experience_lib.sequence_logprobs.lower, models[whose], read,
              np.int32(count), chunk=prepare.chunk,
              temperature=prepare.temperature),
          (models[whose], read), SCORING, beside(whose),
          shapes.num_minibatches, unknown_trips=count)
  every = _arrays(experience | dict.fromkeys(
      prepare.columns, np.zeros(experience["tokens"].shape, np.float32)))
  # The first update of a batch of rollouts is its own old policy.
  first = {key: x for key, x in every.items() if key != "old_logprobs"}
  for kind, batch, calls in (
      ("update", first, 1), ("later_update", every, updates - 1)):
    if calls:
      yield Program(
          name, kind, functools.partial(
              update.lower, state, batch, np.int32(count)),
          (state, batch), TRAINING, beside("policy", "optimizer"), calls,
          unknown_trips=count)


def _draws(
    stage: PlannedStage, beside: dict[str, Any]) -> Iterator[Program]:
  """Yields the programs of a batch of rollouts.

  They are on the devices that only sample, if there are such.
  """
  section, mesh = stage.section, stage.sampling_mesh
  draw = functools.partial(
      engine_programs.of_rollout, stage.name,
      stage.setup.sampler(section.rollout), groups=section.num_groups,
      group_size=section.group_size,
      limits=sampling.make_limits(section.rollout))
  if mesh is None:
    yield from draw(model=stage.trained[0], beside=beside)
    return
  yield from transfer.programs(stage.transfer, beside)
  with jax.set_mesh(mesh):  # Not around a `yield`, which would leak it.
    drawn = list(draw(model=stage.policy_there, beside={}))
  for program in drawn:
    yield dataclasses.replace(program, role=SAMPLING)


def reference_of(
    section: config_dict.ConfigDict, policy: Transformer, dtype: str, *,
    trained: Collection[str] = (), fresh: bool = False,
) -> Transformer:
  """Makes the KL's reference of the policy; they share frozen weights.

  Args:
    trained: paths of what the policy moves.
    fresh: the policy's adapters are new, and so add nothing yet.
  """
  if fresh or section.reference:
    policy = lora.without(policy)
  return trainable.reference(policy, trained, dtype)


def is_of_policy(section: config_dict.ConfigDict) -> bool:
  """Tests if the reference is made of the policy, and not of a checkpoint."""
  return section.reference in ("", checks.ADAPTER_OFF)


def _experts(model: Transformer) -> np.ndarray | None:
  """The sampler's choice of experts of no tokens; None without any."""
  c = model.config
  return np.zeros((0, c.layers, c.experts_per_token), decode.experts_dtype(
      c)) if c.num_experts else None


def _arrays(experience: packing.Arrays) -> dict[str, Any]:
  return packing.minibatch(experience, 0, put=sharding.abstract)[0]


def memory(
    section: config_dict.ConfigDict, compute: config_dict.ConfigDict,
    model: ModelConfig,
) -> Sizes:
  """Policy, reference, optimizer, one microbatch, and the sampler's cache."""
  whole, arguments = memory_estimate.of_trained(section, compute, model)
  if objective_lib.make(**section.loss).needs_reference:
    kept = jax.eval_shape(lambda policy: reference_of(
        section, policy, compute.frozen_dtype), whole)
    arguments["reference_bytes"] = memory_estimate.bytes_of(
        kept) - is_of_policy(section) * arguments["frozen_bytes"]
  rollout, length = section.rollout, {"sequence_length": "shorter"}
  completions = section.num_groups * section.group_size
  decoded = min(rollout.max_num_seqs or completions, completions)
  groups = {"num_groups": "fewer", "group_size": "fewer"}
  return Sizes(
      whole.config, arguments | dict(
          rows=section.rows_per_microbatch,
          sequence_length=section.sequence_length, offload=compute.offload,
          **memory_estimate.of_rollout(rollout, decoded)),
      batch_tokens=completions * section.sequence_length,
      smaller={
          "training": {"rows_per_microbatch": "fewer", **length},
          "optimizer": memory_estimate.smaller_moments(section),
          "sampling": (groups if decoded == completions else {}) | {
              "rollout.max_num_seqs": "fewer, but not 0",
              **memory_estimate.SMALLER_ROLLOUT},
          "batch": groups | length})


def work(
    section: config_dict.ConfigDict, mesh: sharding.MeshSizes,
) -> list[Pass | Decoding]:
  """Lists completions to their maximum, logprobs where needed, updates."""
  rows = _rows(section, mesh.batch)
  completions, rollout = section.num_groups * section.group_size, (
      section.rollout)
  count = -(-completions // rows)
  objective = objective_lib.make(**section.loss)
  scored = objective.needs_reference + (objective.kl_in_reward or (
      num_updates(section) > 1 and "old_logprobs" in objective.needs))
  some = functools.partial(Pass, rows, section.sequence_length)
  return [
      Decoding(
          completions, schema.longest(rollout),
          schema.longest(rollout) - rollout.max_prompt_tokens,
          cache_dtype=rollout.cache_dtype,
          weights_dtype=rollout.weights_dtype),
      some(times=scored * count, backward=False),
      some(times=section.num_epochs * count, backward=True)]


def padding(
    stage: PlannedStage, renderer: render.Renderer,
    meshes: Mapping[str, sharding.MeshSizes],
) -> tuple[float, str]:
  """Compares the task's first prompts with the room for them."""
  section = stage.section
  parts = meshes.get(SAMPLING, meshes[TRAINING]).rows
  problems = loading.load_function(section.problems.task)(
      section.problems.split, **section.problems.args)
  count = min(len(problems), SAMPLED_PROMPTS)
  lengths = [len(renderer.prompt_tokens(problems[i])) for i in range(count)]
  room = section.rollout.max_prompt_tokens
  filled = -(-section.num_groups // parts) * parts
  mean = sum(lengths) / count
  return 1 - mean / room * section.num_groups / filled, (
      f"mean {mean:.1f}, longest {max(lengths)} of {room} tokens in "
      f"{count} prompts; {filled - section.num_groups} empty prompts for a "
      f"mesh of {parts}")


def no_lengths(*_: Any) -> tuple[float, str]:
  """Raises ValueError: nobody knows the lengths of completions yet."""
  raise ValueError("the policy decides the lengths during the run.")


CHARTS = (
    Chart("Reward", {"reward": "reward"}, spread={"reward": "reward_std"},
          caption="Mean over completions."),
    Chart("Lengths", {"completions/mean_length": "completion",
                      "think/mean_length": "thinking",
                      "answer/mean_length": "answer"},
          caption="Mean tokens of a completion and its parts."),
    Chart("Longest and shortest", {"completions/max_length": "longest",
                                   "completions/min_length": "shortest"}),
    Chart("Cut and closed", {"completions/clipped_ratio": "cut at max_tokens",
                             "think/forced_end_frac": "closed by the budget"},
          unit="share", caption="Share of completions."),
    Chart("Forced waits", {"think/wait_count": "forced"},
          caption="Mean number per completion."),
    Chart("Groups without signal", {"frac_reward_zero_std": "all equal",
                                    "frac_groups_solved": "all right"},
          unit="share"),
    Chart("Completions without a score", {"frac_unscored": "no score"},
          unit="share", optional=True, caption="A reward timed out or failed "
          "on them, or none applies; they leave their group."),
    Chart("Entropy", {"entropy": "entropy"}, caption="On sampled tokens."),
    Chart("Entropy and confidence of the rollouts", {
        "sampling/entropy": "entropy", "sampling/confidence": "confidence"},
        optional=True, caption="Of the model's own distribution at sampled "
        "tokens, in nats; with rollout.confidence_window."),
    Chart("KL to the reference", {"kl": "kl"}),
    Chart("Clipped ratios", {"clip_ratio/low_mean": "low",
                             "clip_ratio/high_mean": "high"},
          unit="share", caption="Share of sampled tokens."),
    Chart("Sampler against trainer", {
        "sampling/logp_difference/mean": "mean",
        "sampling/logp_difference/max": "max"}, log=True,
        caption="Absolute difference of the logprobs of sampled tokens."),
    *LEARNING,
    Chart("Where the time goes", {
        "time/rollout": "rollout", "time/reward_wait": "waiting for rewards",
        "time/prepare": "packing and logprobs",
        "time/learn": "learn"}, unit="seconds", stacked=True,
        caption="Learning is of one update, the rest of a whole batch."),
    Chart("Throughput", {"perf/tokens_per_sec": "completion tokens/s"}),
    *MACHINE,
)
