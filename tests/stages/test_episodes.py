"""Episodes in the real stages: several turns, branches, and failures.

Oracles: the conversation, written again from its words with Python's own
arithmetic; the trainer's logprobs of the packed rows; a count by hand.
"""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest

from posttrain import config as config_lib
from posttrain.episodes.protocol import STOP_REASONS, Generate, Outcome
from posttrain.rl import rollout_worker
from posttrain.sampler import budget_state
from posttrain.sampler.sampler import Sampler
from posttrain.stages import episodes, evaluate
from tests import meshes, pipeline_run
from tests.stages import toy

HERE = "tests.stages.test_episodes"
TURNS = [
    f"tokenizer.train={HERE}:corpus",
    "reason.episode=posttrain.episodes.calculator:calculator",
    "reason.episode_args.max_turns=3", "reason.episode_args.answered== {value}",
    "reason.episode_args.malformed== error",
    "reason.rollout.max_episode_tokens=22", "reason.group_size=8",
    "reason.rollout.prefix_cache_tokens=10000", "reason.sequence_length=48",
    "reason.rollout.max_prompt_tokens=24",  # Few sizes of prompts.
    f"reason.rewards={HERE}:said", "reason.health.max_unscored=1.0"]


def corpus():
  yield " ".join([*toy.WORDS, *toy.NUMBERS, *map(str, range(10)),
                  "<calc> </calc> = error + -"])


def said(prompt, completion, *, messages, num_tokens, **columns):
  """Counts tools' messages, and tells the answer's words by a fraction."""
  del prompt, columns
  roles = [each["role"] for each in messages]
  assert roles[0] == "user" and roles[-1] == "assistant"
  return roles.count("tool") + len(completion.split()) / 100 + (
      num_tokens / 10_000)


def sometimes(task):
  """Raises for the first sample, branches for the second."""
  if task.sample_id == 0:
    raise RuntimeError("out of luck")
  yield Generate(task.prompt, n=1 + (task.sample_id == 1))
  return Outcome()


def never(task):
  raise RuntimeError("no luck at all")
  yield


def odd(task):
  """Has a prompt of its own, and texts that cannot be encoded."""
  yield Generate(task.prompt + task.prompt[-1:] * (task.sample_id % 3))
  return Outcome(answer="\ud83d ping", reason_text="half an emoji: \ud83d")


def judge(prompt, completion, *, id, full_text, **columns):
  if completion != columns["gold"] and id % 2:
    raise ValueError(f"{completion!s:.1} is no answer")
  return 1 - len(full_text) / 100 * (completion != columns["gold"])


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
  """A learner after one update, its batch, its engine and the update's row."""
  engines, batches, make = [], [], Sampler.make_engine
  collect = rollout_worker.RolloutWorker.collect

  def keep(self, *args):
    engines.append(make(self, *args))
    return engines[-1]

  def keep_batch(*args, **kwargs):
    batches.append(collect(*args, **kwargs))
    return batches[-1]

  with jax.set_mesh(meshes.one()), pytest.MonkeyPatch.context() as patch:
    patch.setattr(Sampler, "make_engine", keep)
    patch.setattr(rollout_worker.RolloutWorker, "collect", keep_batch)
    path = tmp_path_factory.mktemp("turns")
    learner = pipeline_run.make_learner(path, TURNS)
    learner.collect()
    row = learner.update()
  lines = (path / "reason/rollouts/step_000000.jsonl").read_text()
  return learner, batches[0], engines[0], row, [
      json.loads(line) for line in lines.splitlines()]


def answered(words):
  """The observation behind words that end in </calc>, by Python."""
  expression = " ".join(words).rpartition("<calc>")[2].removesuffix("</calc>")
  if "<calc>" not in words or (words[:-1].count("</calc>") and (
      words[::-1].index("<calc>") > words[-2::-1].index("</calc>"))):
    return "= error"
  try:
    if any(word not in (*map(str, range(10)), "+", "-")
           for word in expression.split()):
      raise SyntaxError
    return f"= {eval(expression, {})}"
  except SyntaxError:
    return "= error"


def conversation(words, room):
  """Masks words that are observations, turn by turn.

  Args:
    words: behind the prompt.
    room: the most of them.
  """
  mask, turn, turns = [], [], 1
  at = 0
  while at < len(words):
    turn.append(words[at])
    mask.append(False)
    at += 1
    if turn[-1] == "</calc>" and at < len(words):
      observation = answered(turn).split()
      assert words[at:at + len(observation)] == observation
      mask += [True] * len(observation)
      at, turn, turns = at + len(observation), [], turns + 1
  assert len(words) <= room
  return mask, turns


