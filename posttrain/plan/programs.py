"""Every program that the stages of a config would run, on abstract arrays.

Nothing is copied from the stages: they make the jitted function and the
arrays, and are asked for shapes in place of arrays (`sharding.abstract`).

  M: microbatches  R: rows of one  T: length  P: prompts  G: samples of each
  S: slots of the cache
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from posttrain import sharding, weights
from posttrain.config import schema
from posttrain.data import batches
from posttrain.model import lora, transformer
from posttrain.model.transformer import Transformer
from posttrain.plan.setup import Setup
from posttrain.sampler import decode
from posttrain.sampler import sampler as sampler_lib
from posttrain.stages import evaluate, grpo_parts, sampling, sft, training
from posttrain.train import microbatches, partition, policy
from posttrain.train import state as state_lib


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program of a stage.

  Attributes:
    stage, kind: its name is `stage/kind`, with `detail` where there are
      several of a kind.
    lower: traces it, on the current mesh.
    arguments: abstract arrays, as they lie on the mesh.
    beside: abstract arrays that are on the devices while it runs.
    calls: runs in one step of its stage: of an SFT update, or of a batch of
      rollouts with all its updates; 0 where the stage has no steps.
    unknown_trips: bound of the loop over microbatches, which is an argument.
    waiting: abstract arrays that are in the hosts' memory meanwhile.
  """

  stage: str
  kind: str
  lower: Callable[[], jax.stages.Lowered]
  arguments: Any
  beside: dict[str, Any] = dataclasses.field(default_factory=dict)
  calls: float = 0.0
  unknown_trips: int | None = None
  detail: str = ""
  waiting: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    return f"{self.stage}/{self.kind}" + (
        f"[{self.detail}]" if self.detail else "")


def shard_bytes(tree: Any) -> int:
  """Bytes of one device's part of abstract or real arrays."""
  return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree))


def of_config(setup: Setup) -> Iterator[Program]:
  """The programs of all stages, in order, each on the current mesh."""
  model, trained = abstract_model(setup), False
  for name in setup.config.stages:
    section = setup.config[name]
    if section.kind == "evaluate":
      # The pipeline keeps what was trained last while others are evaluated.
      yield from _evaluate(setup, name, section, model,
                           {"trained weights": model} if trained else {})
      continue
    whole, paths = partition.abstract(
        setup.model, training.plan(section, setup.config.compute))
    fresh = whole.config.lora != model.config.lora
    model, trained = weights.on_mesh(whole), True
    if section.kind == "sft":
      yield from _sft(setup, name, section, model, paths)
    else:
      for program in _grpo(setup, name, section, model, paths, fresh):
        yield _offloaded(program, setup.config.compute.offload)


def _offloaded(program: Program, names: Collection[str]) -> Program:
  """The program while what else would be beside it waits on the hosts."""
  part = lambda inside: {name: tree for name, tree in program.beside.items()
                         if (name in names) == inside}
  return dataclasses.replace(
      program, beside=part(False), waiting=part(True))


def abstract_model(setup: Setup) -> Transformer:
  """Parameters in float32, as the current mesh would hold them."""
  return weights.on_mesh(transformer.abstract(setup.model))


def abstract_state(
    model: Transformer, optimizer: Any, paths: Collection[str],
    section: config_dict.ConfigDict,
) -> state_lib.TrainState:
  """What an update moves, as the current mesh would hold it."""
  return weights.on_mesh(jax.eval_shape(
      lambda model: state_lib.create(
          model, optimizer, paths, training.spike_rule(section)), model))


def _sft(
    setup: Setup, name: str, section: config_dict.ConfigDict,
    model: Transformer, paths: Collection[str],
) -> Iterator[Program]:
  optimizer, update, sums = sft.make_programs(
      section, loss_chunk=setup.config.compute.loss_chunk)
  state = abstract_state(model, optimizer, paths, section)
  count = section.num_microbatches
  batch = microbatches.stack(
      batches.empty(**training.pick(section, "rows sequence_length")), count,
      put=sharding.abstract)
  yield Program(
      name, "update", functools.partial(update.lower, state, batch, count),
      (state, batch), calls=1, unknown_trips=count)
  if section.eval_data.sources:
    yield Program(
        name, "held_out", functools.partial(sums.lower, state.model, batch),
        (state.model, batch), beside={"optimizer": state.opt_state})


