"""Oracles: every completion alone in its row, and the formulas in NumPy.

The run that is taken apart has all there is: several minibatches and epochs,
a KL term, a maximum of thinking tokens and waits in the rollouts.
"""

import contextlib
import dataclasses
import json
import time
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posttrain import config as config_lib
from posttrain.data import random_streams
from posttrain.objectives import policy as policy_lib
from posttrain.objectives.columns import Term, needs
from posttrain.rl import experience as experience_lib
from posttrain.rl import rollout_buffer, rollout_worker
from posttrain.sampler import budget
from posttrain.stages import rl, rl_programs
from posttrain.telemetry import metrics
from posttrain.train import health, preemption, state
from tests import meshes, one_by_one, pipeline_run

ALL = [
    "reason.num_minibatches=2", "reason.num_epochs=2", "reason.num_steps=8",
    "reason.rollout.temperature=0.8", "reason.loss.kl_coef=0.3",
    "reason.problems.args.thinks=True", "reason.rollout.num_waits=1",
    "reason.rollout.max_thinking_tokens=4", "reason.checkpoint.every=3"]
TEMPERATURE, LENGTH = 0.8, 24


def copy(model):
  return jax.tree.map(jnp.copy, model)


def perturbed(model):
  """Some way off: a reference to differ from."""
  shift = lambda w: w + 0.2 * jnp.abs(w)
  return jax.jit(lambda model: jax.tree.map(shift, model))(model)


def keep_batches(monkeypatch):
  """Every batch that is collected from now on, as the stage scored it."""
  batches, collect = [], rollout_worker.RolloutWorker.collect
  def keep(*args, **kwargs):
    batches.append(collect(*args, **kwargs))
    return batches[-1]
  monkeypatch.setattr(rollout_worker.RolloutWorker, "collect", keep)
  return batches


@pytest.fixture
def kept(monkeypatch):
  return keep_batches(monkeypatch)


class Taken:
  """A batch of rollouts and its updates, with the models before each."""

  def __init__(self, path, kept):
    asked = []
    def weights_of(source):
      asked.append(source)
      return self.reference
    run = pipeline_run.make_pipeline(
        path, [*ALL, "reason.reference=/elsewhere"])
    model = pipeline_run.start(run)
    self.reference = perturbed(model)
    learner = pipeline_run.Learner(dataclasses.replace(
        run.context("reason"), weights_of=weights_of), model)
    assert asked == ["/elsewhere"]
    learner.collect()
    self.batch, self.experience = kept[-1], learner.experience
    self.tokenizer = run.renderer.tokenizer
    self.models, self.rows = [], []
    for _ in range(4):
      assert learner.experience is self.experience
      self.models.append(copy(learner.state.model))
      self.rows.append(learner.update())
    assert learner.experience is None

  def sampled(self, row):
    """Where the tokens in the loss are, in prompt and completion."""
    rollouts = self.batch.rollouts
    return len(rollouts.prompts[row]) + np.flatnonzero(
        rollouts.loss_mask[row])

  def distributions(self, model, row):
    """[n, V] float64 logprobs, and the n tokens, of those in the loss."""
    rollouts = self.batch.rollouts
    tokens = one_by_one.row_of(
        rollouts.prompts[row] + rollouts.completion(row), LENGTH)
    at = self.sampled(row)
    with jax.set_mesh(meshes.one()):
      found = one_by_one.jitted(model, tokens, temperature=TEMPERATURE)
    return np.asarray(found, np.float64)[at], tokens[0, at]

  def logprobs(self, model, row):
    """[n] float64, of the tokens in the loss."""
    distributions, tokens = self.distributions(model, row)
    return distributions[np.arange(len(tokens)), tokens]

  def column(self, name, row):
    """[n], what the experience has beside these tokens."""
    at = self.experience["loss_mask"] & (
        self.experience["segment_ids"] > 0) & (
            self.experience["completion_ids"] == row)
    return self.experience[name][at]


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch, jax.set_mesh(meshes.one()):
    return Taken(tmp_path_factory.mktemp("taken"), keep_batches(patch))


def kinds_of_memory(tree):
  return {w.sharding.memory_kind for w in jax.tree.leaves(tree)}


def test_what_waits_on_the_hosts_changes_no_bit(taken, tmp_path, monkeypatch):
  """The same rollouts and updates; meanwhile it is where it should be."""
  run = pipeline_run.make_pipeline(tmp_path, [
      *ALL, "reason.reference=/elsewhere",
      "compute.offload=reference,optimizer"])
  batches = keep_batches(monkeypatch)
  seen = []
  def scored(
      name, model, experience, make=experience_lib.add_logprobs, **options):
    seen.append((name, kinds_of_memory(model), kinds_of_memory(
        learner.state.opt_state), kinds_of_memory(learner.reference)))
    return make(name, model, experience, **options)
  monkeypatch.setattr(experience_lib, "add_logprobs", scored)
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.Learner(dataclasses.replace(
        run.context("reason"), weights_of=lambda source: taken.reference),
                                   pipeline_run.start(run))
    learner.collect()
    experience = learner.experience
    assert kinds_of_memory(learner.state.opt_state) == {"device"}
    rows = [learner.update() for _ in range(4)]
  host, device = {"pinned_host"}, {"device"}
  assert seen == [("old_logprobs", device, host, host),
                  ("ref_logprobs", device, host, host)]
  np.testing.assert_array_equal(
      batches[0].rollouts.tokens, taken.batch.rollouts.tokens)
  for name, column in taken.experience.items():
    np.testing.assert_array_equal(experience[name], column)
  timed = lambda name: name.startswith(("time/", "perf/"))
  for ours, theirs in zip(rows, taken.rows, strict=True):
    assert {name: x for name, x in ours.items() if not timed(name)} == {
        name: x for name, x in theirs.items() if not timed(name)}


