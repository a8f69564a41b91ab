"""Oracles: s1's schedule, and AdamW in NumPy."""

import json
import pathlib

import jax
import numpy as np
import pytest

from posttrain.model import transformer
from posttrain.train import optimizer
from tests import meshes
from tests.model import build

ORACLES = json.loads(
    (pathlib.Path(__file__).parents[1] / "data/oracles.json").read_text())


def test_s1s_schedule():
  """315 steps of cosine to zero after 16 of warm-up, as published."""
  schedule = optimizer.make_schedule(
      schedule="cosine", learning_rate=1e-5, warmup_steps=16, num_steps=315,
      final_learning_rate=0.0)
  for step, want in ORACLES["s1 lr schedule (315 steps, warmup 16)"].items():
    np.testing.assert_allclose(
        schedule(float(step)), want, rtol=1e-5, atol=1e-13)


def by_hand(schedule, step, peak, warmup, steps, final):
  if step < warmup:
    return peak * step / warmup
  done = min((step - warmup) / (steps - warmup), 1)
  share = {"constant": 1, "linear": 1 - done,
           "cosine": (1 + np.cos(np.pi * done)) / 2}[schedule]
  return final + (peak - final) * share if schedule != "constant" else peak


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
@pytest.mark.parametrize("warmup,final", [(0, 0.0), (5, 2e-4), (1, 1e-3)])
def test_schedules_by_hand(schedule, warmup, final):
  made = optimizer.make_schedule(
      schedule=schedule, learning_rate=1e-3, warmup_steps=warmup, num_steps=20,
      final_learning_rate=final)
  np.testing.assert_allclose(
      [made(step) for step in range(25)],
      [by_hand(schedule, step, 1e-3, warmup, 20, final) for step in range(25)],
      rtol=1e-5, atol=1e-10)


def test_a_warm_up_may_take_all_steps():
  for schedule in optimizer.SCHEDULES:
    made = optimizer.make_schedule(
        schedule=schedule, learning_rate=1.0, warmup_steps=4, num_steps=4,
        final_learning_rate=0.0)
    np.testing.assert_allclose(
        [made(step) for step in range(4)], [0, 0.25, 0.5, 0.75])


def test_an_unknown_schedule_is_an_error():
  with pytest.raises(ValueError, match="'exponential'; choose from"):
    optimizer.make_schedule(
        schedule="exponential", learning_rate=1.0, warmup_steps=0,
        num_steps=1, final_learning_rate=0.0)


HYPER = dict(beta1=0.9, beta2=0.95, eps=1e-8)


def decayed(name):
  """Matrices and tables, and neither a norm nor a bias."""
  return name in ("embedding", "head", "q", "k", "v", "o", "gate", "up",
                  "down")


def numpy_adamw(params, grads, rates, *, beta1, beta2, eps, weight_decay,
                max_grad_norm):
  """Loshchilov and Hutter, algorithm 2, after clipping the global norm."""
  mean = {name: 0.0 for name in params}
  square = dict(mean)
  for step, rate in enumerate(rates, start=1):
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    scale = min(1, max_grad_norm / norm)
    for name, grad in grads.items():
      grad = grad * scale
      mean[name] = beta1 * mean[name] + (1 - beta1) * grad
      square[name] = beta2 * square[name] + (1 - beta2) * grad**2
      direction = (mean[name] / (1 - beta1**step)) / (
          np.sqrt(square[name] / (1 - beta2**step)) + eps)
      if decayed(name.split("/")[-1]):
        direction = direction + weight_decay * params[name]
      params[name] = params[name] - rate * direction
  return params


def named(model):
  leaves = jax.tree.leaves_with_path(transformer.to_dict(model))
  return {jax.tree_util.keystr(path, simple=True, separator="/"):
          np.asarray(leaf, np.float64) for path, leaf in leaves}


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9])
def test_adamw_is_numpy(max_grad_norm):
  """Two steps; norms and biases do not shrink, all else does."""
  config = build.make_config(**build.OPTIONS["everything"])
  rates = [1e-2, 3e-3]
  hyper = HYPER | dict(weight_decay=0.3, max_grad_norm=max_grad_norm)
  with jax.set_mesh(meshes.one()):
    model = build.load(config, build.random_params(config))
    grads = build.load(config, build.random_params(config, 1))
    want = numpy_adamw(named(model), named(grads), rates, **hyper)
    made = optimizer.make_optimizer(**hyper)
    opt_state = made.init(model)
    for rate in rates:
      updates, opt_state = jax.jit(made.update)(grads, opt_state, model)
      model = jax.tree.map(lambda w, u: w - rate * u, model, updates)
    for name, got in named(model).items():
      np.testing.assert_allclose(
          got, want[name], rtol=0, atol=2e-5 * np.abs(want[name]).max(),
          err_msg=name)


def test_without_a_gradient_only_weights_shrink():
  config = build.make_config(**build.OPTIONS["everything"])
  with jax.set_mesh(meshes.one()):
    model = build.load(config, build.random_params(config))
    made = optimizer.make_optimizer(
        **HYPER, weight_decay=0.5, max_grad_norm=1.0)
    zeros = jax.tree.map(jax.numpy.zeros_like, model)
    updates, _ = jax.jit(lambda grads, model: made.update(
        grads, made.init(model), model))(zeros, model)
    before, moves = named(model), named(updates)
  for name, move in moves.items():
    factor = 0.5 if decayed(name.split("/")[-1]) else 0
    np.testing.assert_allclose(move, factor * before[name], rtol=1e-6)
