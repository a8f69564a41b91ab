"""Scored rollouts -> advantages -> the columns of a batch's updates.

A KL in the reward is not the paper's. It is subtracted from the advantage,
centred in its group and not divided by the standard deviation of the rewards,
so that `kl_coef` has the same weight in every group.

  B: completions  U: minibatches  M: microbatches  R: rows of one  T: length

Reference: the KL in the reward, https://arxiv.org/abs/1909.08593, section 2.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from posttrain import sharding
from posttrain.model import token_logprobs
from posttrain.model.transformer import Transformer
from posttrain.objectives import advantages as advantages_lib
from posttrain.objectives import kl, policy
from posttrain.rl import packing
from posttrain.rl.objective import PolicyObjective
from posttrain.sampler.rollouts import Rollouts
from posttrain.train import state, step

# Float32 columns that are there only if the objective needs them.
FOR_LOSS = ("advantages", "token_weights", "denominator_shares",
            "old_logprobs", "ref_logprobs")


def of_model(experience: packing.Arrays) -> packing.Arrays:
  """Picks what the model reads: one compiled program, whatever else there is.
  """
  names = ("tokens", "positions", "segment_ids", "prefix_ids",
           "num_microbatches")
  return {name: x for name, x in experience.items() if name in names}


@functools.partial(jax.jit, static_argnames=("chunk", "temperature"))
def sequence_logprobs(
    model: Transformer, batch: dict[str, jax.Array],
    num_microbatches: jax.Array, *, chunk: int, temperature: float,
) -> jax.Array:
  """Computes logprobs [M, R, T] of every token; 0 in microbatches not in use.
  """
  def body(index, out):
    pick = {name: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
            for name, x in batch.items()}
    logprobs, _, _ = token_logprobs.token_logprobs(
        model, pick, chunk=chunk, temperature=temperature)
    return jax.lax.dynamic_update_index_in_dim(out, logprobs, index, 0)

  zeros = jnp.zeros_like(batch["tokens"], jnp.float32)
  return jax.lax.fori_loop(0, num_microbatches, body, zeros)


def add_logprobs(
    name: str, model: Transformer, experience: packing.Arrays, *, chunk: int,
    temperature: float,
) -> packing.Arrays:
  """Adds a column of logprobs under `model` to the experience."""
  read, columns = of_model(experience), []
  for index in range(len(experience["num_microbatches"])):
    batch, used = packing.minibatch(read, index)
    columns.append(sharding.fetch(sequence_logprobs(
        model, batch, np.int32(used), chunk=chunk, temperature=temperature)))
  return experience | {name: np.stack(columns)}


def divergences(
    experience: packing.Arrays, estimator: str, num_completions: int,
) -> np.ndarray:
  """Sums KL estimates against the reference over each completion.

  Args:
    experience: packed from completions 0 .. num_completions - 1, with
      `old_logprobs` and `ref_logprobs`.

  Returns:
    [num_completions] float64.
  """
  per_token = np.asarray(kl.ESTIMATORS[estimator](
      jnp.asarray(experience["old_logprobs"]),
      jnp.asarray(experience["ref_logprobs"])), np.float64)
  counted = experience["loss_mask"]
  return np.bincount(
      experience["completion_ids"][counted], per_token[counted],
      minlength=num_completions)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A batch of rollouts, ready for its updates.

  Attributes:
    experience: [U, M, R, T] columns, see `packing`.
    advantages: [B] float32, one for all tokens of a completion.
    metrics: of a KL in the reward.
  """

  experience: packing.Arrays
  advantages: np.ndarray
  metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Preparation:
  """Turns scored rollouts into columns.

  Attributes:
    objective: its `needs` are computed.
    shapes: of the packed rows.
    max_tokens: the longest completion possible.
    chunk, temperature: see `token_logprobs.of_hidden`.
    several: more than one update learns from a batch, so that old logprobs
      are not those of the update itself.
    all_groups: completions without a signal are packed too, for a loss
      outside the objective (load balancing).
  """

  objective: PolicyObjective
  shapes: packing.Shapes
  max_tokens: int
  chunk: int
  temperature: float
  several: bool
  all_groups: bool

  @property
  def loss(self) -> step.Loss:
    """The objective over the model's logprobs."""
    return functools.partial(
        step.evaluate, self.objective, chunk=self.chunk,
        temperature=self.temperature)

  def __call__(
      self, rollouts: Rollouts, group_ids: np.ndarray, rewards: np.ndarray,
      model: Transformer, reference: Transformer | None,
      generator: np.random.Generator,
  ) -> Prepared:
    """Computes advantages, packs, and adds logprobs.

    Args:
      group_ids: [B] int, from 0, equal for the completions of one prompt.
      rewards: [B] float64; NaN of a completion without a score, which is not
        packed.
      reference: of the KL; it may wait in the hosts' memory.
      generator: draws which groups make a minibatch.
    """
    objective = self.objective
    scored = ~np.isnan(rewards)
    rows = np.flatnonzero(
        scored if self.all_groups or objective.needs_silent_groups
        else advantages_lib.informative(rewards, group_ids))
    # Whole groups; drawn, so that neighbours are not always together.
    numbers = range(self.shapes.num_minibatches)
    order = generator.permutation(group_ids.max() + 1)
    minibatch_of = np.argsort(order)[group_ids] % len(numbers)  # [B]
    minibatches = [rows[minibatch_of[rows] == index] for index in numbers]
    experience = self._with_logprobs(packing.pack_experience(
        rollouts, group_ids, minibatches, self.shapes), model, reference)
    advantages = advantages_lib.group_advantages(
        rewards, group_ids, std=objective.advantage_std,
        eps=objective.advantage_eps)
    metrics: dict[str, float] = {}
    if objective.kl_in_reward:
      estimate = divergences(
          experience, objective.kl_estimator, len(rewards))
      advantages -= (objective.kl_coef * advantages_lib.centred(
          np.where(scored, estimate, np.nan), group_ids)).astype(np.float32)
      metrics["kl"] = float(
          estimate[rows].sum() / max(rollouts.loss_mask[rows].sum(), 1))
    lengths = rollouts.loss_mask.sum(1)
    every = lambda x: packing.per_token(
        experience, rollouts, np.broadcast_to(
            x[:, None], rollouts.tokens.shape))
    experience |= {
        "advantages": every(advantages),
        "token_weights": every(policy.aggregation_weights(
            objective.aggregation, lengths)),
        # Of all that have a score, also of those that are not packed.
        "denominator_shares": packing.denominator_shares(experience, [
            policy.aggregation_denominator(
                objective.aggregation, lengths[scored & (minibatch_of == n)],
                max_tokens=self.max_tokens) for n in numbers])}
    return Prepared(
        {name: x for name, x in experience.items()
         if name not in FOR_LOSS or name in self.columns},
        advantages, metrics)

  @property
  def columns(self) -> list[str]:
    """Lists the columns of `FOR_LOSS` that the objective reads."""
    return [name for name in FOR_LOSS if name in self.objective.needs and (
        self.several or name != "old_logprobs")]

  def _with_logprobs(self, experience, model, reference):
    """Adds what the objective, or a KL in the reward, needs."""
    for name, whose in (("old_logprobs", model), ("ref_logprobs", reference)):
      if name in self.columns or self.objective.kl_in_reward:
        experience = add_logprobs(
            name, state.to_devices(whose), experience, chunk=self.chunk,
            temperature=self.temperature)
    return experience