def test_a_backend_without_such_memory_is_an_error(monkeypatch):
  device = types.SimpleNamespace(
      device_kind="TPU v1", platform="tpu", addressable_memories=lambda: [
          types.SimpleNamespace(kind="device")])
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  state.check_offload(())
  with pytest.raises(ValueError, match=(
      r"'pinned_host'; TPU v1 \(tpu\) has device\. Leave compute\.offload")):
    state.check_offload(("optimizer",))


def groups_of(batch):
  return {p: np.flatnonzero(batch.rollouts.prompt_id == p)
          for p in set(batch.rollouts.prompt_id.tolist())}


def advantages_of(batch):
  """[B] float64, the paper's, one group at a time."""
  advantages = np.zeros(len(batch.rewards))
  for rows in groups_of(batch).values():
    rewards = batch.scores[rows, 0].astype(np.float64)
    if np.ptp(rewards):
      advantages[rows] = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
  return advantages


def packed_rows(experience, index):
  used = experience["loss_mask"][index]
  return np.unique(experience["completion_ids"][index][used])


def test_with_a_kl_every_completion_is_learned_from_once(taken):
  """Groups whole, and those without a signal too: the KL is theirs as well."""
  minibatches = [packed_rows(taken.experience, index) for index in range(2)]
  assert sorted(np.concatenate(minibatches)) == list(range(16))
  for rows in groups_of(taken.batch).values():
    assert len(rows) == 4
    assert sum(bool(np.isin(rows, m).all()) for m in minibatches) == 1
  silent = [np.ptp(taken.batch.scores[rows, 0]) == 0
            for rows in groups_of(taken.batch).values()]
  assert 0 < sum(silent) < 4
  assert taken.rows[0]["frac_reward_zero_std"] == np.mean(silent)


def test_advantages_are_those_of_the_paper(taken):
  wanted = advantages_of(taken.batch)
  for row in range(16):
    np.testing.assert_allclose(
        taken.column("advantages", row), wanted[row], rtol=1e-6)


def learned_rows(taken, index):
  """All completions of a minibatch's groups, wherever they were packed."""
  found = packed_rows(taken.experience, index)
  rows = np.concatenate([
      rows for rows in groups_of(taken.batch).values()
      if np.isin(rows, found).any()])
  assert len(rows) == 8
  return rows


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs"])
def test_logprobs_are_teacher_forced_and_computed_once(taken, name):
  """Of the policy that sampled, for all four updates; of the reference."""
  model = taken.models[0] if name == "old_logprobs" else taken.reference
  for index in range(2):
    for row in learned_rows(taken, index):
      np.testing.assert_allclose(
          taken.column(name, row), taken.logprobs(model, row), atol=2e-5)


def test_sampler_logprobs_are_of_what_was_sampled_from(taken):
  """The trainer's, but for what was banned: no end right after a wait."""
  rollouts, after_wait = taken.batch.rollouts, 0
  [end] = taken.tokenizer.encode("</think>", special=True)
  for row in range(len(rollouts.lengths)):
    distributions, tokens = taken.distributions(taken.models[0], row)
    wanted = distributions[np.arange(len(tokens)), tokens]
    at = taken.sampled(row) - len(rollouts.prompts[row])
    for n, t in enumerate(at):
      forced = t > 0 and rollouts.provenance[row, t - 1] == budget.FORCED
      if forced and rollouts.tokens[row, t - 1] != end:
        banned = np.exp(distributions[n, [end, taken.tokenizer.eos_id]])
        wanted[n] -= np.log1p(-banned.sum())
        after_wait += 1
    np.testing.assert_allclose(
        rollouts.logprobs[row, at], wanted, rtol=0, atol=5e-5)
  assert after_wait


def test_forced_tokens_are_counted_and_not_learned(taken):
  rollouts = taken.batch.rollouts
  forced = rollouts.provenance == budget.FORCED
  assert forced.any() and rollouts.think_lengths.max() == 4
  assert (rollouts.think_end == budget.CLOSED).any()
  assert rollouts.wait_count.any()
  tokens = sum(len(taken.sampled(row)) for index in range(2)
               for row in learned_rows(taken, index))
  assert taken.experience["loss_mask"].sum() == tokens
  row = taken.rows[0]
  assert row["completions/mean_length"] == rollouts.lengths.mean()
  assert row["think/mean_length"] == rollouts.think_lengths.mean()
  assert row["think/wait_count"] == rollouts.wait_count.mean()
  assert row["think/forced_end_frac"] == np.mean(
      rollouts.think_end == budget.CLOSED)
  assert row["completions/clipped_ratio"] == np.mean(
      rollouts.finish_reason == budget.LENGTH)


# As users of RL tools look for them; `kl` where there is a reference.
NAMES = {
    "reward", "reward_std", "rewards/reward/mean", "frac_reward_zero_std",
    "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean",
    "completions/mean_length", "completions/min_length",
    "completions/max_length", "completions/clipped_ratio",
    "think/mean_length", "think/forced_end_frac", "think/wait_count",
    "sampling/logp_difference/mean", "sampling/logp_difference/max",
    "grad_norm", "learning_rate", "time/rollout", "time/reward_wait",
    "time/learn"}


