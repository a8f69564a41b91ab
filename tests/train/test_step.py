"""Identities: microbatches, padding and meshes leave an update alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.model import token_logprobs
from posttrain.objectives.columns import Term
from posttrain.train import optimizer, spikes, state, step
from tests import meshes
from tests.model import build

CONFIG = build.make_config()
ROWS, LENGTH = 8, 10


def loss(model, batch):
  """Cross entropy on [R, T] arrays, and two figures of the even ids."""
  hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
  logprobs, _ = token_logprobs.of_hidden(
      model.logits, hidden, batch["tokens"], chunk=4)
  mask = batch["loss_mask"]
  even = mask & (batch["tokens"] % 2 == 0)
  sums = {"even": jnp.sum(even), "even_max": jnp.max(even * batch["tokens"])}
  # A token id that the data must not hold breaks the loss: see below.
  broken = jnp.any(batch["tokens"] == 86)
  total = jnp.where(broken, jnp.nan, -jnp.sum(logprobs * mask))
  return {"cross_entropy": Term(total, mask.sum())}, sums


def make_rows(seed=0, rows=ROWS):
  """Rows of very different token counts, so that a mean of means shows."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, LENGTH + 1, rows)
  real = np.arange(LENGTH) < lengths[:, None]
  return {
      "tokens": np.where(real, rng.integers(0, 86, real.shape), 0),
      "positions": np.tile(np.arange(LENGTH), (rows, 1)),
      "segment_ids": real.astype(int),
      "loss_mask": real & (rng.random(real.shape) < 0.6) & (
          np.arange(LENGTH) > 0)}


def put_batch(rows, microbatches):
  """[M, R, T] on the mesh."""
  def put(x):
    x = x.reshape(microbatches, -1, LENGTH)
    return sharding.put(
        x if x.dtype == bool else x.astype(np.int32), None, "batch", "length")

  return {name: put(x) for name, x in rows.items()}


def pad(rows, count):
  """`count` rows of padding behind the rows."""
  return {name: np.pad(x, ((0, count), (0, 0))) for name, x in rows.items()}


accumulate = jax.jit(functools.partial(step.accumulate, loss))


def gradient(rows, microbatches, mesh, count=None):
  with jax.set_mesh(mesh):
    model = build.load(CONFIG, build.random_params(CONFIG))
    grads, terms, sums = accumulate(
        model, put_batch(rows, microbatches), jnp.int32(count or microbatches))
    term = terms["cross_entropy"]
    return sharding.fetch(grads), sharding.fetch(
        sums | {"numerator": term.numerator, "denominator": term.denominator})


@pytest.fixture(scope="module")
def whole():
  return gradient(make_rows(), 1, meshes.one())


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_leave_the_gradient_alone(whole, microbatches):
  grads, sums = gradient(make_rows(), microbatches, meshes.one())
  build.assert_same_leaves(grads, whole[0])
  np.testing.assert_allclose(
      sums["numerator"], whole[1]["numerator"], rtol=1e-6)
  for name in ("denominator", "even", "even_max"):
    assert sums[name] == whole[1][name]


def test_padding_rows_leave_the_gradient_alone(whole):
  """Inside a microbatch, and as a microbatch of padding only."""
  grads, sums = gradient(pad(make_rows(), 8), 4, meshes.one())
  build.assert_same_leaves(grads, whole[0])
  assert sums["denominator"] == whole[1]["denominator"]


def test_only_the_microbatches_that_are_asked_for_count(whole):
  """What lies behind them is not looked at: a bound of the shapes only."""
  rows = {name: np.concatenate([x, make_rows(1)[name]])
          for name, x in make_rows().items()}
  grads, sums = gradient(rows, 4, meshes.one(), count=2)
  build.assert_same_leaves(grads, whole[0])
  assert sums["denominator"] == whole[1]["denominator"]


def test_a_mesh_leaves_the_gradient_alone(whole):
  grads, sums = gradient(make_rows(), 2, meshes.eight())
  build.assert_same_leaves(grads, whole[0])
  np.testing.assert_allclose(
      sums["numerator"], whole[1]["numerator"], rtol=1e-6)


