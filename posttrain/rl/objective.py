"""Policy objective: a loss function, and the trainer's own parts of it.

The function turns columns into terms (`objectives.columns`). The trainer
gives it old logprobs, importance-sampling weights and the aggregation as
columns, adds the KL to the reference as a term of its own, and measures.

  R: rows    T: length
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from posttrain.config.stages import rl as schema
from posttrain.objectives import columns as columns_lib
from posttrain.objectives import importance_sampling, kl, policy
from posttrain.objectives.columns import Columns, Objective, Sums, Terms
from posttrain.tasks import loading


@dataclasses.dataclass(frozen=True)
class PolicyObjective:
  """An objective of columns; its attributes are keys of the section `loss`.

  Attributes:
    function: with the parameters `args`.
  """

  function: Objective
  args: Mapping[str, Any]
  aggregation: str = schema.AGGREGATION
  advantage_std: str = "population"
  advantage_eps: float = 1e-6
  kl_coef: float = 0.0
  kl_estimator: str = schema.ESTIMATOR
  kl_in: str = "loss"
  importance_sampling: str = "none"
  importance_sampling_cap: float = 2.0
  importance_sampling_floor: float = 0.5

  @property
  def kl_term(self) -> bool:
    """Tests if the loss has the trainer's term of the KL."""
    return self.kl_coef > 0 and self.kl_in == "loss"

  @property
  def kl_in_reward(self) -> bool:
    return self.kl_coef > 0 and self.kl_in == "reward"

  @property
  def needs(self) -> frozenset[str]:
    """Lists the columns that are computed; some only to be measured."""
    declared = columns_lib.needed(self.function)
    weighted = self.importance_sampling != "none"
    return frozenset((
        "entropy", "sampler_logprobs", "experts", "sampler_experts", *declared,
        *(columns_lib.needed(kl.kl_loss) if self.kl_term else ()),
        *(("old_logprobs",) if weighted else ())))

  @property
  def needs_reference(self) -> bool:
    return self.kl_in_reward or "ref_logprobs" in self.needs

  @property
  def needs_silent_groups(self) -> bool:
    """Tests if completions whose advantages are 0 have a gradient.

    They have none in a function that declares `advantages` and
    `denominator_shares`, which count them even where they are not packed. A
    KL to the reference gives them one.
    """
    told = {"advantages", "denominator_shares"}
    return self.kl_coef > 0 or not told <= set(
        columns_lib.needed(self.function))

  def __call__(self, columns: Columns) -> tuple[Terms, Sums]:
    """Computes the function's terms, the KL's, and sums to measure.

    Columns without `old_logprobs` are of the first update of their rollouts:
    the old logprobs are the current ones, and the ratio is exactly 1.
    """
    given = dict(columns)
    measured: Sums = {}
    if "old_logprobs" in self.needs:
      given.setdefault(
          "old_logprobs", jax.lax.stop_gradient(columns["logprobs"]))
    if self.importance_sampling != "none":
      given["importance_weights"], measured = importance_sampling.correction(
          given["old_logprobs"], given["sampler_logprobs"], given["loss_mask"],
          kind=self.importance_sampling, cap=self.importance_sampling_cap,
          floor=self.importance_sampling_floor)
    elif "importance_weights" in self.needs:
      given["importance_weights"] = jnp.ones_like(given["logprobs"])
    terms, sums = columns_lib.call(self.function, given, self.args)
    if self.kl_term:
      more = columns_lib.call(kl.kl_loss, given, dict(
          coefficient=self.kl_coef, estimator=self.kl_estimator))
      terms, sums = _joined(terms, more[0]), _joined(sums, more[1])
    return terms, _joined(sums, measured | _diagnostics(given))


