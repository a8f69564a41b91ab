"""Every program that the stages of a config would run, on abstract arrays.

Nothing is copied from the stages: they make the jitted function and the
arrays, and are asked for shapes in place of arrays (`sharding.abstract`).

  M: microbatches  R: rows of one  T: length  P: prompts  G: samples of each
  S: slots of the cache
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from posttrain import sharding, weights
from posttrain.config import checks
from posttrain.data import batches
from posttrain.model import lora
from posttrain.model.transformer import Transformer
from posttrain.plan import abstract, sampling_programs, transfer_programs
from posttrain.plan.program import SAMPLING, Program
from posttrain.plan.setup import Setup
from posttrain.rl import packing
from posttrain.sampler import decode
from posttrain.stages import evaluate, rl_parts, sampling, sft, training
from posttrain.train import microbatches, trainable
from posttrain.train import state as state_lib


def of_config(
    setup: Setup, sampling: jax.sharding.Mesh | None = None,
) -> Iterator[Program]:
  """The programs of all stages, in order.

  Args:
    sampling: the mesh of the programs whose role is to sample, if it has
      devices of its own. All others are on the current mesh.
  """
  model, trained = abstract.model_of(setup), False
  for name in setup.config.stages:
    section = setup.config[name]
    if section.kind == "evaluate":
      # The pipeline keeps what was trained last while others are evaluated.
      yield from _evaluate(setup, name, section, model,
                           {"trained weights": model} if trained else {})
      continue
    before, trained = model.config.lora, True
    model, paths = abstract.trained(setup, name)
    fresh = model.config.lora != before
    if section.kind == "sft":
      yield from _sft(setup, name, section, model, paths)
    else:
      for program in _rl(
          setup, name, section, model, paths, fresh, sampling):
        yield _offloaded(program, setup.config.compute.offload)


def _offloaded(program: Program, names: Collection[str]) -> Program:
  """The program while what else would be beside it waits on the hosts."""
  part = lambda inside: {name: tree for name, tree in program.beside.items()
                         if (name in names) == inside}
  return dataclasses.replace(
      program, beside=part(False), waiting=part(True))


def _sft(
    setup: Setup, name: str, section: config_dict.ConfigDict,
    model: Transformer, paths: Collection[str],
) -> Iterator[Program]:
  optimizer, update, sums = sft.make_programs(
      section, loss_chunk=setup.config.compute.loss_chunk)
  state = abstract.state_of(model, optimizer, paths, section)
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


def _rl(
    setup: Setup, name: str, section: config_dict.ConfigDict,
    model: Transformer, paths: Collection[str], fresh: bool,
    sampling: jax.sharding.Mesh | None,
) -> Iterator[Program]:
  """A batch of rollouts, logprobs where they are needed, and updates."""
  loss = rl_parts.make_loss(
      section, loss_chunk=setup.config.compute.loss_chunk)
  optimizer, update = training.make_update(section, loss)
  state = abstract.state_of(model, optimizer, paths, section)
  models, own = {"policy": model}, {"policy": model}
  if section.loss.kl_coef:
    models["reference"], shared = _reference(setup, section, model, fresh)
    own["reference"] = models["reference"]
    if shared:  # What the policy does not move is there once.
      own = {key: trainable.split(tree, paths)[0]
             for key, tree in own.items()}
  beside = lambda *running: {
      key: tree for key, tree in (*own.items(), ("optimizer", state.opt_state))
      if key not in running}
  yield from _draws(
      setup, name, section, model, paths, beside("policy"), sampling)
  yield from _learning(name, section, models, state, loss, update, beside)


def _learning(
    name: str, section: config_dict.ConfigDict,
    models: dict[str, Transformer], state: state_lib.TrainState, loss: Any,
    update: Any, beside: Callable[..., dict[str, Any]],
) -> Iterator[Program]:
  """Yields the programs that `Learner` runs on the training devices.

  Args:
    models: "policy", and "reference" if there is one.
    beside: what is on the devices but for what is named.
  """
  shapes = rl_parts.make_shapes(section)
  updates = rl_parts.num_updates(section)
  experience = packing.empty_experience(
      shapes, _experts(models["policy"]))
  count, column = shapes.microbatches, np.zeros_like(experience["advantages"])
  for kind, whose, calls in _logprobs(section, updates):
    batch = _arrays(experience)
    yield Program(
        name, kind, functools.partial(
            packing.sequence_logprobs.lower, models[whose], batch,
            np.int32(count), loss=loss),
        (models[whose], batch), beside(whose), calls * shapes.num_minibatches,
        unknown_trips=count)
    kept = section.loss.kl_in == "loss" if whose == "reference" else updates > 1
    if kept:  # A KL in the reward is taken before the rows are packed anew.
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


def _draws(
    setup: Setup, name: str, section: config_dict.ConfigDict,
    model: Transformer, paths: Collection[str], beside: dict[str, Any],
    mesh: jax.sharding.Mesh | None,
) -> Iterator[Program]:
  """A batch of rollouts, on devices of its own if there is a `mesh` of them.
  """
  draw = functools.partial(
      sampling_programs.of_rollout, setup, name, rollout=section.rollout,
      groups=section.num_groups, group_size=section.group_size,
      limits=sampling.make_limits(section.rollout))
  if mesh is None:
    yield from draw(model=model, beside=beside)
    return
  transfer, like = transfer_programs.of_stage(setup, name, model, paths, mesh)
  moves = transfer_programs.programs(transfer, beside)
  with jax.set_mesh(mesh):  # Not around a `yield`, which would leak it.
    drawn = list(draw(model=like, beside={}))
  yield from moves
  for program in drawn:
    yield dataclasses.replace(program, role=SAMPLING)


def _reference(
    setup: Setup, section: config_dict.ConfigDict, model: Transformer,
    fresh: bool,
) -> tuple[Transformer, bool]:
  """Builds the reference; tells if it shares arrays with the policy.

  As `rl_parts.make_reference` has it.
  """
  dtype = setup.config.compute.frozen_dtype
  shared = section.reference in ("", checks.ADAPTER_OFF)
  if not shared:
    model = abstract.model_of(setup)
  elif fresh or section.reference == checks.ADAPTER_OFF:
    model = lora.without(model)
  return weights.on_mesh(jax.eval_shape(
      lambda model: trainable.at_rest(model, (), dtype), model)), shared


def _experts(model: Transformer) -> np.ndarray | None:
  """The sampler's choice of experts of no tokens; None without any."""
  c = model.config
  return np.zeros((0, c.layers, c.experts_per_token), decode.experts_dtype(
      c)) if c.num_experts else None


