"""One batch of rollouts for GRPO: problems -> completions -> advantages.

Runs the same on every host; only what the model does is spread over them.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain import distributed
from posttrain.data import prompts as prompts_lib
from posttrain.model.transformer import Transformer
from posttrain.objectives import advantages as advantages_lib
from posttrain.sampler import budget, transcript
from posttrain.sampler.rollouts import Rollouts
from posttrain.sampler.sampler import Limits, Sampler
from posttrain.stages import problems as problems_lib
from posttrain.tasks import scoring
from posttrain.text.render import Renderer


@dataclasses.dataclass(frozen=True)
class ScoredRollouts:
  """A scored batch.

  Attributes:
    rollouts: B completions.
    problems: [B], the problem of each.
    scores: [B, K] float32, per reward function, NaN where there is none.
    statuses: [B, K] int8, of `scoring.STATUSES`.
    rewards: [B] float64, weighted sums, nothing taken off them; NaN of a
      completion that is not `scored`.
    seconds: of "rollout" and "reward".
  """

  rollouts: Rollouts
  problems: list[Mapping[str, Any]]
  scores: np.ndarray
  statuses: np.ndarray
  rewards: np.ndarray
  seconds: dict[str, float]

  @property
  def scored(self) -> np.ndarray:
    """[B] bool, false where no reward applied, or one could not judge."""
    return scoring.scored(self.statuses)


@dataclasses.dataclass(frozen=True)
class RolloutWorker:
  """Draws and scores batches; everything but the model and the step is fixed.

  Attributes:
    sampler, limits: how completions are drawn.
    renderer: problems to prompt tokens.
    problems: the task's rows.
    rewards: functions by name, the verifier first; `weights`: one each.
    num_groups, group_size: prompts, and completions of each.
    seed, stage: with the step, what the draws depend on.
    warn: takes a line for a person.
  """

  sampler: Sampler
  limits: Limits
  renderer: Renderer
  problems: Sequence[Mapping[str, Any]]
  rewards: Mapping[str, scoring.Reward]
  weights: Sequence[float]
  num_groups: int
  group_size: int
  seed: int
  stage: str
  warn: Callable[[str], None] = lambda text: None

  def collect(self, model: Transformer, *, step: int,
      batch: int) -> ScoredRollouts:
    """Draws `num_groups` x `group_size` completions and scores them.

    Args:
      step: updates made so far.
      batch: batches of rollouts drawn so far.
    """
    started = time.monotonic()
    chosen = self.problems_of(batch)
    rollouts = self.sampler.generate(
        model, [self.renderer.prompt_tokens(row) for row in chosen],
        self.limits, prompt_id=[row["id"] for row in chosen],
        group_size=self.group_size, seed=self.seed, stage=self.stage,
        step=step)
    sampled = time.monotonic()
    problems = [row for row in chosen for _ in range(self.group_size)]
    scores = distributed.on_first_host(lambda: scoring.score(
        self.rewards, problems, problems_lib.completions(
            self.renderer.tokenizer, self.sampler.ids, rollouts,
            len(problems))))
    unscored = problems_lib.describe_unscored(
        scores, problems, list(self.rewards))
    if unscored:
      self.warn(f"{self.stage} step {step}: {unscored}")
    return ScoredRollouts(
        rollouts=rollouts, problems=problems, scores=scores.values,
        statuses=scores.statuses,
        rewards=self.rewards_of(scores.values, scores.statuses),
        seconds={"rollout": sampled - started,
                 "reward": time.monotonic() - sampled})

  def problems_of(self, batch: int) -> list[Mapping[str, Any]]:
    """[num_groups] rows of the task."""
    return [self.problems[i] for i in prompts_lib.problems_of_batch(
        len(self.problems), self.num_groups, batch=batch,
        seed=self.seed, stage=self.stage)]

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
  result = _reward_metrics(collected.rewards, rollouts.prompt_id) | {
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
    rewards: np.ndarray, prompt_id: np.ndarray) -> dict[str, Any]:
  """Means over what was scored, and shares of groups."""
  known = ~np.isnan(rewards)
  if not known.any():
    return {"frac_reward_zero_std": 1.0, "frac_groups_solved": 0.0}
  _, first, group = np.unique(
      prompt_id, return_index=True, return_inverse=True)
  silent = np.bincount(
      group, advantages_lib.informative(rewards, prompt_id)) == 0
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
  """Every completion as a JSON-able row, for `rollouts/step_*.jsonl`."""
  rows = []
  for row in range(len(collected.problems)):
    scores = {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(names, collected.scores[row], strict=True)}
    rows.append({
        "step": step, **transcript.record(
            worker.renderer.tokenizer, collected.rollouts, row,
            worker.sampler.ids),
        "rewards": scores, "statuses": {
            name: scoring.STATUSES[code] for name, code in zip(
                names, collected.statuses[row], strict=True)},
        "reward": float(collected.rewards[row])
        if collected.scored[row] else None,
        "advantage": float(advantages[row])})
  return rows