def _grpo(
    setup: Setup, name: str, section: config_dict.ConfigDict,
    model: Transformer, paths: Collection[str], fresh: bool,
) -> Iterator[Program]:
  loss = grpo_parts.make_loss(
      section, loss_chunk=setup.config.compute.loss_chunk)
  optimizer, update = training.make_update(section, loss)
  state = abstract_state(model, optimizer, paths, section)
  models, own = {"policy": model}, {"policy": model}
  if section.loss.kl_coef:
    models["reference"], shared = _reference(setup, section, model, fresh)
    own["reference"] = models["reference"]
    if shared:  # What the policy does not move is there once.
      own = {key: partition.split(tree, paths)[0]
             for key, tree in own.items()}
  beside = lambda *running: {
      key: tree for key, tree in (*own.items(), ("optimizer", state.opt_state))
      if key not in running}
  yield from _sampling(
      setup, name, model, section.rollout,
      groups=section.num_groups, group_size=section.group_size,
      limits=sampling.make_limits(section.rollout), beside=beside("policy"))

  shapes = grpo_parts.make_shapes(section)
  updates = grpo_parts.num_updates(section)
  experience = policy.empty_experience(shapes, _experts(model))
  count, column = shapes.microbatches, np.zeros_like(experience["advantages"])
  for kind, whose, calls in _logprobs(section, updates):
    batch = _arrays(experience)
    yield Program(
        name, kind, functools.partial(
            policy.sequence_logprobs.lower, models[whose], batch,
            np.int32(count), loss=loss),
        (models[whose], batch), beside(whose), calls * shapes.num_minibatches,
        unknown_trips=count)
    if whose == "reference" or updates > 1:
      experience |= {kind: column}
  every = _arrays(experience)
  # The first update of a batch of rollouts is its own old policy.
  first = {key: x for key, x in every.items() if key != "old_logprobs"}
  for kind, batch, calls in (
      ("update", first, 1), ("later_update", every, updates - 1)):
    if calls:
      yield Program(
          name, kind, functools.partial(
              update.lower, state, batch, np.int32(count)),
          (state, batch), beside("policy", "optimizer"), calls,
          unknown_trips=count)


def _reference(
    setup: Setup, section: config_dict.ConfigDict, model: Transformer,
    fresh: bool,
) -> tuple[Transformer, bool]:
  """What the KL is against, and whether it shares arrays with the policy.

  As `Learner._make_reference` has it.
  """
  dtype = setup.config.compute.frozen_dtype
  shared = section.reference in ("", schema.ADAPTER_OFF)
  if not shared:
    model = abstract_model(setup)
  elif fresh or section.reference == schema.ADAPTER_OFF:
    model = lora.without(model)
  return weights.on_mesh(jax.eval_shape(
      lambda model: partition.at_rest(model, (), dtype), model)), shared


def _experts(model: Transformer) -> np.ndarray | None:
  """The sampler's choice of experts of no tokens; None without any."""
  c = model.config
  return np.zeros((0, c.layers, c.experts_per_token), decode.experts_dtype(
      c)) if c.num_experts else None


def _arrays(experience: policy.Arrays) -> dict[str, Any]:
  return policy.minibatch(experience, 0, put=sharding.abstract)[0]


def _logprobs(
    section: config_dict.ConfigDict, updates: int,
) -> Iterator[tuple[str, str, int]]:
  """What `Learner.collect` adds: column, model, times for each minibatch."""
  against = section.loss.kl_coef > 0
  in_reward = against and section.loss.kl_in == "reward"
  if updates > 1 or in_reward:
    yield "old_logprobs", "policy", (updates > 1) + in_reward
  if against:
    yield "ref_logprobs", "reference", 1 + in_reward


