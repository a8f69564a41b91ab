"""Smaller optimizer states: NumPy from the papers, optax, limits, bytes."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posttrain import config as config_lib
from posttrain import sharding, weights
from posttrain.model import presets, transformer
from posttrain.programs import program
from posttrain.stages import memory_estimate
from posttrain.telemetry import memory
from posttrain.train import checkpoints, optimizer, state
from tests import meshes

ROOT = pathlib.Path(__file__).parents[2]
# Sides of 128 and more are factored; norms and q are not.
CONFIG = dataclasses.replace(
    presets.PRESETS["tiny"], vocab_size=200, embed=128, mlp=256, layers=2,
    head_dim=16)
KINDS = [("adamw", "bfloat16"), ("adafactor", "float32"),
         ("adafactor", "bfloat16")]


def make(name="adamw", dtype="float32", **changes):
  return optimizer.make_optimizer(**dict(
      beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1e9,
      optimizer=name, moments_dtype=dtype) | changes)


def gradients(count):
  rng = np.random.default_rng(0)
  return [{"w": rng.normal(size=(2, 128, 160)).astype(np.float32),
           "norm": rng.normal(size=(5,)).astype(np.float32)}
          for _ in range(count)]


def steps(made, grads, params):
  """The directions of these gradients, and the last state."""
  opt_state, found, update = made.init(params), [], jax.jit(made.update)
  for grad in grads:
    updates, opt_state = update(grad, opt_state, params)
    found.append(jax.device_get(updates))
  return found, opt_state


def numpy_adafactor(grads, *, beta1, beta2):
  """Shazeer and Stern, algorithms 4 and 5, and a mean of what comes out."""
  row = col = square = mean = 0.0
  for step, grad in enumerate(grads, start=1):
    decay = min(beta2, 1 - step**-0.8)
    squared = grad.astype(np.float64)**2 + 1e-30
    if grad.ndim > 1:
      row = decay * row + (1 - decay) * squared.sum(-1)
      col = decay * col + (1 - decay) * squared.sum(-2)
      estimate = row[..., :, None] * col[..., None, :] / row.sum(-1)[
          ..., None, None]
    else:
      square = decay * square + (1 - decay) * squared
      estimate = square
    scaled = grad / np.sqrt(estimate)
    scaled = scaled / max(1, np.sqrt((scaled**2).mean()))
    mean = beta1 * mean + (1 - beta1) * scaled
    yield mean if beta1 else scaled


@pytest.mark.parametrize("beta1, beta2", [(0.9, 0.999), (0.0, 0.6)])
def test_adafactor_is_numpy(beta1, beta2):
  """Six steps; with 0.6 the decay stops growing at the fourth."""
  grads = gradients(6)
  found, _ = steps(make("adafactor", beta1=beta1, beta2=beta2), grads, grads[0])
  for name in ("w", "norm"):
    want = numpy_adafactor(
        [grad[name] for grad in grads], beta1=beta1, beta2=beta2)
    for a, b in zip(found, want, strict=True):
      np.testing.assert_allclose(a[name], b, rtol=2e-5, atol=1e-6)


def test_adafactor_is_optaxs():
  grads = gradients(4)
  params = jax.tree.map(lambda g: 3 * g, grads[1])
  made = make("adafactor", weight_decay=0.1, dtype="bfloat16")
  theirs = optax.adafactor(
      multiply_by_parameter_scale=False, momentum=0.9,
      dtype_momentum=jnp.bfloat16, weight_decay_rate=0.1,
      weight_decay_mask=optimizer.decay_mask)
  for a, b in zip(steps(made, grads, params)[0],
                  steps(theirs, grads, params)[0], strict=True):
    jax.tree.map(  # Theirs is what is added, not what is taken off.
        lambda x, y: np.testing.assert_allclose(
            x, -y, rtol=1e-5, atol=1e-6), a, b)


def test_adafactors_square_is_exact_where_squares_are_a_product():
  """The first step is then the sign of the gradient."""
  rng = np.random.default_rng(1)
  grad = {"w": np.outer(*rng.normal(size=(2, 128))).astype(np.float32)}
  [found], _ = steps(make("adafactor", beta1=0.0), [grad], grad)
  np.testing.assert_allclose(found["w"], np.sign(grad["w"]), rtol=1e-4)


def test_adam_in_bfloat16_is_adam_whose_moments_were_rounded():
  """One step is Adam's own; what is kept is a neighbour of Adam's."""
  grads = gradients(2)
  wide, exact = steps(make(), grads, grads[0])
  narrow, kept = steps(make(dtype="bfloat16"), grads, grads[0])
  jax.tree.map(np.testing.assert_array_equal, narrow[0], wide[0])
  np.testing.assert_allclose(narrow[1]["w"], wide[1]["w"], rtol=0.02, atol=.02)
  for name, share in (("mu", 2**-8), ("nu", 2**-6)):
    for a, b in zip(jax.tree.leaves(getattr(kept[1], name)), jax.tree.leaves(
        getattr(exact[1], name)), strict=True):
      assert a.dtype == jnp.bfloat16
      wrong = np.abs(np.asarray(a, np.float32) - b)
      assert np.all(wrong <= share * np.abs(b) + 2**-8)
  _, second = steps(make(dtype="bfloat16"), grads, grads[0])
  jax.tree.map(np.testing.assert_array_equal, kept, second)


def test_a_square_in_bfloat16_shrinks_as_it_should():
  """0.999 of it would be rounded to itself: it would never shrink.

  After 100 steps without a gradient the mean of 51,200 squares is 0.999**100,
  within six standard errors (a false alarm in 5e8). Each step moves a square by
  at most one unit in the last place, 2**-8, with a variance below its square
  over 4; 100 of them add up.
  """
  made = make(dtype="bfloat16")
  params = {"w": np.zeros((256, 200), np.float32)}
  opt_state = made.init(params)
  adam = opt_state[1]._replace(nu={"w": jnp.ones((256, 200), jnp.bfloat16)})
  opt_state = (opt_state[0], adam, opt_state[2])
  assert jnp.bfloat16(0.999) == 1
  update = jax.jit(made.update)
  for _ in range(100):
    _, opt_state = update(params, opt_state, params)
  error = 6 * 2**-8 / 2 * math.sqrt(100 / 51_200)
  found = np.asarray(opt_state[1].nu["w"], np.float64).mean()
  assert abs(found - 0.999**100) < error
  assert error < 0.1 * (1 - 0.999**100)


def test_rounding_at_random():
  """To a neighbour, in proportion; what bfloat16 has stays; no mesh matters.

  x = 1 + 2**-9 is a quarter of the way from 1 to its upper neighbour 1 + 2**-7.
  Of 4,096 the share that goes up is a quarter, within six standard errors.
  """
  rounded = jax.jit(optimizer.stochastic_bfloat16)
  key = jax.random.key(3)
  x = np.full((64, 64), 1 + 2**-9, np.float32)
  with jax.set_mesh(meshes.one()):
    one = np.asarray(rounded(x, key))
    exact = np.asarray(x, jnp.bfloat16)
    np.testing.assert_array_equal(rounded(exact.astype(np.float32), key), exact)
    assert set(np.unique(rounded(-x, key))) == {-1, -(1 + 2**-7)}
  assert set(np.unique(one)) == {1, 1 + 2**-7}
  assert abs((one > 1).mean() - 0.25) < 6 * math.sqrt(0.25 * 0.75 / 4096)
  with jax.set_mesh(meshes.eight()):
    on_mesh = rounded(sharding.put(x, "embed", "mlp"), key)
    assert jax.typeof(on_mesh).sharding.spec == sharding.spec("embed", "mlp")
    np.testing.assert_array_equal(sharding.fetch(on_mesh), one)


@pytest.mark.parametrize("name, dtype", KINDS)
def test_the_plans_bytes_are_those_of_real_shards(name, dtype):
  made = make(name, dtype)
  with jax.set_mesh(meshes.eight()):
    model = transformer.Transformer(CONFIG, jax.random.key(0))
    real = state.create(model, made)
    planned = weights.on_mesh(
        jax.eval_shape(lambda model: state.create(model, made), model))
    assert program.shard_bytes(planned) == sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(real))


def test_a_checkpoint_keeps_every_bit(tmp_path):
  """The states of two optimizers, after an update."""
  both = [make("adamw", "bfloat16"), make("adafactor", "bfloat16")]
  [grads] = gradients(1)
  with jax.set_mesh(meshes.eight()):
    params = {"w": sharding.put(grads["w"], None, "embed", "mlp"),
              "norm": sharding.put(grads["norm"], None)}
    fresh = [made.init(params) for made in both]
    tree = state.to_dict(jax.jit(lambda params, states: [
        made.update(params, opt_state, params)[1]
        for made, opt_state in zip(both, states, strict=True)])(params, fresh))
    assert [*map(jax.typeof, jax.tree.leaves(tree))] == [
        *map(jax.typeof, jax.tree.leaves(state.to_dict(fresh)))]
    with checkpoints.Checkpoints(tmp_path / "c", keep=1) as saver:
      saver.save(1, tree, {})
      found = saver.restore(checkpoints.abstract(tree)).tree
    for a, b in zip(*map(jax.tree.leaves, (found, tree)), strict=True):
      assert jax.typeof(a) == jax.typeof(b)
      np.testing.assert_array_equal(*jax.device_get((a, b)))


@pytest.mark.parametrize("name, dtype", [("adamw", "float32"), *KINDS])
def test_the_estimate_has_the_state_of_the_section(name, dtype):
  config = config_lib.load(str(ROOT / "configs/tiny.py"), [
      f"cold_start.optimizer={name}", f"cold_start.moments_dtype={dtype}"])
  section = config.cold_start
  with jax.set_mesh(meshes.one()):
    _, held = memory_estimate.of_trained(section, config.compute, CONFIG)
    opt_state = jax.eval_shape(
        lambda: make(name, dtype).init(
            transformer.Transformer(CONFIG, jax.random.key(0))))
  found = held["optimizer_bytes"]
  assert found == sum(
      w.size * w.dtype.itemsize for w in jax.tree.leaves(opt_state))
  estimate = memory.estimate(
      CONFIG, fsdp=4, rows=8, sequence_length=8, loss_chunk=8, **held)
  assert estimate.persistent["optimizer"] == found // 4