def test_a_row_is_the_conversation_written_again(learned):
  learner, batch, _, _, _ = learned
  tokenizer, found = learner.worker.sampler.renderer.tokenizer, batch.rollouts
  seen = found.provenance == budget_state.OBSERVATION
  counts = collections.Counter()
  for row, length in enumerate(found.lengths):
    words = [tokenizer.decode([token]).strip()
             for token in found.completion(row)]
    mask, turns = conversation(words, room=22)
    assert seen[row, :length].tolist() == mask
    assert (found.loss_mask[row, :length] == ~np.array(mask)).all()
    assert not found.logprobs[row, :length][mask].any()
    assert found.num_turns[row] == turns
    counts[turns] += 1
  assert counts[1] and counts[2]
  prompts = [learner.worker.sampler.renderer.prompt_tokens(problem)
             for problem in batch.problems]
  assert [list(prompt) for prompt in prompts] == found.prompts


def test_turns_are_packed_with_their_context(learned):
  """The trainer's logprobs are those that each turn was drawn with."""
  learner, batch, _, row, _ = learned
  assert row["sampling/logp_difference/max"] < 5e-5
  assert row["ratio/max_deviation"] == 0
  experience, found = learner.experience, batch.rollouts
  experience = experience or learner.prepare(
      found, batch.group_ids, batch.rewards, learner.state.model, None,
      np.random.default_rng(0)).experience
  in_loss = experience["loss_mask"]
  rows = np.unique(experience["completion_ids"][in_loss])
  assert in_loss.sum() == found.loss_mask[rows].sum()
  assert (found.num_turns[rows] > 1).any()


def test_each_token_is_computed_once(learned):
  _, batch, engine, _, _ = learned
  found, stats = batch.rollouts, engine.stats
  seen = (found.provenance == budget_state.OBSERVATION).sum()
  behind = seen + (found.num_turns - 1).sum()  # And the parent's last token.
  prompts = sum(map(len, set(map(tuple, found.prompts))))
  # A beginning of another sample's turn is used only where that saves a pass.
  again = stats.prefilled_tokens - prompts - behind
  assert 0 <= again <= 0.05 * stats.prompt_tokens
  assert stats.evicted_tokens == 0
  drawn = found.lengths.sum() - seen
  assert drawn <= stats.row_steps <= drawn + stats.surplus


def test_metrics_and_records_tell_of_turns(learned):
  _, batch, _, row, records = learned
  found = batch.rollouts
  assert row["num_turns/mean"] == found.num_turns.mean()
  assert row["num_turns/max"] == found.num_turns.max() >= 2
  assert sum(row[f"stop/{name}"] for name in STOP_REASONS) == pytest.approx(1)
  assert row["completions/clipped_ratio"] == pytest.approx(np.mean(
      [record["finish_reason"] == "length" for record in records]))
  seen = (found.provenance == budget_state.OBSERVATION).sum(1)
  assert row["observations/mean_length"] == pytest.approx(seen.mean())
  assert row["num_tokens"] == (found.lengths - seen).sum()
  assert row["completions/max_length"] == (found.lengths - seen).max()
  for n, record in enumerate(records):
    assert record["num_turns"] == found.num_turns[n]
    assert record["stop_reason"] == STOP_REASONS[found.stop_reason[n]]
    kinds = [name for _, name in record["segments"]]
    assert kinds.count("observation") == found.num_turns[n] - 1
    assert record["length"] == found.lengths[n] - seen[n]
    # The reward was given the messages, the answer and the tokens.
    assert record["reward"] == pytest.approx(
        found.num_turns[n] - 1 + len(record["answer_text"].split()) / 100
        + record["length"] / 10_000)
    if found.num_turns[n] > 1:
      assert record["turns"][-1]["text"].endswith(record["answer_text"])
      assert sum(t["observation_length"] for t in record["turns"]) == seen[n]


def test_trajectories_that_wait_are_kept_in_a_checkpoint(learned):
  learner, batch, _, _, records = learned
  learner.buffer._drawn = [batch]
  arrays, state = learner.buffer.to_arrays(), learner.buffer.cursor.get_state()
  learner.buffer._drawn = []
  learner.buffer.restore(state, arrays)
  [again] = learner.buffer._drawn
  learner.buffer._drawn = []
  advantages = np.array([record["advantage"] for record in records])
  made = rollout_worker.records(
      again, advantages, ["said"], learner.worker, 0)
  assert json.loads(json.dumps(made)) == records


def test_an_episode_that_fails_has_no_score_and_the_others_have(learned):
  learner, *_ = learned
  worker = dataclasses.replace(learner.worker, sampler=dataclasses.replace(
      learner.worker.sampler, episode=sometimes))
  with jax.set_mesh(meshes.one()):
    batch = worker.collect(learner.state.model, np.arange(4), step=0)
    short = dataclasses.replace(worker, max_length=6).collect(
        learner.state.model, np.arange(4), step=0)
  found = batch.rollouts
  names = np.array(["ok", "not_applicable", "timeout", "error"])
  assert names[batch.statuses[:, 0]].tolist() == 4 * (
      2 * ["error"] + 6 * ["ok"])
  assert np.isnan(batch.rewards).tolist() == 4 * (2 * [True] + 6 * [False])
  assert (found.lengths > 0).tolist() == 4 * (2 * [False] + 6 * [True])
  assert batch.details[0]["reasons"]["said"] == (
      "the episode has failed: RuntimeError: out of luck")
  assert "not one sequence" in batch.details[1]["reasons"]["said"]
  # As an episode that asks behind a longer prompt than the trainer has room
  # for.
  fits = np.array([len(p) for p in found.prompts]) + found.lengths <= 6
  assert 0 < fits.sum() < 24
  assert (names[short.statuses[:, 0]] == "ok").tolist() == (
      fits & (found.lengths > 0)).tolist()


