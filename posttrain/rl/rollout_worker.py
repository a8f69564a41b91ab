"""Rollout worker: problems -> completions -> scores, for one batch.

It runs the same on every host; only the model's work is spread over them. A
problem that a batch asks again is a group of its own. Its completions have the
sample ids after those of the earlier group, so that their draws differ.

  P: problems asked (groups)    G: group_size    B: completions, P * G
  K: reward functions
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain import distributed
from posttrain.data import problem_cursor
from posttrain.model.transformer import Transformer
from posttrain.objectives import advantages as advantages_lib
from posttrain.sampler import budget, transcript
from posttrain.sampler.rollouts import Rollouts
from posttrain.sampler.sampler import Limits, Sampler
from posttrain.tasks import scoring
from posttrain.text.render import Renderer


@dataclasses.dataclass(frozen=True)
class ScoredRollouts:
  """A scored batch of rollouts.

  Attributes:
    rollouts: B completions, in order of group, then sample.
    indices: [P], which of the task's problems were asked.
    problems: [B], the problem of each completion.
    scores: [B, K] float32, per reward function, NaN where there is none.
    statuses: [B, K] int8, of `scoring.STATUSES`.
    rewards: [B] float64, weighted sums, nothing taken off them; NaN of a
      completion that is not `scored`.
    seconds: of "rollout" and "reward".
  """

  rollouts: Rollouts
  indices: np.ndarray
  problems: list[Mapping[str, Any]]
  scores: np.ndarray
  statuses: np.ndarray
  rewards: np.ndarray
  seconds: dict[str, float]

  @property
  def scored(self) -> np.ndarray:
    """[B] bool, false where no reward applied, or one could not judge."""
    return scoring.scored(self.statuses)

  @property
  def group_ids(self) -> np.ndarray:
    """[B] int, the group of each completion: one group per ask."""
    asks = len(self.indices)
    return np.repeat(np.arange(asks), len(self.problems) // asks)


@dataclasses.dataclass(frozen=True)
class RolloutWorker:
  """Draws and scores batches; only model, step and problems change.

  Attributes:
    sampler, limits: how completions are drawn.
    renderer: problems to prompt tokens.
    problems: the task's rows.
    rewards: functions by name, the verifier first; `weights`: one each.
    group_size: completions of each problem.
    seed, stage: with step, prompt and sample ids, what draws depend on.
    warn: takes a line for a person.
  """

  sampler: Sampler
  limits: Limits
  renderer: Renderer
  problems: Sequence[Mapping[str, Any]]
  rewards: Mapping[str, scoring.Reward]
  weights: Sequence[float]
  group_size: int
  seed: int
  stage: str
  warn: Callable[[str], None] = lambda text: None

  def collect(self, model: Transformer, indices: np.ndarray, *,
      step: int) -> ScoredRollouts:
    """Draws and scores `group_size` completions of each problem.

    Args:
      indices: [P] of `problems`; one may stand there more than once.
      step: updates made so far.
    """
    started = time.monotonic()
    asked = [self.problems[i] for i in indices]
    rollouts = self.sampler.generate(
        model, [self.renderer.prompt_tokens(row) for row in asked],
        self.limits, prompt_id=[row["id"] for row in asked],
        group_size=self.group_size, seed=self.seed, stage=self.stage,
        step=step, first_sample=self.group_size * (
            problem_cursor.earlier_asks(indices)))
    sampled = time.monotonic()
    problems = self.per_completion(asked)
    scores = distributed.on_first_host(lambda: scoring.score(
        self.rewards, problems, transcript.completions(
            self.renderer.tokenizer, self.sampler.ids, rollouts,
            len(problems))))
    unscored = scoring.describe_unscored(scores, problems, list(self.rewards))
    if unscored:
      self.warn(f"{self.stage} step {step}: {unscored}")
    return ScoredRollouts(
        rollouts=rollouts, indices=indices, problems=problems,
        scores=scores.values, statuses=scores.statuses,
        rewards=self.rewards_of(scores.values, scores.statuses),
        seconds={"rollout": sampled - started,
                 "reward": time.monotonic() - sampled})

  def per_completion(self, values: Sequence[Any]) -> list[Any]:
    """Repeats one value per problem for each of its completions."""
    return [value for value in values for _ in range(self.group_size)]

  def rewards_of(
      self, scores: np.ndarray, statuses: np.ndarray) -> np.ndarray:
    """[B, K] scores -> [B] float64, NaN where a completion has no score."""
    scored = scoring.scored(statuses)
    rewards = np.full(len(scores), np.nan)
    rewards[scored] = advantages_lib.combine_rewards(
        scores[scored], np.asarray(self.weights))
    return rewards


def metrics(
    collected: ScoredRollouts, advantages: np.ndarray, names: Sequence[str],
) -> dict[str, float]:
  """Computes the metrics of a batch of rollouts, under TRL's names."""
  rollouts, lengths = collected.rollouts, collected.rollouts.lengths
  ended = lengths[rollouts.finish_reason != budget.LENGTH]
  result = _reward_metrics(collected.rewards, collected.group_ids) | {
      "advantages/abs_mean": np.abs(advantages).mean(),
      "completions/mean_length": lengths.mean(),
      "completions/min_length": lengths.min(),
      "completions/max_length": lengths.max(),
      "completions/clipped_ratio": 1 - len(ended) / len(lengths),
      "answer/mean_length": rollouts.answer_lengths.mean(),
      "think/mean_length": rollouts.think_lengths.mean(),
      "think/forced_end_frac": np.mean(rollouts.think_end == budget.CLOSED),
      "think/wait_count": rollouts.wait_count.mean(),
      "num_tokens": lengths.sum(),
      "frac_unscored": 1 - collected.scored.mean()}
  if len(ended):
    result["completions/mean_terminated_length"] = ended.mean()
  if rollouts.entropy is not None and rollouts.confidence is not None:
    sampled = rollouts.loss_mask
    result["sampling/entropy"] = rollouts.entropy[sampled].mean()
    result["sampling/confidence"] = rollouts.confidence[sampled].mean()
  for k, name in enumerate(names):
    applicable = collected.scores[
        ~np.isnan(collected.scores[:, k]), k].astype(np.float64)
    if len(applicable):
      result[f"rewards/{name}/mean"] = applicable.mean()
      result[f"rewards/{name}/std"] = applicable.std()
    for status in ("timeout", "error"):
      result[f"rewards/{name}/{status}s"] = np.sum(
          collected.statuses[:, k] == scoring.STATUSES.index(status))
  return {name: float(value) for name, value in result.items()}