def _arrays(experience: packing.Arrays) -> dict[str, Any]:
  return packing.minibatch(experience, 0, put=sharding.abstract)[0]


def _logprobs(
    section: config_dict.ConfigDict, updates: int,
) -> Iterator[tuple[str, str, int]]:
  """Yields columns of `Learner.collect`: name, model, calls per minibatch."""
  against = section.loss.kl_coef > 0
  in_reward = against and section.loss.kl_in == "reward"
  if updates > 1 or in_reward:
    yield "old_logprobs", "policy", (updates > 1) + in_reward
  if against:
    yield "ref_logprobs", "reference", 1


def _evaluate(
    setup: Setup, name: str, section: config_dict.ConfigDict,
    model: Transformer, beside: dict[str, Any],
) -> Iterator[Program]:
  """A cell of each shape: of samples, and of waits where they count."""
  rollout, count = section.rollout, section.problems.count
  samples_of = evaluate.samples_of_cells(section)
  waits = rollout.continuous_batching or rollout.wait_order == "draw"
  found: dict[tuple[int, int], Any] = {}
  for cell in evaluate.cells_of(section):
    found.setdefault(
        (samples_of[cell.name], cell.num_waits if waits else 0), cell)
  several = [len(set(column)) > 1 for column in zip(*found, strict=True)]
  for (samples, _), cell in found.items():
    groups = evaluate.batch_size(section, samples)
    if rollout.continuous_batching:  # All; enough for the engine's rows.
      groups = count or groups + 1
    detail = itertools.compress(
        (f"G={samples}", f"waits={cell.num_waits}"), several)
    yield from sampling_programs.of_rollout(
        setup, name, model, rollout,
        groups=min(groups, count) if count else groups, group_size=samples,
        limits=evaluate.limits_of(section, cell), beside=beside,
        detail=" ".join(detail), steps=False)