def _joined(own: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
  """Adds the trainer's terms or sums to those of the loss function."""
  twice = sorted(set(own) & set(more))
  if twice:
    raise ValueError(
        f"loss.function returns {', '.join(twice)}, which the trainer adds "
        "itself. Rename yours.")
  return {**own, **more}


def make(
    *, function: str, args: Mapping[str, Any], clip_low: float,
    clip_high: float, **keys: Any,
) -> PolicyObjective:
  """Makes the objective of the keys of a section `loss`.

  Raises:
    ValueError: `args` does not fit the function, or a key that is set has no
      effect under it.
  """
  loaded = loading.load_function(function)
  own = {"clip_low": clip_low, "clip_high": clip_high}
  default = loaded is policy.policy_loss
  if default and args:
    raise ValueError(
        f"loss.args is {dict(args)}, and is for a loss.function of your own; "
        f"that of {function} are the keys loss.{', loss.'.join(own)}.")
  try:
    loading.check_call(function, "columns", **(own if default else args))
  except ValueError as error:
    raise ValueError(
        f"loss.args: {error} An objective takes columns, and what loss.args "
        "has; see docs/changing.md.") from error
  objective = PolicyObjective(
      function=loaded, args=own if default else dict(args), **keys)
  _check_effect(
      objective, function, {} if default else {
          key: value for key, value in own.items() if value != schema.CLIP})
  return objective


def _check_effect(
    objective: PolicyObjective, function: str, inert: Mapping[str, Any],
) -> None:
  """Raises ValueError where a key that is set has no effect."""
  for key, value in inert.items():
    raise ValueError(
        f"loss.{key} is {value} and has no effect under loss.function="
        f"{function}, whose own parameters are in loss.args. Set "
        f"loss.args.{key}, if it has that one, or leave the key out.")
  without = dataclasses.replace(objective, importance_sampling="none")
  for key, unset, column in (
      ("aggregation", schema.AGGREGATION, "token_weights"),
      ("importance_sampling", "none", "importance_weights"),
      ("advantage_std", "population", "advantages"),
      ("advantage_eps", PolicyObjective.advantage_eps, "advantages"),
      ("kl_in", "loss", "advantages")):
    value = getattr(objective, key)
    if value != unset and column not in without.needs:
      raise ValueError(
          f"loss.{key} is {value!r} and has no effect: loss.function="
          f"{function} does not declare {column}. Leave the key out, or "
          "declare and use the column.")


def _diagnostics(columns: Mapping[str, jax.Array]) -> Sums:
  """Sums over the sampled tokens, and maxima."""
  mask = columns["loss_mask"]
  logprobs = jax.lax.stop_gradient(columns["logprobs"])
  difference = jnp.where(mask, logprobs - columns["sampler_logprobs"], 0)
  within = jnp.abs(jnp.exp(difference) - 1.0005) <= 1.5e-3
  sums = {
      "tokens": jnp.sum(mask),
      "entropy": jnp.sum(jnp.where(mask, columns["entropy"], 0)),
      "difference": jnp.sum(jnp.abs(difference)),
      "difference_max": jnp.max(jnp.abs(difference)),
      "difference_k3": jnp.sum(jnp.exp(difference) - 1 - difference),
      "difference_within": jnp.sum(mask & within)}
  if "old_logprobs" in columns:
    ratio = jnp.exp(jnp.where(mask, logprobs - columns["old_logprobs"], 0))
    sums["ratio_deviation_max"] = jnp.max(jnp.abs(ratio - 1))
  if "experts" in columns:
    sums |= _agreement(columns["experts"], columns["sampler_experts"])
  return sums


def _agreement(experts: jax.Array, sampler_experts: jax.Array) -> Sums:
  """Counts where trainer and sampler send a token to the same experts.

  Args:
    experts: [R, T, L, k] int32.
    sampler_experts: the same, see `Rollouts.experts`.

  Returns:
    Counts of pairs of a token and a layer: of the same set, and of all that
    the sampler fed.
  """
  ours = jnp.sort(experts, axis=-1)
  theirs = jnp.sort(sampler_experts.astype(jnp.int32), axis=-1) - 1
  fed = theirs[..., 0] >= 0
  return {"experts_equal": jnp.sum(fed & jnp.all(ours == theirs, axis=-1)),
          "experts_compared": jnp.sum(fed)}


# Sums of `step.update` and `_diagnostics`; the others are the loss's own.
DIAGNOSTICS = (
    "loss", "grad_norm", "learning_rate", "tokens", "entropy",
    "ratio_deviation_max", "difference", "difference_max", "difference_k3",
    "difference_within", "experts_equal", "experts_compared",
    "importance_max", "importance_inverse_max")
KEPT = ("router/", "loss/")  # Prefixes of what is a metric as it is.


def metrics_of_sums(
    sums: Mapping[str, float], *, fresh: bool) -> dict[str, float]:
  """Computes means over the sampled tokens, under the names that users know.

  Args:
    sums: of an update; those that the loss function adds are averaged too,
      but for the largest values, whose names end in "max".
    fresh: the sampler's logprobs and the trainer's are of the same weights:
      the update is the first of rollouts that are not stale.
  """
  tokens = max(sums["tokens"], 1)
  mean = lambda name: sums[name] / tokens
  metrics = {
      "entropy": mean("entropy"),
      **{name: value for name, value in sums.items() if name.startswith(KEPT)},
      **{_user_name(name): sums[name] if name.endswith("max") else mean(name)
         for name in sums if name not in DIAGNOSTICS
         and not name.startswith((*KEPT, "denominator/"))}}
  if "ratio_deviation_max" in sums:
    metrics["ratio/max_deviation"] = sums["ratio_deviation_max"]
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