def test_metrics_have_the_names_that_users_know(taken):
  row, batch = taken.rows[0], taken.batch
  assert set(row) >= NAMES
  assert row["reward"] == batch.rewards.mean()
  assert row["reward_std"] == batch.rewards.std()
  assert row["rewards/reward/mean"] == batch.scores.mean()
  lengths = batch.rollouts.lengths
  assert row["completions/min_length"] == lengths.min()
  assert row["completions/max_length"] == lengths.max()
  assert row["learning_rate"] == np.float32(1e-2)
  gaps = np.concatenate([
      np.abs(taken.logprobs(taken.models[0], n) - batch.rollouts.logprobs[
          n, batch.rollouts.loss_mask[n]]) for n in learned_rows(taken, 0)])
  assert row["sampling/logp_difference/mean"] == pytest.approx(
      gaps.mean(), abs=1e-6)
  assert row["sampling/logp_difference/max"] == pytest.approx(
      gaps.max(), abs=5e-5)


def test_the_first_ratio_is_exactly_one_and_later_ones_are_not(taken):
  assert taken.rows[0]["ratio/max_deviation"] == 0
  assert taken.rows[0]["ratio"] == 1
  assert taken.rows[0]["clip_ratio/high_mean"] == 0
  for row in taken.rows[1:]:
    assert row["ratio/max_deviation"] > 1e-3
    # The sampler's logprobs are of weights that are gone.
    assert "sampling/logp_difference/max" not in row