def _evaluate(
    setup: Setup, name: str, section: config_dict.ConfigDict,
    model: Transformer, beside: dict[str, Any],
) -> Iterator[Program]:
  sizes = sorted(set(evaluate.samples_of_cells(section).values()))
  for samples in sizes:
    groups = evaluate.batch_size(section, samples)
    count = section.problems.count
    yield from _sampling(
        setup, name, model, section.rollout,
        groups=min(groups, count) if count else groups, group_size=samples,
        limits=sampler_lib.Limits(max_tokens=section.rollout.max_tokens),
        beside=beside, detail=f"G={samples}" if len(sizes) > 1 else "",
        steps=False)


def _sampling(
    setup: Setup, stage: str, model: Transformer,
    rollout: config_dict.ConfigDict, *, groups: int, group_size: int,
    limits: sampler_lib.Limits, beside: dict[str, Any], detail: str = "",
    steps: bool = True,
) -> Iterator[Program]:
  """Prefill, then a chunk of decoding for each size of the cache.

  Calls are for completions that all run to their maximum.

  Raises:
    ValueError: the section refills its rows.
  """
  if rollout.get("slots") or rollout.get("refill"):
    key = "slots=0" if rollout.get("slots") else "refill=False"
    raise ValueError(
        f"{stage} refills its rows, and the programs of an engine are not "
        f"planned yet. Plan it with {stage}.rollout.{key}.")
  sampler = sampling.of_tables(setup.thinking_ids, setup.tables, rollout)
  inputs = sampler.inputs(
      sampler.make_requests(
          [[0]] * groups, limits, prompt_id=[0] * groups,
          group_size=group_size),
      group_size=group_size, put=sharding.abstract)
  prompts = [inputs[key] for key in (
      "tokens", "segment_ids", "in_thinking", "done")]
  fixed = setup.tables, inputs["budgets"]

  # A cache of any size has the layout that prefill would give it.
  whole, blocks = weights.on_mesh(decode.unstacked.eval_shape(
      model, weights_dtype=sampler.weights_dtype))
  kept = [w for w, ready in zip(
      jax.tree.leaves(model), jax.tree.leaves(whole), strict=True)
          if (w.sharding, w.dtype) != (ready.sharding, ready.dtype)]
  looping = beside | ({"tables at rest": kept} if kept else {})
  carry_of = lambda slots: dataclasses.replace(
      weights.on_mesh(decode.prefill.eval_shape(
          model, *prompts, *fixed, group_size=group_size, slots=slots,
          cache_dtype=sampler.cache_dtype)), hook=inputs["hook"])
  rows, script = _draws(stage, sampler, inputs)
  first = sampler.first_slots
  yield Program(
      stage, "prefill", functools.partial(
          decode.prefill.lower, model, *prompts, *fixed,
          group_size=group_size, slots=first,
          cache_dtype=sampler.cache_dtype),
      (model, prompts, inputs["budgets"]), beside, float(steps),
      detail=detail)
  yield Program(
      stage, "unstack", functools.partial(
          decode.unstacked.lower, model,
          weights_dtype=sampler.weights_dtype),
      (model,), {"carry": carry_of(first), **beside}, float(steps),
      detail=detail)
  slots, used, carry = first, sampler.max_prompt_tokens, carry_of(first)
  end = sampler.max_prompt_tokens + rollout.max_tokens
  while used < end:
    chunks = math.ceil((min(slots, end) - used) / sampler.chunk)
    sized = f"{detail + ' ' if detail else ''}S={slots}"
    yield Program(
        stage, "decode", functools.partial(
            decode.decode.lower, whole, blocks, carry, rows, script,
            np.int32(len(inputs["done"])), setup.tables,
            steps=sampler.chunk, hook=sampler.steering.hook,
            policy=sampler.steering.policy),
        (whole, blocks, carry, rows, script), looping,
        float(steps * chunks), detail=sized)
    used += chunks * sampler.chunk
    if used < end:
      slots = sampler.next_slots(slots)
      yield Program(
          stage, "grow", functools.partial(
              decode.resize.lower, carry, slots=slots),
          (carry,), {"model": whole, "layers": blocks, **looping}, float(steps),
          detail=f"{sized} to {slots}")
      carry = carry_of(slots)


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
