"""Rollouts -> packed experience -> the arrays and the loss of an update.

A minibatch is a set of completions, each behind its prompt, packed into rows
and cut into microbatches; or several behind one prompt, see `shared_prompts`.
All minibatches of a batch of rollouts have one shape, and say how many of their
microbatches are in use, so that the learner is compiled once.

  U: minibatches  M: microbatches  R: rows of one  T: length of a row
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain import sharding
from posttrain.data import pack
from posttrain.model.transformer import Transformer
from posttrain.objectives import importance_sampling, kl
from posttrain.rl import shared_prompts
from posttrain.sampler.rollouts import Rollouts
from posttrain.train import forward

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Packing shapes of completions.

  Attributes:
    length: T, at least the longest prompt and completion together.
    rows: R, over all devices.
    num_minibatches: U.
    completions: per minibatch at most; its rows are never more.
    share_prompts: completions of one prompt lie behind one copy of it.
  """

  length: int
  rows: int
  num_minibatches: int
  completions: int
  share_prompts: bool = False

  @property
  def microbatches(self) -> int:
    """M, enough even if no two completions fit in one row."""
    return -(-self.completions // self.rows)


def pack_experience(
    rollouts: Rollouts, per_completion: Mapping[str, np.ndarray],
    minibatches: Sequence[np.ndarray], denominators: Sequence[float],
    shapes: Shapes,
) -> Arrays:
  """Completions with what their loss needs, as [U, M, R, T] arrays.

  Args:
    rollouts: B completions.
    per_completion: [B] float32 each: `advantages`, and the `token_weights`
      of its tokens (`policy.aggregation_weights`).
    minibatches: row indices of each; U of them, some may be empty.
    denominators: of each minibatch's loss, which may count completions that
      are not packed, since they cannot move the weights. The packed tokens
      share it equally, as `token_shares`.

  Returns:
    [U, M, R, T] arrays named in `COLUMNS`; `prefix_ids` likewise if prompts are
    shared; `num_microbatches` [U] int32; and `sampler_experts`
    [U, M, R, T, L, k] if the rollouts have experts.
  """
  experts = rollouts.experts
  columns = _columns(shapes, None if experts is None else experts[0, :0])

  def examples(rows, denominator):
    tokens = rollouts.loss_mask[rows].sum()
    if not tokens:  # Nothing that a loss could be of.
      return []
    share = np.full(len(rollouts.lengths), denominator / tokens, np.float32)
    alone = [_example(
        rollouts, {**per_completion, "token_shares": share}, row)
             for row in rows]
    return shared_prompts.merge(
        alone, [rollouts.prompts[row] for row in rows],
        length=shapes.length) if shapes.share_prompts else alone

  packed = [_pack(examples(rows, denominator), shapes, columns)
            for rows, denominator in zip(
                minibatches, denominators, strict=True)]
  return {
      name: np.stack([arrays[name] for arrays in packed])
      for name in packed[0]}


def _example(
    rollouts: Rollouts, per_completion: Mapping[str, np.ndarray], row: int,
) -> Arrays:
  """One completion behind its prompt; per-token columns, 0 on the prompt."""
  prompt, length = rollouts.prompts[row], int(rollouts.lengths[row])
  behind = lambda values, dtype: np.concatenate([
      np.zeros((len(prompt), *values.shape[1:]), dtype),
      values[:length].astype(dtype)])
  experts = rollouts.experts
  every = lambda value: behind(np.full(length, value), np.float32)
  return {
      "completion": np.full(len(prompt) + length, row, np.int32),
      "tokens": np.concatenate(
          [prompt, rollouts.tokens[row, :length]]).astype(np.int32),
      "loss_mask": behind(rollouts.loss_mask[row], bool),
      # A forced token's, which may be unknown, has no place in learning.
      "sampler_logprobs": behind(np.where(
          rollouts.loss_mask[row], rollouts.logprobs[row], 0), np.float32),
      **({} if experts is None else {
          "sampler_experts": behind(experts[row], experts.dtype)}),
      **{name: every(values[row])
         for name, values in per_completion.items()}}


def empty_experience(
    shapes: Shapes, experts: np.ndarray | None = None) -> Arrays:
  """One minibatch without a completion, [1, M, R, T]: for its shapes.

  Args:
    experts: [0, L, k] of a model that has them, see `Rollouts.experts`.
  """
  return {name: x[None] for name, x in _pack(
      [], shapes, _columns(shapes, experts)).items()}


def _columns(shapes: Shapes, experts: np.ndarray | None) -> Arrays:
  """Of each column, an array of no tokens."""
  columns: Arrays = {
      name: np.zeros(0, dtype) for name, dtype in COLUMNS.items()}
  if shapes.share_prompts:
    columns["prefix_ids"] = np.zeros(0, np.int32)
  return columns if experts is None else columns | {"sampler_experts": experts}


COLUMNS = {
    "tokens": np.int32, "loss_mask": np.bool_, "advantages": np.float32,
    "token_weights": np.float32, "token_shares": np.float32,
    "sampler_logprobs": np.float32, "completion": np.int32,
    "positions": np.int32, "segment_ids": np.int32}


def _pack(
    examples: Sequence[Arrays], shapes: Shapes, columns: Arrays) -> Arrays:
  """`columns`: of each, an array of no tokens."""
  rows = shapes.microbatches * shapes.rows
  arrays: Arrays = {
      name: np.zeros((rows, shapes.length, *like.shape[1:]), like.dtype)
      for name, like in columns.items()}
  used = 0
  if examples:
    packed, placement = pack.pack_rows(examples, length=shapes.length)
    if shapes.share_prompts:
      packed = shared_prompts.separate(packed)
    used = int(placement.row.max()) + 1
    for name, array in packed.items():
      arrays[name][:used] = array
  folded = lambda x: x.reshape(
      shapes.microbatches, shapes.rows, *x.shape[1:])
  return {name: folded(x) for name, x in arrays.items()} | {
      "num_microbatches": np.array(-(-used // shapes.rows), np.int32)}


def minibatch(
    experience: Arrays, index: int,
    put: Callable[..., Any] = sharding.put,
) -> tuple[dict[str, Any], int]:
  """One minibatch on the mesh, and its number of microbatches in use.

  Args:
    put: what makes device arrays; `sharding.abstract` for their shapes.
  """
  arrays = {
      name: array[index] for name, array in experience.items()
      if array.ndim > 1}
  return {
      name: put(array, None, "batch", "length", *(None,) * (array.ndim - 3))
      for name, array in arrays.items()}, int(
          experience["num_microbatches"][index])


# What the trainer has for a loss, beside the arrays that each is given.
KEYWORDS = (
    "clip_low", "clip_high", "ref_logprobs", "kl_coef", "kl_estimator",
    "token_weights", "token_shares", "importance_weights")


def takes(function: Callable[..., Any], name: str) -> bool:
  """Tests if a function takes a keyword, by name or as one of any."""
  parameters = inspect.signature(function).parameters
  return name in parameters or any(
      p.kind is p.VAR_KEYWORD for p in parameters.values())


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
  """The static part of the loss; hashable, so that `jit` can key on it.

  `function` has the signature of `objectives.policy.policy_loss`, or takes some
  of its keywords, the `accepted`. `correction`, `cap` and `floor` are of
  `objectives.behaviour`, whose factors are its `importance_weights`.
  """

  function: Callable[..., tuple[jax.Array, jax.Array, dict[str, jax.Array]]]
  temperature: float
  chunk: int
  clip_low: float
  clip_high: float
  kl_coef: float = 0.0
  kl_estimator: str = "k3"
  correction: str = "none"
  cap: float = 2.0
  floor: float = 0.0

  @property
  def accepted(self) -> tuple[str, ...]:
    """Lists those of `KEYWORDS` that the function takes."""
    return tuple(name for name in KEYWORDS if takes(self.function, name))

  def logprobs(self, model: Transformer, batch: dict[str, jax.Array]):
    """Logprobs and entropies [R, T] of one microbatch, and its traffic."""
    return forward.token_logprobs(
        model, batch, temperature=self.temperature, chunk=self.chunk)

  def __call__(self, model: Transformer, batch: dict[str, jax.Array]):
    """Numerator, denominator and sums; see `step.Loss`.

    A batch without `old_logprobs` is the first update of its rollouts: the
    old logprobs are the current ones, and the ratio is exactly 1.
    """
    logprobs, entropy, traffic = self.logprobs(model, batch)
    old = batch.get("old_logprobs", jax.lax.stop_gradient(logprobs))
    weights: jax.Array | None = None
    importance: dict[str, jax.Array] = {}
    if self.correction != "none":
      weights, importance = importance_sampling.correction(
          old, batch["sampler_logprobs"], batch["loss_mask"],
          kind=self.correction, cap=self.cap, floor=self.floor)
    keywords = dict(
        clip_low=self.clip_low, clip_high=self.clip_high,
        ref_logprobs=batch.get("ref_logprobs"), kl_coef=self.kl_coef,
        kl_estimator=self.kl_estimator, token_weights=batch["token_weights"],
        token_shares=batch["token_shares"], importance_weights=weights)
    numerator, denominator, sums = self.function(
        logprobs, old, batch["advantages"], batch["loss_mask"],
        **{name: keywords[name] for name in self.accepted})
    routers = {} if traffic is None else traffic.sums() | _agreement(
        traffic.choice, batch["sampler_experts"])
    return numerator, denominator, sums | importance | _diagnostics(
        logprobs, old, entropy, batch) | routers


def _diagnostics(logprobs, old, entropy, batch) -> dict[str, jax.Array]:
  """Sums over the sampled tokens, and maxima."""
  mask = batch["loss_mask"]
  difference = jnp.where(
      mask, jax.lax.stop_gradient(logprobs) - batch["sampler_logprobs"], 0)
  ratio = jnp.exp(jnp.where(mask, jax.lax.stop_gradient(logprobs) - old, 0))
  within = jnp.abs(jnp.exp(difference) - 1.0005) <= 1.5e-3
  return {
      "tokens": jnp.sum(mask),
      "entropy": jnp.sum(jnp.where(mask, entropy, 0)),
      "ratio_deviation_max": jnp.max(jnp.abs(ratio - 1)),
      "difference": jnp.sum(jnp.abs(difference)),
      "difference_max": jnp.max(jnp.abs(difference)),
      "difference_k3": jnp.sum(jnp.exp(difference) - 1 - difference),
      "difference_within": jnp.sum(mask & within)}


def _agreement(
    choice: jax.Array, sampler_experts: jax.Array) -> dict[str, jax.Array]:
  """Where the trainer sends a token to the experts that the sampler did.

  Args:
    choice: [L, R, T, k] int32.
    sampler_experts: [R, T, L, k], see `Rollouts.experts`.

  Returns:
    Counts of pairs of a token and a layer: of the same set, and of all that
    the sampler fed.
  """
  ours = jnp.sort(jnp.moveaxis(choice, 0, 2), axis=-1)
  theirs = jnp.sort(sampler_experts.astype(jnp.int32), axis=-1) - 1
  fed = theirs[..., 0] >= 0
  return {"experts_equal": jnp.sum(fed & jnp.all(ours == theirs, axis=-1)),
          "experts_compared": jnp.sum(fed)}


# What `step.update` and `_diagnostics` report; the rest is the loss's own.
DIAGNOSTICS = (
    "loss", "grad_norm", "learning_rate", "numerator", "denominator", "tokens",
    "entropy", "ratio_deviation_max", "difference", "difference_max",
    "difference_k3", "difference_within", "experts_equal", "experts_compared",
    "importance_max", "importance_inverse_max")


def metrics_of_sums(
    sums: dict[str, float], *, fresh: bool) -> dict[str, float]:
  """Means over the sampled tokens, under the names that users know.

  Args:
    sums: of an update; those that the loss function adds are averaged too.
    fresh: the sampler's logprobs and the trainer's are of the same weights:
      the update is the first of rollouts that are not stale.
  """
  tokens = max(sums["tokens"], 1)
  mean = lambda name: sums[name] / tokens
  metrics = {
      "entropy": mean("entropy"),
      "ratio/max_deviation": sums["ratio_deviation_max"],
      **{name: value for name, value in sums.items()
         if name.startswith("router/")},
      **{_user_name(name): mean(name) for name in sums
         if name not in DIAGNOSTICS and not name.startswith("router/")}}
  if "importance_max" in sums:
    metrics |= {"importance/max": sums["importance_max"],
                "importance/min": 1 / sums["importance_inverse_max"]
                if sums["importance_inverse_max"] else 1.0}
  if fresh:
    metrics |= {
        "sampling/logp_difference/mean": mean("difference"),
        "sampling/logp_difference/max": sums["difference_max"],
        "sampling/mismatch_kl": mean("difference_k3"),
        "sampling/ratio_within_0.999_1.002": mean("difference_within")}
  if fresh and sums.get("experts_compared"):
    metrics["router/agreement"] = (
        sums["experts_equal"] / sums["experts_compared"])
  return metrics


def _user_name(name: str) -> str:
  return f"{name}_mean" if name.startswith("clip_ratio/") else name


@functools.partial(jax.jit, static_argnames="loss")
def sequence_logprobs(
    model: Transformer, batch: dict[str, jax.Array],
    num_microbatches: jax.Array, *, loss: PolicyLoss,
) -> jax.Array:
  """Logprobs [M, R, T] of every token; 0 in microbatches not in use."""
  def body(index, out):
    pick = {name: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
            for name, x in batch.items()}
    logprobs = loss.logprobs(model, pick)[0]
    return jax.lax.dynamic_update_index_in_dim(out, logprobs, index, 0)

  zeros = jnp.zeros_like(batch["advantages"])
  return jax.lax.fori_loop(0, num_microbatches, body, zeros)


def add_logprobs(
    name: str, model: Transformer, experience: Arrays, loss: PolicyLoss,
) -> Arrays:
  """The experience with a column of logprobs under `model`."""
  columns = []
  for index in range(len(experience["num_microbatches"])):
    batch, used = minibatch(experience, index)
    columns.append(sharding.fetch(
        sequence_logprobs(model, batch, np.int32(used), loss=loss)))
  return experience | {name: np.stack(columns)}


def divergences(
    experience: Arrays, model: Transformer, reference: Transformer,
    loss: PolicyLoss, estimator: str, num_completions: int,
) -> np.ndarray:
  """KL estimates against the reference, summed over each completion.

  Args:
    experience: packed from completions 0 .. num_completions - 1.

  Returns:
    [num_completions] float64.
  """
  with_both = add_logprobs(
      "ref_logprobs", reference,
      add_logprobs("old_logprobs", model, experience, loss), loss)
  per_token = np.asarray(kl.ESTIMATORS[estimator](
      jnp.asarray(with_both["old_logprobs"]),
      jnp.asarray(with_both["ref_logprobs"])), np.float64)
  return np.bincount(
      with_both["completion"].ravel(),
      np.where(with_both["loss_mask"], per_token, 0).ravel(),
      minlength=num_completions)
