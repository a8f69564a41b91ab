"""Rollout worker: problems -> episodes -> scores, for one batch.

It runs the same on every host; only the model's work is spread over them, and
process 0 has the workers that make calls. A problem that a batch asks again is
a group of its own. Its episodes have the sample ids after those of the earlier
group, so that their draws differ.

  P: problems asked (groups)    G: group_size    B: episodes, P * G
  K: reward functions
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.data import problem_cursor
from posttrain.episodes import records as episode_records
from posttrain.episodes import rollouts as episode_rollouts
from posttrain.episodes import score_calls
from posttrain.episodes.call import Call, Result
from posttrain.episodes.episode_sampler import EpisodeSampler
from posttrain.episodes.journal import Journal
from posttrain.episodes.protocol import STOP_REASONS
from posttrain.episodes.trajectory import Trajectory
from posttrain.model.transformer import Transformer
from posttrain.objectives import advantages as advantages_lib
from posttrain.sampler import budget, budget_state, transcript
from posttrain.sampler.rollouts import Rollouts
from posttrain.sampler.sampler import Limits
from posttrain.tasks import scoring

# Of an episode that failed: there is no score where its calls were not made.
NO_RESULT = Result("error", reason="the episode has failed")


@dataclasses.dataclass(frozen=True)
class ScoredRollouts:
  """A scored batch of rollouts.

  Attributes:
    rollouts: B episodes, in order of group, then sample.
    indices: [P], which of the task's problems were asked.
    problems: [B], the problem of each episode.
    scores: [B, K] float32, per reward function, NaN where there is none.
    statuses: [B, K] int8, of `scoring.STATUSES`.
    rewards: [B] float64, weighted sums, nothing taken off them; NaN of an
      episode that is not `scored`.
    details: [B], what the record of an episode has besides, see
      `episodes.records`.
    seconds: of "rollout" and "reward_wait", see `EpisodeSampler`; and of each
      reward, "rewards/<name>", all that it took in the workers.
  """

  rollouts: Rollouts
  indices: np.ndarray
  problems: list[Mapping[str, Any]]
  scores: np.ndarray
  statuses: np.ndarray
  rewards: np.ndarray
  details: list[dict[str, Any]]
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
    sampler, limits: how episodes are drawn.
    problems: the task's rows.
    rewards: names of functions by the names that metrics have, the verifier
      first; `weights`: one each.
    group_size: episodes of each problem.
    max_length: the most tokens of a sequence that the trainer has room for,
      prompt included.
    warn: takes a line for a person.
    journal_of: opens the journal of the batch before which a number of updates
      was made; None on all hosts but the first.
  """

  sampler: EpisodeSampler
  limits: Limits
  problems: Sequence[Mapping[str, Any]]
  rewards: Mapping[str, str]
  weights: Sequence[float]
  group_size: int
  max_length: int
  warn: Callable[[str], None] = lambda text: None
  journal_of: Callable[[int], Journal | None] = lambda step: None

  def collect(self, model: Transformer, indices: np.ndarray, *,
      step: int) -> ScoredRollouts:
    """Draws and scores `group_size` episodes of each problem.

    Args:
      indices: [P] of `problems`; one may stand there more than once.
      step: updates made so far.
    """
    asked = [self.problems[i] for i in indices]
    with self.sampler.calls.recorded(self.journal_of(step)):
      found, seconds = self.sampler.run(
          model, asked, self.limits, group_size=self.group_size, step=step,
          first_sample=self.group_size * problem_cursor.earlier_asks(indices),
          score=self._calls)
    trajectories, failures = _sequences(found, self.max_length)
    results = [[each.scores.get(name, NO_RESULT) for name in self.rewards]
               for each in trajectories]
    scores = _without(score_calls.of_results(results), failures)
    problems = self.per_completion(asked)
    unscored = scoring.describe_unscored(scores, problems, list(self.rewards))
    if unscored:
      self.warn(f"{self.sampler.stage} step {step}: {unscored}")
    return ScoredRollouts(
        rollouts=episode_rollouts.of_trajectories(trajectories),
        indices=indices, problems=problems,
        scores=scores.values, statuses=scores.statuses,
        rewards=self.rewards_of(scores.values, scores.statuses),
        details=_details(trajectories, scores, list(self.rewards)),
        seconds=seconds | {
            f"rewards/{name}": sum(row[k].seconds for row in results)
            for k, name in enumerate(self.rewards)})

  def _calls(self, trajectory: Trajectory) -> list[tuple[str, Call]]:
    """Makes the calls of the rewards of an episode that has ended."""
    # The ask that it is of: a group, see `earlier_asks`.
    ask = trajectory.sample_id // self.group_size
    return list(zip(self.rewards, score_calls.calls(
        list(self.rewards.values()), trajectory.row,
        episode_records.completion_of(
            self.sampler.renderer.tokenizer, trajectory),
        group=((trajectory.prompt_id, ask), self.group_size)), strict=True))

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