def test_odd_batches_end_no_run(tmp_path):
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(tmp_path, [
        f"reason.episode={HERE}:never", f"reason.rewards={HERE}:judge",
        "reason.health.max_unscored=1.0"])
    learner.collect()
    row = learner.update()
    assert row["frac_unscored"] == row["skipped_updates"] == 1
    assert row["num_turns/max"] == row["num_tokens"] == 0
    sampler = dataclasses.replace(learner.worker.sampler, episode=odd)
    learner.buffer.worker = learner.worker = dataclasses.replace(
        learner.worker, sampler=sampler)
    learner.collect()
    row = learner.update()
  assert 0 < row["frac_unscored"] < 1 and row["skipped_updates"] == 0
  assert np.isfinite(row["loss"])
  records = [json.loads(line) for line in (
      tmp_path / "reason/rollouts/step_000001.jsonl").read_text().splitlines()]
  assert {record["answer_text"] for record in records} == {"\ud83d ping"}
  assert {record["stop_text"] for record in records} == {
      "half an emoji: \ud83d"}
  [reason] = {record["reasons"]["judge"] for record in records
              if "reasons" in record}
  assert "\ud83d is no answer" in reason


def test_prompts_of_an_episodes_own_wait_in_a_checkpoint(tmp_path):
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(tmp_path, [
        f"reason.episode={HERE}:odd", "reason.num_groups=2"])
    batch = learner.worker.collect(
        learner.state.model, np.array([1, 5]), step=0)
  learner.buffer._drawn = [batch]
  arrays, state = learner.buffer.to_arrays(), learner.buffer.cursor.get_state()
  learner.buffer.restore(state, arrays)
  [again] = learner.buffer._drawn
  prompts = batch.rollouts.prompts
  assert len(set(map(tuple, prompts))) > 2  # Of two problems.
  assert again.rollouts.prompts == prompts


def test_self_consistency_answers_with_the_majority(tmp_path):
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path, [
        "stages=measure", "measure.episode="
        "posttrain.episodes.self_consistency:self_consistency",
        "measure.episode_args.samples=5", "measure.num_waits=",
        "measure.episode_args.extract=tests.stages.toy:extract",
        "measure.max_thinking_tokens=2", "measure.samples_per_problem=2",
        "measure.pass_at=1", "measure.majority.max_samples=0"])
    found = evaluate.Evaluation(
        run.context("measure"), pipeline_run.calls()).evaluate(
            "init", lambda: pipeline_run.start(run))
  assert len(found["records"]) == 2 * 6 * 2
  assert found["decoding"]["episode_args"]["samples"] == 5
  split = 0
  for record in found["records"]:
    texts = [turn["text"] for turn in record["turns"]]
    assert len(texts) == 5
    assert record["length"] == sum(t["length"] for t in record["turns"])
    last = [toy.extract(text.partition("</think>")[2]) for text in texts]
    votes = collections.Counter(word for word in last if word)
    if votes:
      most = max(votes.values())
      first = next(word for word in last if votes.get(word) == most)
      assert record["answer"] == first
      split += len(votes) > 1
    else:
      assert record["answer"] is None
  assert split


@pytest.mark.parametrize("changes, message", [
    (["reason.episode_args.max_turns=many",
      "reason.rollout.max_episode_tokens=20"], "max_turns as int"),
    (["reason.episode_args.max_turns=2"], "max_episode_tokens is 0"),
    ([f"reason.episode={HERE}:sometimes",
      "reason.rollout.max_episode_tokens=20"], "not marked")])
def test_an_episode_that_does_not_fit_is_refused(tmp_path, changes, message):
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path, [
        "reason.episode=posttrain.episodes.calculator:calculator",
        "reason.sequence_length=30", *changes])
    with pytest.raises(ValueError, match=message):
      episodes.check(run.context("reason"))


@pytest.mark.parametrize("changes, message", [
    (["reason.rollout.max_episode_tokens=9", "reason.episode=my.py:own"],
     "is less than rollout.max_tokens=10"),
    (["reason.rollout.max_episode_tokens=20", "reason.episode=my.py:own"],
     r"max_prompt_tokens \+ rollout.max_episode_tokens = 26"),
    (["reason.rollout.max_episode_tokens=20"], r"no effect unless .*episode !"),
    (["reason.episode_args.turns=2"], r"no effect unless .*episode !="),
    (["measure.rollout.prefix_cache_tokens=64", "measure.episode=my.py:own"],
     r"no effect unless .*max_episode_tokens > 0")])
def test_keys_that_contradict_each_other_are_refused(changes, message):
  with pytest.raises(config_lib.ConfigError, match=message):
    config_lib.assign(
        pipeline_run.CONFIG, [*pipeline_run.ALL, *changes], "test")
