"""Trained, frozen and shared parameters: by buffers and by bytes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.model import lora
from posttrain.model.config import LoraConfig
from posttrain.train import optimizer, state, step, trainable
from tests import meshes
from tests.model import build
from tests.train import test_step

CONFIG = build.make_config(embed=64, mlp=96)
LORA = LoraConfig(rank=2)
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(meshes.one()):
    yield


def fresh():
  return build.load(CONFIG, build.random_params(CONFIG))


def prepare(plan, model=None):
  return trainable.prepare(model or fresh(), plan, seed=3, stage="reason")


def dtypes(model):
  return {path: leaf.dtype.name for path, leaf in zip(
      trainable.paths(model), jax.tree.leaves(model), strict=True)}


@pytest.mark.parametrize("plan, trained", [
    (trainable.Plan(), 11), (trainable.Plan(LORA), 14),
    (trainable.Plan(pattern="blocks/(q|k)"), {"blocks/q", "blocks/k"}),
    (trainable.Plan(pattern="embed.*"), {"embedding"}),
    (trainable.Plan(LORA, "blocks/v_lora_.|final_norm"),
     {"blocks/v_lora_a", "blocks/v_lora_b", "final_norm"})])
def test_a_pattern_says_what_is_trained(plan, trained):
  found = prepare(plan)[1]
  assert (len(found) if isinstance(trained, int) else found) == trained


@pytest.mark.parametrize("plan, message", [
    (trainable.Plan(pattern="q"), "matches no parameter as a whole.*blocks/q,"),
    (trainable.Plan(LORA, "blocks/q"), "trains no adapter, and lora.rank=2")])
def test_a_pattern_that_trains_nothing(plan, message):
  with pytest.raises(ValueError, match=message):
    prepare(plan)


def test_a_plan_goes_through_json():
  for plan in (trainable.Plan(), trainable.Plan(LORA, "a.*", "nf4")):
    assert trainable.Plan.from_json(plan.to_json()) == plan


def test_frozen_weights_rest_as_asked_and_trained_ones_in_float32():
  found = dtypes(prepare(trainable.Plan(LORA, frozen_dtype="bfloat16"))[0])
  assert {name: kind for name, kind in found.items() if kind != "bfloat16"} == {
      f"blocks/{name}_lora_{x}": "float32" for name in MATRICES for x in "ab"}
  found = dtypes(prepare(trainable.Plan(
      pattern="blocks/q|embedding", frozen_dtype="nf4"))[0])
  assert found["blocks/q"] == found["embedding"] == "float32"
  assert "blocks/q_scale" not in found
  assert found["blocks/k"] == "uint8" and found["blocks/k_scale"] == "float32"
  assert found["blocks/attn_norm"] == found["final_norm"] == "bfloat16"


def test_what_rests_already_is_shared_and_the_rest_is_consumed():
  before = fresh()
  after, trained = prepare(trainable.Plan(LORA), before)
  assert after.blocks.q.get_value() is before.blocks.q.get_value()
  again, _ = prepare(trainable.Plan(LORA), after)  # The next stage.
  assert all(a is b for a, b in zip(
      jax.tree.leaves(after), jax.tree.leaves(again), strict=True))
  prepare(trainable.Plan(LORA, frozen_dtype="int8"), after)
  assert before.blocks.q.get_value().is_deleted()
  assert not after.blocks.q_lora_a.get_value().is_deleted()
  assert len(trained) == 14


def test_other_adapters_are_added_in_first():
  """To the weights; and then there are new ones, or everything is trained."""
  model, _ = prepare(trainable.Plan(LORA))
  model = jax.tree.map(lambda w: w + 0.1, model)
  want = jax.tree.map(np.asarray, lora.merged(model))
  for plan in (trainable.Plan(LoraConfig(rank=5)), trainable.Plan()):
    found, trained = prepare(plan, jax.tree.map(jnp.copy, model))
    assert found.config.lora == plan.lora
    jax.tree.map(
        np.testing.assert_array_equal, lora.without(found), want)
  assert trained == set(trainable.paths(found))


def test_a_quantised_model_that_is_trained_whole_is_what_it_was_at_rest():
  model, _ = prepare(trainable.Plan(LORA, frozen_dtype="int4"))
  want = jax.tree.map(np.asarray, lora.merged(model))
  found, _ = prepare(trainable.Plan(), model)
  assert set(dtypes(found).values()) == {"float32"}
  jax.tree.map(np.testing.assert_array_equal, found, want)


def make_state(plan):
  adamw = optimizer.make_optimizer(
      beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
  schedule = optimizer.make_schedule(
      schedule="constant", learning_rate=1e-2, warmup_steps=0, num_steps=10,
      final_learning_rate=0.0)
  model, trained = prepare(plan)
  return state.create(model, adamw, trained), trained, step.compile_update(
      functools.partial(
          step.update, loss=test_step.loss, optimizer=adamw,
          schedule=schedule))


@pytest.mark.parametrize("dtype", ["float32", "nf4"])
def test_updates_move_what_is_trained_and_a_reference_shares_the_rest(dtype):
  now, trained, update = make_state(trainable.Plan(LORA, frozen_dtype=dtype))
  reference = trainable.reference(lora.without(now.model), trained, dtype)
  base = jax.tree.leaves(now.frozen)
  assert all(a is b for a, b in zip(
      jax.tree.leaves(reference), base, strict=True))
  moments = now.opt_state[1]
  assert [w.shape for w in jax.tree.leaves(moments.mu)] == [
      w.shape for w in jax.tree.leaves(now.trained)]
  held = [np.asarray(w) for w in base]
  start = jax.tree.map(np.asarray, now.trained)
  rows, losses = test_step.put_batch(test_step.make_rows(), 2), []
  for _ in range(4):
    now, metrics = update(now, rows, np.int32(2))
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0]
  for a, b, c in zip(jax.tree.leaves(now.frozen), base, held, strict=True):
    assert a is b and not a.is_deleted()
    np.testing.assert_array_equal(a, c)
  for a, b in zip(*map(jax.tree.leaves, (start, now.trained)), strict=True):
    assert np.abs(a - np.asarray(b)).max() > 0


def test_a_reference_of_trained_weights_is_a_copy_of_those_alone():
  now, trained, update = make_state(trainable.Plan(pattern="blocks/(q|k)"))
  reference = trainable.reference(now.model, trained, "float32")
  before = jax.tree.map(np.asarray, reference)
  assert reference.blocks.v.get_value() is now.model.blocks.v.get_value()
  update(now, test_step.put_batch(test_step.make_rows(), 2), np.int32(2))
  assert now.trained.blocks.q.get_value().is_deleted()
  jax.tree.map(np.testing.assert_array_equal, reference, before)


def test_a_whole_reference_outlives_what_it_was_made_from():
  model = fresh()
  want = jax.tree.map(np.asarray, model)
  copy = trainable.reference(model, trainable.paths(model), "float32")
  low = trainable.reference(model, trainable.paths(model), "bfloat16")
  for leaf in jax.tree.leaves(model):
    leaf.delete()
  jax.tree.map(np.testing.assert_array_equal, copy, want)
  assert set(dtypes(low).values()) == {"bfloat16"}


def gradients(plan, mesh, microbatches):
  """Gradients of the adapters, at values that leave nothing zero."""
  with jax.set_mesh(mesh):
    model, trained = prepare(plan)
    moving, frozen = trainable.split(model, trained)
    noise = lambda w: jax.device_put(
        np.random.default_rng(w.size).normal(size=w.shape).astype(
            np.float32) * 0.1, w.sharding)
    loss = lambda moving, batch: test_step.loss(
        trainable.join(moving, frozen), batch)
    found = jax.jit(lambda moving, batch: step.accumulate(
        loss, moving, batch, microbatches)[0])(
            jax.tree.map(noise, moving),
            test_step.put_batch(test_step.make_rows(), microbatches))
    return sharding.fetch(found)


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("nf4", marks=pytest.mark.slow)])
def test_microbatches_and_meshes_leave_the_gradient_alone(dtype):
  plan = trainable.Plan(LORA, frozen_dtype=dtype)
  one = gradients(plan, meshes.one(), 1)
  assert len(jax.tree.leaves(one)) == 14
  for mesh, microbatches in ((meshes.one(), 4), (meshes.eight(), 2)):
    build.assert_same_leaves(gradients(plan, mesh, microbatches), one)


def size(tree):
  return sum(w.size * w.dtype.itemsize for w in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype, remat", [
    ("float32", "none"), ("nf4", "none"), ("int8", "full")])
def test_an_update_holds_no_second_copy_of_what_is_frozen(dtype, remat):
  """By the compiler's own figure, of a model that is nearly all matrices."""
  config = dataclasses.replace(
      CONFIG, layers=6, embed=256, mlp=1024, head_dim=32, remat=remat)
  adamw = optimizer.make_optimizer(
      beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)

  def make():
    model, trained = trainable.prepare(
        trainable.Transformer(config, jax.random.key(0)),
        trainable.Plan(LORA, frozen_dtype=dtype), seed=0, stage="")
    return state.create(model, adamw, trained)

  now = jax.eval_shape(make)
  rows = test_step.put_batch(test_step.make_rows(rows=2), 1)

  def update(moving, frozen, rows):
    new, _ = step.update(
        dataclasses.replace(moving, frozen=frozen), rows, 1,
        loss=test_step.loss, optimizer=adamw, schedule=lambda step: 1e-3)
    return dataclasses.replace(new, frozen=None)

  found = jax.jit(update, donate_argnums=0).lower(
      dataclasses.replace(now, frozen=None), now.frozen,
      rows).compile().memory_analysis()
  whole = 4 * 6 * sum((256 * 256, 2 * 256 * 64, 256 * 256, 3 * 256 * 1024))
  print(f"{dtype}, {remat}: frozen {size(now.frozen)}, temporary "
        f"{found.temp_size_in_bytes}, all matrices in float32 {whole}")
  assert found.output_size_in_bytes < 4 * size(now.trained)
  assert found.temp_size_in_bytes < whole / 2