def _sequences(
    found: Sequence[Trajectory], max_length: int,
) -> tuple[list[Trajectory], dict[int, str]]:
  """Finds episodes that cannot be learned from, and says why.

  Returns:
    The episodes, of which those that are no sequence, or too long a one, have
    no turns; and reasons, by their place, why an episode has no score.
  """
  rows, failures = list(found), dict[int, str]()
  for row, each in enumerate(found):
    wrong = _no_row(each, max_length)
    if wrong:
      rows[row] = dataclasses.replace(each, turns=(), outcome=(
          dataclasses.replace(
              each.outcome, reason="error", reason_text=wrong)))
    if rows[row].outcome.reason == "error":
      failures[row] = episode_records.failure_of(rows[row])
  return rows, failures


def _no_row(trajectory: Trajectory, max_length: int) -> str:
  """Says why an episode cannot be a row of the trainer; "" if it can."""
  try:
    turns = trajectory.chain()
  except ValueError as error:
    return str(error)
  # The last turn's prompt is all that was before it.
  done = turns[-1].completion if turns else None
  length = len(done.request.prompt) + len(done.tokens) if done else 0
  # A prompt of the episode's own may be longer than the stage's.
  return "" if length <= max_length else (
      f"The episode has {length} tokens, and sequence_length is {max_length}.")


def _without(
    scores: scoring.Scores, failures: Mapping[int, str]) -> scoring.Scores:
  """Takes the scores of episodes that have failed."""
  for row in failures:
    scores.values[row] = np.nan
    scores.statuses[row] = scoring.ERROR
  reasons = [each for each in scores.reasons if each[0] not in failures]
  return scores._replace(reasons=sorted(
      [*reasons, *((row, 0, text) for row, text in failures.items())]))


def _details(
    trajectories: Sequence[Trajectory], scores: scoring.Scores,
    names: Sequence[str],
) -> list[dict[str, Any]]:
  """Makes what records have besides, with the reasons of missing scores."""
  found = [episode_records.details(each) for each in trajectories]
  for row, column, reason in scores.reasons:
    found[row].setdefault("reasons", {})[names[column]] = reason
  return found


def metrics(
    collected: ScoredRollouts, advantages: np.ndarray, names: Sequence[str],
    *, turns: bool = False,
) -> dict[str, float]:
  """Computes the metrics of a batch of rollouts, under TRL's names.

  Args:
    turns: add those of turns, observations and reasons of the end.
  """
  rollouts = collected.rollouts
  # Without observations, which nobody sampled.
  seen = rollouts.provenance == budget_state.OBSERVATION
  lengths = rollouts.lengths - seen.sum(1, dtype=np.int32)
  ended = lengths[~_cut(rollouts)]
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
      **(_turn_metrics(rollouts, seen) if turns else {}),
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


def _cut(rollouts: Rollouts) -> np.ndarray:
  """Marks episodes that ended where their tokens were used up, [B] bool."""
  codes = [STOP_REASONS.index(name)
           for name in ("max_tokens", "context_overflow")]
  return (rollouts.finish_reason == budget.LENGTH) | np.isin(
      rollouts.stop_reason, codes)


def _turn_metrics(rollouts: Rollouts, seen: np.ndarray) -> dict[str, Any]:
  """Computes the metrics of episodes that may be more than one turn each."""
  return {
      "num_turns/mean": rollouts.num_turns.mean(),
      "num_turns/max": rollouts.num_turns.max(),
      "observations/mean_length": seen.sum(1).mean(),
      **{f"stop/{name}": np.mean(rollouts.stop_reason == code)
         for code, name in enumerate(STOP_REASONS)}}


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
  rows, inner = [], worker.sampler.sampler
  for row, details in enumerate(collected.details):
    scores = {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(names, collected.scores[row], strict=True)}
    rows.append({
        "step": step, **transcript.record(
            worker.sampler.renderer.tokenizer, collected.rollouts, row,
            inner.tables.ids, inner.options.confidence,
            details["answer_text"]),
        **details, "rewards": scores, "statuses": {
            name: scoring.STATUSES[code] for name, code in zip(
                names, collected.statuses[row], strict=True)},
        "reward": float(collected.rewards[row])
        if collected.scored[row] else None,
        "advantage": float(advantages[row])})
  return rows