def make_update(learning_rate=1e-2, **more):
  schedule = optimizer.make_schedule(
      schedule="linear", learning_rate=learning_rate, warmup_steps=2,
      num_steps=10, final_learning_rate=0.0)
  made = optimizer.make_optimizer(
      beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
      max_grad_norm=1.0)
  return made, jax.jit(functools.partial(
      step.update, loss=loss, optimizer=made, schedule=schedule, **more))


def test_updates_of_any_number_of_microbatches_are_one_program(whole):
  """And what they report is what was there."""
  made, update = make_update()
  with jax.set_mesh(meshes.one()):
    now = state.create(build.load(CONFIG, build.random_params(CONFIG)), made)
    rows = put_batch(make_rows(), 4)
    for number in range(4):
      now, metrics = update(now, rows, np.int32(4 - number % 3))
      if number == 0:
        first = metrics
      np.testing.assert_allclose(
          metrics["learning_rate"], [0, 0.005, 0.01, 0.00875][number],
          rtol=1e-6)
    assert update._cache_size() == 1
    assert int(now.step) == 4
  count = whole[1]["denominator"]
  np.testing.assert_allclose(
      first["loss"], whole[1]["numerator"] / count, rtol=1e-6)
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(whole[0])))
  np.testing.assert_allclose(first["grad_norm"], norm / count, rtol=1e-5)
  assert int(first["denominator/cross_entropy"]) == count


def test_a_batch_that_is_not_finite_changes_nothing():
  made, update = make_update()
  with jax.set_mesh(meshes.one()):
    start = state.create(build.load(CONFIG, build.random_params(CONFIG)), made)
    good = put_batch(make_rows(), 4)
    start, _ = update(start, good, np.int32(4))
    rows = make_rows()
    rows["tokens"][-1, 0] = 86  # In the last microbatch.
    after, metrics = update(start, put_batch(rows, 4), np.int32(4))
    assert not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, start, after)
    again, _ = update(after, good, np.int32(4))
    direct, _ = update(start, good, np.int32(4))
    jax.tree.map(np.testing.assert_array_equal, again, direct)
    assert int(again.step) == 2


def test_a_skipped_update_counts_and_changes_nothing_else():
  """A spike, and a batch that is not finite; a rule changes no good update.
  """
  rule = spikes.Rule(mads=1e-3, window=4)
  made, update = make_update(spikes=rule, skip=True)
  _, plain = make_update()
  with jax.set_mesh(meshes.one()):
    model = build.load(CONFIG, build.random_params(CONFIG))
    now = state.create(model, made, spikes=rule)
    other = state.create(model, made)
    for seed in range(4):
      batch = put_batch(make_rows(seed), 2)
      now, metrics = update(now, batch, np.int32(2))
      other, _ = plain(other, batch, np.int32(2))
      assert metrics["spike"] == 0
    # Another program, which rounds otherwise.
    jax.tree.map(functools.partial(
        np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                 now.trained, other.trained)
    assert np.isfinite(now.losses).all()
    # Any loss is one now: the last ones were far below.
    high = dataclasses.replace(now, losses=now.losses - 10)
    broken = make_rows()
    broken["tokens"][0, 0] = 86
    for before, batch, spike in (
        (high, put_batch(make_rows(), 2), 1), (now, put_batch(broken, 2), 0)):
      after, metrics = update(before, batch, np.int32(2))
      assert metrics["spike"] == spike
      assert int(after.step) == 5
      jax.tree.map(
          np.testing.assert_array_equal,
          dataclasses.replace(after, step=before.step), before)


def test_training_learns_a_batch_by_heart():
  """The same numbers on both meshes, to the rounding of twelve updates."""
  losses = []
  for mesh in (meshes.one(), meshes.eight()):
    made, update = make_update()
    with jax.set_mesh(mesh):
      now = state.create(build.load(CONFIG, build.random_params(CONFIG)), made)
      rows = put_batch(make_rows(), 2)
      losses.append([])
      for _ in range(9):
        now, metrics = update(now, rows, np.int32(2))
        losses[-1].append(float(metrics["loss"]))
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
  assert losses[0][-1] < 0.6 * losses[0][0]