def _reward_metrics(
    rewards: np.ndarray, group_ids: np.ndarray) -> dict[str, Any]:
  """Computes means over what was scored, and shares of groups."""
  known = ~np.isnan(rewards)
  if not known.any():
    return {"frac_reward_zero_std": 1.0, "frac_groups_solved": 0.0}
  _, first, group = np.unique(
      group_ids, return_index=True, return_inverse=True)
  silent = np.bincount(
      group, advantages_lib.informative(rewards, group_ids)) == 0
  best = np.full(len(first), -np.inf)
  np.maximum.at(best, group[known], rewards[known])
  return {
      "reward": rewards[known].mean(), "reward_std": rewards[known].std(),
      "frac_reward_zero_std": silent.mean(),
      "frac_groups_solved": np.mean(silent & (best > 0))}


def records(
    collected: ScoredRollouts, advantages: np.ndarray, names: Sequence[str],
    worker: RolloutWorker, step: int,
) -> list[dict[str, Any]]:
  """Converts completions to JSON-able rows, for `rollouts/step_*.jsonl`."""
  rows = []
  for row in range(len(collected.problems)):
    scores = {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(names, collected.scores[row], strict=True)}
    rows.append({
        "step": step, **transcript.record(
            worker.renderer.tokenizer, collected.rollouts, row,
            worker.sampler.ids, worker.sampler.options.confidence),
        "rewards": scores, "statuses": {
            name: scoring.STATUSES[code] for name, code in zip(
                names, collected.statuses[row], strict=True)},
        "reward": float(collected.rewards[row])
        if collected.scored[row] else None,
        "advantage": float(advantages[row])})
  return rows
