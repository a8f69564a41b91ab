"""The router's loss in an update: oracle, one formula over the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.objectives import supervised
from posttrain.train import optimizer, state, step
from tests import meshes
from tests.model import build
from tests.train import test_step

CONFIG = build.make_config(**build.OPTIONS["experts"])
COEF = 0.7
LOSS = functools.partial(step.evaluate, supervised.cross_entropy, chunk=4)


def cross_entropy(model, rows):
  """The mean from all logits, and what the routers did."""
  tokens, mask = rows["tokens"][0], rows["loss_mask"][0]
  hidden, traffic = model.routed(
      tokens, rows["positions"][0], rows["segment_ids"][0])
  logprobs = jax.nn.log_softmax(model.logits(hidden))[:, :-1]
  chosen = jax.nn.one_hot(tokens[:, 1:], logprobs.shape[-1])
  return -jnp.sum(logprobs * chosen * mask[:, 1:, None]) / mask.sum(), traffic


def loss_and_balance(model, rows):
  """Mean cross entropy + COEF * E * sum_e f_e P_e."""
  mean_loss, traffic = cross_entropy(model, rows)
  real = rows["segment_ids"][0] > 0
  hot = jax.nn.one_hot(traffic.choice, CONFIG.num_experts)  # L, B, T, k, E
  total = real.sum() * CONFIG.layers
  often = jnp.sum(hot * real[..., None, None], axis=(0, 1, 2, 3)) / total
  mean = traffic.mass.sum(0) / total
  return mean_loss + COEF * CONFIG.num_experts * jnp.sum(often * mean)


@pytest.fixture(scope="module")
def oracle():
  with jax.set_mesh(meshes.one()):
    model = build.load(CONFIG, build.random_params(CONFIG))
    return jax.device_get(jax.jit(jax.grad(loss_and_balance))(
        model, test_step.put_batch(test_step.make_rows(), 1)))


@functools.partial(jax.jit, static_argnames="coef")
def gradient_of(model, batch, num_microbatches, coef):
  grads, terms, sums = step.accumulate(
      LOSS, model, batch, num_microbatches, coef)
  denominator = terms["cross_entropy"].denominator
  return jax.tree.map(lambda g: g / denominator, grads), sums


def gradient(mesh, microbatches, rows=None, coef=COEF):
  rows = test_step.make_rows() if rows is None else rows
  with jax.set_mesh(mesh):
    model = build.load(CONFIG, build.random_params(CONFIG))
    return sharding.fetch(gradient_of(
        model, test_step.put_batch(rows, microbatches),
        np.int32(microbatches), coef))


@pytest.mark.parametrize("mesh,microbatches", [
    (meshes.one, 1), (meshes.one, 4), (meshes.with_experts, 2)])
def test_neither_microbatches_nor_a_mesh_change_it(oracle, mesh, microbatches):
  grads, _ = gradient(mesh(), microbatches)
  build.assert_same_leaves(grads, oracle)


def test_padding_does_not_count(oracle):
  rows = test_step.pad(test_step.make_rows(), 8)
  grads, sums = gradient(meshes.one(), 2, rows)
  build.assert_same_leaves(grads, oracle)
  assert sums["router_tokens"].tolist() == [rows["segment_ids"].sum()] * 2


def test_without_a_weight_it_is_measured_only(oracle):
  grads, sums = gradient(meshes.one(), 1, coef=0.0)
  assert sums["router_load"].sum() == 2 * 3 * sums["router_tokens"][0]
  router = np.abs(grads.blocks.router[...] - oracle.blocks.router[...])
  assert router.max() > 0.01 * np.abs(oracle.blocks.router[...]).max()


def test_updates_even_out_the_load_and_report_it():
  """From a router that likes two experts; the loss itself is not in `loss`."""
  made = optimizer.make_optimizer(
      beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, max_grad_norm=1e9)
  update = jax.jit(functools.partial(
      step.update, loss=LOSS, optimizer=made,
      schedule=lambda step: 0.02, router_aux_coef=10.0))
  with jax.set_mesh(meshes.one()):
    now = state.create(build.load(CONFIG, build.random_params(CONFIG)), made)
    batch = test_step.put_batch(test_step.make_rows(), 2)
    wanted, _ = cross_entropy(now.model, test_step.put_batch(
        test_step.make_rows(), 1))
    rows = []
    for _ in range(12):
      now, metrics = update(now, batch, np.int32(2))
      rows.append(jax.device_get(metrics))
  assert rows[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)
  first, last = rows[0]["router/aux_loss"], rows[-1]["router/aux_loss"]
  assert last - 3 < 0.5 * (first - 3)  # Three experts a token: 3 is even.
  assert rows[-1]["router/load_max"] < rows[0]["router/load_max"]
  assert 0 < rows[-1]["router/entropy"] <= np.log(8)