@pytest.mark.parametrize("update", range(4))
def test_the_loss_is_the_formula(taken, update):
  """Clipped surrogate plus KL, mean over the tokens of the minibatch."""
  sums = dict.fromkeys(("loss", "kl", "ratio", "entropy", "low", "high"), 0.0)
  tokens = 0
  for row in learned_rows(taken, update % 2):
    distributions, _ = taken.distributions(taken.models[update], row)
    now = taken.logprobs(taken.models[update], row)
    ratio = np.exp(now - taken.logprobs(taken.models[0], row))
    d = taken.logprobs(taken.reference, row) - now
    kl = np.exp(d) - 1 - d
    advantage = advantages_of(taken.batch)[row]
    surrogate = np.minimum(
        ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    sums["loss"] += np.sum(0.3 * kl - surrogate)
    sums["kl"] += kl.sum()
    sums["ratio"] += ratio.sum()
    sums["entropy"] -= np.sum(np.exp(distributions) * distributions)
    sums["low"] += np.sum((ratio < 0.8) & (advantage < 0))
    sums["high"] += np.sum((ratio > 1.2) & (advantage > 0))
    tokens += len(now)
  found = taken.rows[update]
  for name, wanted in {
      "loss": "loss", "kl": "kl", "ratio": "ratio", "entropy": "entropy",
      "clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high"}.items():
    assert found[name] == pytest.approx(
        sums[wanted] / tokens, rel=2e-5, abs=2e-6), name
  assert found["kl"] > 0.01


def test_kl_in_the_reward_comes_off_each_completions_advantage(
    taken, tmp_path, kept):
  """Centred in the group; the rewards' deviation scales the rewards alone."""
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(tmp_path, [
        *ALL, "reason.loss.kl_in=reward", "reason.reference=/elsewhere",
        "reason.loss.kl_estimator=k1"], lambda _: taken.reference)
    learner.collect()
    [batch] = kept
    sums = np.array([
        (taken.logprobs(taken.models[0], row)
         - taken.logprobs(taken.reference, row)).sum() for row in range(16)])
  np.testing.assert_array_equal(
      batch.rollouts.tokens, taken.batch.rollouts.tokens)
  wanted = advantages_of(batch)
  for rows in groups_of(batch).values():
    wanted[rows] -= 0.3 * (sums[rows] - sums[rows].mean())
  for row in range(16):
    at = learner.experience["loss_mask"] & (
        learner.experience["completion_ids"] == row)
    np.testing.assert_allclose(
        learner.experience["advantages"][at], wanted[row], rtol=1e-4,
        atol=1e-4)
  # What is reported, and what health looks at, is of the rewards themselves.
  np.testing.assert_array_equal(batch.rewards, batch.scores[:, 0])
  assert learner.rollout_metrics["frac_reward_zero_std"] == np.mean([
      np.ptp(batch.scores[rows, 0]) == 0
      for rows in groups_of(batch).values()])
  assert "ref_logprobs" not in learner.experience
  assert not learner.prepare.objective.kl_term
  assert learner.rollout_metrics["kl"] == pytest.approx(
      sums.sum() / batch.rollouts.loss_mask.sum(), rel=1e-4)
  assert learner.rollout_metrics["rewards/reward/mean"] == pytest.approx(
      batch.scores.mean())
  assert learner.rollout_metrics["reward"] == pytest.approx(
      batch.rewards.mean())


# From here on a run without KL and budgets, one update per batch.


@pytest.mark.parametrize("kl_in, estimator", [
    ("loss", "k3"), ("reward", "k1")])
def test_groups_without_a_signal_are_pulled_to_the_reference(
    taken, tmp_path, kl_in, estimator):
  """All rewards equal: the update is that of the KL alone, and is made."""
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(tmp_path, [
        "reason.rewards=tests.stages.toy:constant", "reason.loss.kl_coef=1",
        f"reason.loss.kl_in={kl_in}", "reason.reference=/elsewhere",
        f"reason.loss.kl_estimator={estimator}"], lambda _: taken.reference)
    learner.collect()
    row = learner.update()
  assert row["skipped_updates"] == 0 and row["frac_reward_zero_std"] == 1
  assert row["grad_norm"] > 0.1 and row["kl"] > 0.01


@pytest.mark.parametrize("aggregation, minibatches", [
    ("token_mean", 1), ("token_mean", 2), ("sequence_mean", 2),
    ("constant", 2)])
def test_the_gradient_is_of_the_whole_batch(
    tmp_path, kept, aggregation, minibatches):
  """A mean over all completions, also where half of the groups are silent."""
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(tmp_path, [
        f"reason.loss.aggregation={aggregation}",
        f"reason.num_minibatches={minibatches}", "reason.max_grad_norm=1e9"])
    model = copy(learner.state.model)
    learner.collect()
    [batch] = kept
    row = learner.update()
    silent = [np.ptp(batch.scores[rows, 0]) == 0
              for rows in groups_of(batch).values()]
    assert 0 < sum(silent) < 4
    # A silent group is packed nowhere: which minibatch it is of is drawn.
    order = random_streams.stream(0, "reason", "minibatches", 0).permutation(4)
    rows = np.concatenate(
        [np.arange(4) + 4 * g for g in order[::minibatches]])
    wanted = looped_gradient(model, batch, rows, aggregation)
  assert row["grad_norm"] == pytest.approx(wanted, rel=2e-5)


def looped_gradient(model, batch, rows, aggregation):
  """Norm of REINFORCE's gradient, one completion at a time, as a mean."""
  rollouts, advantages = batch.rollouts, advantages_of(batch)
  lengths = rollouts.loss_mask.sum(1)[rows]
  denominator = {"token_mean": lengths.sum(), "sequence_mean": len(rows),
                 "constant": len(rows) * pipeline_run.ROLLOUT["max_tokens"]}[
                     aggregation]

  @jax.jit
  def gradient(model, tokens, weights):
    return jax.grad(lambda model: -jnp.sum(
        weights * one_by_one.logprobs(model, tokens, 1.0)))(model)

  total = jax.tree.map(jnp.zeros_like, model)
  for row in rows:
    at = len(rollouts.prompts[row]) + np.flatnonzero(rollouts.loss_mask[row])
    weights = np.zeros(LENGTH, np.float32)
    weights[at] = advantages[row] / denominator / (
        len(at) if aggregation == "sequence_mean" else 1)
    total = jax.tree.map(jnp.add, total, gradient(
        model, one_by_one.row_of(
            rollouts.prompts[row] + rollouts.completion(row), LENGTH),
        weights))
  return float(optax.global_norm(total))


def test_without_a_kl_no_reference_is_held(tmp_path):
  def weights_of(source):
    raise AssertionError(f"{source} is not needed")
  with jax.set_mesh(meshes.one()):
    assert pipeline_run.make_learner(
        tmp_path, weights_of=weights_of).reference is None


@pytest.mark.parametrize(
    "slots", [0, pytest.param(6, marks=pytest.mark.slow)])
def test_a_reward_that_can_be_learned_is_learned(tmp_path, slots):
  """From about a third to nearly always; one fixed seed, wide margins."""
  with jax.set_mesh(meshes.one()):
    pipeline_run.train(tmp_path, [
        "reason.num_steps=40", "reason.health.patience=40",
        f"reason.rollout.max_num_seqs={slots}"])
  rows = metrics.read(tmp_path / "metrics.jsonl")
  rewards = [row["reward"] for row in rows]
  print(f"reward {np.mean(rewards[:4]):.2f} -> {np.mean(rewards[-4:]):.2f}")
  for row in rows:
    parts = [row[f"time/{name}"]
             for name in ("rollout", "reward_wait", "prepare", "learn")]
    assert 0 < sum(parts) <= row["time/step"]
    assert row["perf/tokens_per_sec"] == pytest.approx(
        row["num_tokens"] / row["time/step"])
  assert np.mean(rewards[:4]) < 0.7
  assert np.mean(rewards[-4:]) > 0.9
  assert all(row["sampling/logp_difference/max"] < 5e-5
             for row in rows if not row["skipped_updates"])
  assert all(row["ratio/max_deviation"] == 0
             for row in rows if not row["skipped_updates"])


@pytest.mark.parametrize("attention", [
    "blocks", pytest.param("reference", marks=pytest.mark.slow)])
def test_sharing_prompts_changes_no_update(tmp_path, attention):
  """Fewer tokens are computed; every metric is what it is apart."""
  found, rows = [], []
  for share in (False, True):
    with jax.set_mesh(meshes.one()):
      learner = pipeline_run.make_learner(tmp_path / str(share), [
          f"reason.share_prompts={share}", "reason.group_size=8",
          "reason.num_groups=2", "reason.rows_per_microbatch=2",
          "reason.sequence_length=96", f"compute.attention={attention}"])
      learner.collect()
      rows.append((learner.experience["segment_ids"] > 0).sum())
      found.append(learner.update())
  apart, shared = found
  assert rows[1] < rows[0]  # Prompts are short here.
  for name in apart:
    if not name.startswith(("time/", "perf/")):
      assert shared[name] == pytest.approx(apart[name], rel=1e-4, abs=2e-6)


def test_rewards_that_differ_in_scope_and_weight(tmp_path, kept):
  """One does not apply to every problem; all are logged by their names."""
  names = ("reward", "brevity", "shortest", "loud")
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(tmp_path, [
        "reason.rewards=" + ",".join(f"tests.stages.toy:{n}" for n in names),
        "reason.reward_weights=1,0.5,0.25,0.125", "reason.num_groups=8"])
    learner.collect()
  [batch] = kept
  applies = np.array([row["word"] != "ball" for row in batch.problems])
  assert 0 < applies.sum() < len(applies)
  words = [len(learner.context.renderer.tokenizer.decode(
      batch.rollouts.completion(row), skip_special=True).split())
      for row in range(len(applies))]
  lengths = batch.rollouts.lengths[:len(applies)].reshape(8, -1)
  shortest = (lengths == lengths.min(axis=1, keepdims=True)).reshape(-1)
  assert 0 < shortest.sum() < len(shortest)
  np.testing.assert_array_equal(batch.scores[:, 2], shortest)
  np.testing.assert_allclose(batch.rewards, batch.scores[:, 0] + np.where(
      applies, 0.5 / (1 + np.array(words)), 0) + 0.25 * shortest
                             + 0.125 * np.array(words) / 100, rtol=1e-6)
  assert learner.rollout_metrics["rewards/brevity/mean"] == pytest.approx(
      batch.scores[applies, 1].mean())


def answer_of(text):
  """Its words; a thinking section is one that the model has opened."""
  words = text.replace("</s>", "").split()
  if "<think>" not in words:
    return words
  thought = words[words.index("<think>") + 1:]
  return thought[thought.index("</think>") + 1:] if (
      "</think>" in thought) else []


def test_what_could_not_be_judged_is_no_zero(tmp_path, kept, capsys):
  """It is counted, told, written down, and kept for a resume."""
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(tmp_path, [
        "reason.rewards=tests.stages.toy:late,tests.stages.toy:brevity",
        "reason.num_groups=8"])
    learner.collect()
  [batch] = kept
  tokenizer = learner.context.renderer.tokenizer
  said = ["pong" in answer_of(tokenizer.decode(batch.rollouts.completion(row)))
          for row in range(len(batch.rewards))]
  assert 0 < sum(said) < len(said)
  np.testing.assert_array_equal(np.isnan(batch.rewards), said)
  np.testing.assert_array_equal(np.isnan(batch.scores[:, 0]), said)
  np.testing.assert_array_equal(batch.scored, np.logical_not(said))
  found = learner.rollout_metrics
  assert found["rewards/late/timeouts"] == sum(said)
  assert found["rewards/late/errors"] == found["rewards/brevity/errors"] == 0
  assert found["frac_unscored"] == pytest.approx(np.mean(said))
  assert found["reward"] == pytest.approx(np.nanmean(batch.rewards))
  assert found["reward_std"] == pytest.approx(np.nanstd(batch.rewards))
  text = " ".join(capsys.readouterr().out.split())
  first = batch.problems[said.index(True)]
  assert (f"{sum(said)} of 32 completions have no score (late: timeout "
          f"{sum(said)}); the first is of problem {first['id']}: of "
          f"{first['word']}") in text
  lines = (tmp_path / "reason/rollouts/step_000000.jsonl").read_text()
  for row, line in enumerate(lines.splitlines()):
    record = json.loads(line)
    assert record["statuses"]["late"] == ("timeout" if said[row] else "ok")
    assert (record["reward"] is None) == said[row]
    assert record["advantage"] == 0 or not said[row]
  saved = rollout_buffer._to_arrays(batch)
  again = learner.buffer._from_arrays(saved)
  assert again.rollouts.prompts == batch.rollouts.prompts
  assert again.problems == batch.problems
  np.testing.assert_array_equal(again.statuses, batch.statuses)
  np.testing.assert_array_equal(again.rewards, batch.rewards)


# Health.


def test_a_scorer_that_is_broken_stops_the_run(tmp_path):
  with jax.set_mesh(meshes.one()), pytest.raises(
      health.HealthError, match=(
          r"Step 1: 100% of the completions could not be scored, and more than "
          r"50% in each of the last 2 batches \(health\.max_unscored=0\.5")):
    pipeline_run.train(tmp_path, [
        "reason.rewards=tests.stages.toy:reward,tests.stages.toy:broken",
        "reason.health.max_unscored=0.5", "reason.health.unscored_patience=2"])
  [row] = metrics.read(tmp_path / "metrics.jsonl")
  assert row["frac_unscored"] == 1 and row["rewards/broken/errors"] == 16
  assert row["skipped_updates"] == 1  # And no row has moved the weights.


def test_nothing_to_learn_from_stops_with_advice(tmp_path):
  """Each step is counted as skipped, and moves nothing."""
  with jax.set_mesh(meshes.one()), pytest.raises(
      health.HealthError, match="no group had two different rewards for 3"):
    pipeline_run.train(tmp_path, [
        "reason.rewards=tests.stages.toy:constant",
        "reason.health.patience=3"])
  rows = metrics.read(tmp_path / "metrics.jsonl")
  assert [row["skipped_updates"] for row in rows] == [1, 1]
  assert [row["frac_reward_zero_std"] for row in rows] == [1, 1]


def test_a_step_without_a_loss_is_not_ranked_by_it(tmp_path):
  with jax.set_mesh(meshes.one()):
    pipeline_run.train(tmp_path, [
        "reason.num_steps=1", "reason.rewards=tests.stages.toy:constant",
        "reason.checkpoint.keep_best=1", "reason.checkpoint.best_metric=loss"])
  [row] = repeatable(tmp_path)
  assert row["skipped_updates"] == 1 and "loss" not in row


def test_completions_that_are_all_cut_off_stop_with_advice(tmp_path):
  with jax.set_mesh(meshes.one()), pytest.raises(
      health.HealthError, match=r"all completions were cut off .* for 2 steps"):
    pipeline_run.train(tmp_path, [
        "reason.health.patience=2", "reason.problems.args.thinks=True",
        "reason.rollout.min_thinking_tokens=10"])


@pytest.mark.parametrize("changes, message", [
    (["reason.rewards=tests.stages.toy:refuses"],
     r"reason\.problems: The verifier tests\.stages\.toy:refuses gives 0\.0 to "
     r"problem 3's own"),
    (["reason.rollout.max_prompt_tokens=2"],
     r"reason\.problems: the prompt of problem 2 has 3 tokens, and rollout\."
     r"max_prompt_tokens allows 1 to 2; of 24 problems 8 do not fit"),
    (["reason.problems.args.count=3"],
     r"reason\.num_groups=4 different problems are needed .* the task has 3"),
    (["reason.rewards=tests.stages.toy:reward,tests.stages.toy:needs_author"],
     r"needs_author does not take the columns of problem 0 .*'author'"),
    (["reason.rollout.max_thinking_tokens=9"],
     r"reason: rollout\.max_tokens=10 leaves no room for an answer"),
    (["measure.rollout.max_prompt_tokens=1"],
     r"measure\.problems: the prompt of problem 2000 has 2 tokens"),
    (["measure.max_thinking_tokens=9"],
     r"measure: rollout\.max_tokens=10 leaves no room for an answer"),
    (["measure.reward=tests.stages.toy:needs_author"],
     r"measure\.problems: .* columns of problem 2000"),
    (["reason.loss.function=tests.stages.test_rl:half",
      "reason.loss.clip_low=0.1"], r"loss\.clip_low is 0\.1"),
    (["measure.baseline=tests.stages.toy:constant"],
     r"The baseline tests.stages.toy:constant failed with TypeError"),
    (["measure.extract=tests.stages.toy:brevity"],
     r"The extractor tests.stages.toy:brevity could not read problem 2000"),
])
def test_what_is_wrong_with_a_problem_is_found_before_the_first_step(
    tmp_path, changes, message):
  """Of the first stage, which would have trained for hours; of any problem."""
  with jax.set_mesh(meshes.one()), pytest.raises(ValueError, match=message):
    pipeline_run.train(tmp_path, [*pipeline_run.ALL, *changes])
  assert not (tmp_path / "metrics.jsonl").exists()


def test_problems_of_one_id_are_no_group(tmp_path):
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(
        tmp_path, ["reason.problems.task=tests.stages.toy:nameless"])
    with pytest.raises(ValueError, match="Two problems of the task have id=0"):
      rl.check(run.context("reason"))


def test_a_loss_that_is_not_finite_keeps_the_batch_and_the_weights(tmp_path):
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(tmp_path)
    before = copy(learner.state.model)
    learner.collect()
    experience = learner.experience
    experience["advantages"] = np.full_like(experience["advantages"], np.inf)
    with pytest.raises(health.HealthError, match="Step 1 is not finite"):
      learner.update()
  [file] = (tmp_path / "reason").glob("bad_batch_*.npz")
  with np.load(file) as saved:
    assert set(saved) == set(experience)
    np.testing.assert_array_equal(saved["tokens"], experience["tokens"])
  for a, b in zip(jax.tree.leaves(before),
                  jax.tree.leaves(learner.state.model), strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_update_that_is_not_finite_is_skipped_if_the_config_says_so(
    tmp_path):
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(
        tmp_path, ["reason.health.on_bad_step=skip",
                   "reason.health.max_skips=1", "reason.num_epochs=2"])
    before = copy(learner.state.model)
    learner.collect()
    learner.experience["advantages"] = np.full_like(
        learner.experience["advantages"], np.inf)
    row = learner.update()
    assert row["skipped_updates"] == 1 and not np.isfinite(row["loss"])
    assert learner.step == int(learner.state.step) == 1
    for a, b in zip(jax.tree.leaves(before),
                    jax.tree.leaves(learner.state.model), strict=True):
      np.testing.assert_array_equal(a, b)
    with pytest.raises(health.HealthError, match=r"Step 2 .* the 1 before"):
      learner.update()


# Leaving and resuming.


def repeatable(path):
  return [
      {name: value for name, value in row.items()
       if not name.startswith(("time/", "perf/"))}
      for row in metrics.read(path / "metrics.jsonl")]


def rollouts_of(path):
  return {file.name: file.read_text() for file in sorted(
      (path / "reason" / "rollouts").glob("*"))}


def leave_at(monkeypatch, *calls):
  """As if SIGTERM came before these calls of `requested`, counted from 1.

  Of those between two updates.
  """
  count = iter(range(1, 1000))
  monkeypatch.setattr(preemption, "requested", lambda: next(count) in calls)
  monkeypatch.setattr(preemption, "leave_if_requested", lambda: None)


def test_what_a_rollout_held_is_free_before_the_optimizer_is_back(
    tmp_path, monkeypatch):
  """They do not fit together: that is why the optimizer was moved away."""
  held, free = [], []

  def collect(*args, **kwargs):
    cache = np.zeros(1)
    held.append(weakref.ref(cache))
    raise preemption.Preempted("in a rollout")

  def back(tree):
    free.append(held[0]() is None)
    return tree

  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(
        tmp_path, ["compute.offload=optimizer"])
    monkeypatch.setattr(rollout_worker.RolloutWorker, "collect", collect)
    monkeypatch.setattr(state, "to_devices", back)
    with pytest.raises(preemption.Preempted):
      learner.collect()
  assert free == [True]


def test_an_updates_time_ends_with_the_update(tmp_path):
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(tmp_path)
    learner.collect()
    update = rl.Learner.update(learner, contextlib.nullcontext)
    values = {name: float(x) for name, x in update.values.items()}
    row = update.row(dict(values), False)
    time.sleep(0.01)  # Such as the comparison with other hosts.
    assert update.row(dict(values), False) == row
  assert row["time/learn"] > 0


@pytest.mark.slow
def test_left_within_a_rollout_and_resumed_is_bitwise_the_whole_run(
    tmp_path, monkeypatch, capsys):
  """In the first batch, of which nothing is kept, and at the end of the next.
  """
  whole, left = tmp_path / "whole", tmp_path / "left"
  changes = [*ALL, "reason.rollout.chunk=3", "reason.checkpoint.every=0",
             "reason.rollout.max_num_seqs=6", "compute.offload=optimizer"]
  with jax.set_mesh(meshes.one()):
    with monkeypatch.context() as patched:
      chunks = pipeline_run.count_chunks(patched)
      pipeline_run.train(whole, changes)
    count = len(chunks)
    assert count > 4
    with monkeypatch.context() as patched, pytest.raises(
        preemption.Preempted, match="nothing to save yet"):
      pipeline_run.count_chunks(patched, leave_before=2)
      pipeline_run.train(left, changes)
    assert not rollouts_of(left)
    with monkeypatch.context() as patched, pytest.raises(
        preemption.Preempted, match="saved at step 4; "):
      pipeline_run.count_chunks(patched, leave_before=count)
      pipeline_run.train(left, changes)
    assert list(rollouts_of(left)) == ["step_000000.jsonl"]
    again = pipeline_run.count_chunks(monkeypatch)
    pipeline_run.train(left, changes)
  assert len(again) < count
  assert "resumed from step 4" in capsys.readouterr().out
  assert repeatable(left) == repeatable(whole)
  assert rollouts_of(left) == rollouts_of(whole)
  a, b = (pipeline_run.parameters(path, changes) for path in (whole, left))
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_left_within_a_batch_and_resumed_is_bitwise_the_whole_run(
    tmp_path, monkeypatch):
  """At steps 2 and 5, each within a batch of four updates.

  A low threshold makes spikes of noise, which are skipped; the first step is
  traced with its rollout.
  """
  whole, left = tmp_path / "whole", tmp_path / "left"
  changes = [*ALL, "reason.health.on_bad_step=skip", "profile.steps=1",
             "reason.health.spike_mads=0.1", "reason.health.spike_window=4"]
  with jax.set_mesh(meshes.one()):
    pipeline_run.train(whole, changes)
    for call, step in ((2, 2), (3, 5)):
      leave_at(monkeypatch, call)
      with pytest.raises(
          preemption.Preempted, match=f"saved at step {step}"):
        pipeline_run.train(left, changes)
    leave_at(monkeypatch)
    pipeline_run.train(left, changes)
  a, b = (pipeline_run.parameters(path, changes) for path in (whole, left))
  skipped = [row["step"] for row in repeatable(whole)
             if row["skipped_updates"]]
  print("skipped:", skipped)
  assert skipped and skipped[0] > 4
  for path in (whole, left):
    [trace] = (path / "reason/profile").rglob("*.xplane.pb")
    events = {
        event.name for plane in jax.profiler.ProfileData.from_file(
            str(trace)).planes for line in plane.lines
        for event in line.events}
    for program in ("decode", "moved"):
      assert any(program in name for name in events), program
  assert repeatable(left) == repeatable(whole)
  assert [row["step"] for row in repeatable(left)] == list(range(1, 9))
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)
  assert rollouts_of(left) == rollouts_of(whole)
  assert list(rollouts_of(whole)) == [
      "step_000000.jsonl", "step_000004.jsonl"]


def test_saved_rollouts_are_readable_and_complete(tmp_path, kept):
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(tmp_path, ALL)
    learner.collect()
  [batch] = kept
  [text] = rollouts_of(tmp_path).values()
  rows = [json.loads(line) for line in text.splitlines()]
  assert len(rows) == 16
  for n, row in enumerate(rows):
    assert row["prompt"].split() == batch.problems[n]["prompt"].split()
    assert row["reward"] == row["rewards"]["reward"] == float(
        "ping" in row["completion"].split())
    assert row["length"] == batch.rollouts.lengths[n]
    assert {name for _, name in row["segments"]} <= {
        "sampled", "forced", "wait"}
  assert any(name == "wait" for row in rows for _, name in row["segments"])


# A loss of one's own.


@needs("old_logprobs", "advantages", "denominator_shares")
def half(columns):
  """The mean over tokens, as a fraction of two small numbers."""
  ones = jnp.ones_like(columns["logprobs"])
  terms, _ = policy_lib.policy_loss(
      columns | dict(token_weights=ones, importance_weights=ones),
      clip_low=0.2, clip_high=0.2)
  term = terms["policy"]
  return {"policy": Term(term.numerator * 1e-6, term.denominator * 1e-6)}, {}


def empty(columns):
  total = jnp.sum(columns["logprobs"] * columns["loss_mask"])
  return {"nothing": Term(total, 0 * total)}, {}


@needs("ref_logprobs")
def pulled(columns):
  return empty(columns)


def greedy(columns, *, values):
  raise AssertionError("It is never called.")


def updated(tmp_path, *changes):
  with jax.set_mesh(meshes.one()):
    learner = pipeline_run.make_learner(tmp_path, changes)
    learner.collect()
    return learner.update()


@pytest.mark.parametrize("changes, passes", [
    ([], 0), (["num_minibatches=2"], 1), (["loss.kl_coef=0.1"], 1),
    (["loss.kl_coef=0.1", "num_epochs=2"], 2),
    # A KL in the reward is of old and reference logprobs.
    (["loss.kl_coef=0.1", "loss.kl_in=reward", "loss.kl_estimator=k1"], 2),
    (["loss.function=tests.stages.test_rl:pulled"], 1),
    (["loss.function=tests.stages.test_rl:empty", "num_epochs=2"], 0)])
def test_planned_passes_are_the_logprobs_that_are_needed(changes, passes):
  config = config_lib.assign(
      pipeline_run.CONFIG, [f"reason.{change}" for change in changes], "test")
  _, scored, _ = rl_programs.work(config.reason, types.SimpleNamespace(batch=1))
  assert scored.times == passes * 8  # 16 completions, 2 to a microbatch.


def test_a_denominator_below_one_is_divided_by(tmp_path):
  own = "reason.loss.function=tests.stages.test_rl:half"
  ours, theirs = updated(tmp_path / "a"), updated(tmp_path / "b", own)
  for name in ("loss", "grad_norm"):
    assert theirs[name] == pytest.approx(ours[name], rel=1e-4)


def test_a_denominator_of_zero_stops_the_run(tmp_path):
  with pytest.raises(health.HealthError, match=(
      r"term 'nothing' has a denominator of .*0\.0.* see loss\.function")):
    updated(tmp_path, "reason.loss.function=tests.stages.test_rl:empty")


@pytest.mark.parametrize("function, change, message", [
    ("half", "clip_low=0.1", r"loss\.clip_low is 0\.1 .* loss\.args"),
    ("half", "aggregation=constant", r"does not declare token_weights"),
    ("half", "importance_sampling=mask",
     r"does not declare importance_weights"),
    ("empty", "advantage_std=none", r"does not declare advantages"),
    ("empty", "advantage_eps=0.1", r"does not declare advantages"),
    ("half", "args.values=1", r"loss\.args: .*:half .*'values'"),
    ("greedy", "clip_low=0.2", r"loss\.args: .*:greedy .*'values'")])
def test_a_key_that_a_loss_does_not_use_is_refused(
    tmp_path, function, change, message):
  with jax.set_mesh(meshes.one()), pytest.raises(ValueError, match=message):
    pipeline_run.make_learner(tmp_path, [
        f"reason.loss.function=tests.stages.test_rl:{function}",
        f"reason.loss.{change}"])


def test_a_kl_or_reference_that_a_loss_does_not_use_is_refused(tmp_path):
  own = "reason.loss.function=tests.stages.test_rl:empty"
  with jax.set_mesh(meshes.one()):
    with pytest.raises(ValueError, match=r"loss\.kl_in is 'reward' .*advanta"):
      pipeline_run.make_learner(tmp_path / "a", [
          own, "reason.loss.kl_coef=0.1", "reason.loss.kl_in=reward",
          "reason.loss.kl_estimator=k1"])
    pipeline = pipeline_run.make_pipeline(
        tmp_path / "b", [own, "reason.reference=init"])
    with pytest.raises(ValueError, match=r"reference is 'init' .*declare ref_"):
      pipeline.stage("reason").check(pipeline.context("reason"))


@pytest.mark.parametrize("changes, message", [
    (["loss.kl_estimator=k1"], "expected gradient of zero"),
    (["loss.kl_in=reward"], r"Use 'k1', or loss\.kl_in='loss'"),
    (["loss.kl_in=reward", "loss.kl_estimator=k2"], "Use 'k1'")])
def test_useless_estimators_are_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    pipeline_run.make_pipeline(tmp_path, [
        "reason.loss.kl_coef=0.1", *(f"reason.{c}" for c in changes)])


@pytest.mark.parametrize("key", ["cache_dtype", "weights_dtype"])
def test_an_int8_sampler_needs_a_correction(tmp_path, key):
  """As stale rollouts do: it draws from another distribution."""
  int8 = f"reason.rollout.{key}=int8"
  with pytest.raises(ValueError, match=f"rollout.{key}: 'int8' samples from"):
    pipeline_run.make_pipeline(tmp_path, [int8])
  pipeline_run.make_pipeline(
      tmp_path, [int8, "reason.loss.importance_sampling=truncate"])
