"""Identities: adapters that add nothing, all there is, or what was merged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posttrain import sharding
from posttrain.model import lora
from posttrain.model.config import INPUT_AXES, LoraConfig
from tests import meshes
from tests.model import build, test_cache
from tests.model.test_transformer import gradient, packed_rows

CONFIG = build.make_config(**build.OPTIONS["everything"])
LORA = LoraConfig(rank=3, alpha=6.0)


@functools.cache
def params():
  with jax.set_mesh(meshes.one()):
    return build.random_params(CONFIG)


def adapted(how=LORA, seed=1):
  """A model with adapters whose B is not zero."""
  model = lora.add(build.load(CONFIG, params()), how, jax.random.key(seed))

  def shake(path, w):
    name = jax.tree_util.keystr(path)
    if "_lora_b" not in name:
      return w
    noise = np.random.default_rng(len(name) + w.size).normal(size=w.shape)
    return jax.device_put((0.2 * noise).astype(np.float32), w.sharding)

  return jax.tree_util.tree_map_with_path(shake, model)


def logits(model):
  rows, _ = packed_rows()
  rows = [np.tile(x, (4, 1)) for x in rows]  # A mesh of eight divides them.
  return sharding.fetch(build.full_logits(model, *build.put_rows(*rows)))


@pytest.mark.parametrize("mesh", [meshes.one, meshes.eight])
def test_new_and_switched_off_and_merged(mesh):
  with jax.set_mesh(mesh()):
    base = build.load(CONFIG, params())
    new, live = lora.add(base, LORA, jax.random.key(1)), adapted()
    off, merged = lora.without(live), lora.merged(live)
    plain = logits(base)
    np.testing.assert_array_equal(logits(new), plain)
    np.testing.assert_array_equal(logits(off), plain)
    moved = logits(live)
    assert np.abs(moved - plain).max() > 1
    np.testing.assert_allclose(logits(merged), moved, rtol=0, atol=5e-5)
  assert merged.config == off.config == base.config
  assert [*map(jax.typeof, jax.tree.leaves(merged))] == [
      *map(jax.typeof, jax.tree.leaves(base))]
  # The very buffers, with an adapter and without.
  assert all(a is b for a, b in zip(*map(
      jax.tree.leaves, (base, lora.without(new))), strict=True))
  live_arrays = {id(w) for w in jax.tree.leaves(live)}
  assert all(id(w) in live_arrays for w in jax.tree.leaves(off))


def test_adapters_are_born_alike_on_any_mesh_in_their_layout():
  born = []
  for mesh in (meshes.one(), meshes.eight()):
    with jax.set_mesh(mesh):
      blocks = lora.add(
          build.load(CONFIG, params()), LORA, jax.random.key(1)).blocks
      born.append(sharding.fetch(blocks))
  assert [str(jax.typeof(getattr(blocks, name)[...])) for name in (
      "q_lora_a", "q_lora_b", "o_lora_a", "o_lora_b", "down_lora_a")] == [
          "float32[2,32@fsdp,3]", "float32[2,3,2@tensor,2,12]",
          "float32[2,2@tensor,2,12,3]", "float32[2,3,32@fsdp]",
          "float32[2,48@tensor,3]"]
  for a, b in zip(*map(jax.tree.leaves, born), strict=True):
    np.testing.assert_array_equal(a, b)
  a = born[0].down_lora_a[...]
  assert 0.9 < np.abs(a).max() * 48**0.5 <= 1  # As peft: within 1 / sqrt(in).


def test_a_name_draws_the_same_whatever_else_is_a_target():
  with jax.set_mesh(meshes.one()):
    model = build.load(CONFIG, params())
    few = lora.add(model, dataclasses.replace(
        LORA, targets=("v",)), jax.random.key(1))
    every = lora.add(model, LORA, jax.random.key(1))
  assert not hasattr(few.blocks, "q_lora_a")
  np.testing.assert_array_equal(
      few.blocks.v_lora_a[...], every.blocks.v_lora_a[...])


@pytest.mark.parametrize("rslora", [False, True])
def test_at_full_rank_an_adapter_is_any_change_of_weights(rslora):
  """The factors of a change's singular value decomposition."""
  rank = 32
  how = LoraConfig(rank, 5.0, ("q", "o", "down"), rslora)
  scale = 5 / np.sqrt(rank) if rslora else 5 / rank
  rng = np.random.default_rng(0)
  changed, factors = {**params(), "blocks": dict(params()["blocks"])}, {}
  for name in how.targets:
    w = params()["blocks"][name]
    inputs = int(np.prod(w.shape[1:1 + INPUT_AXES[name]]))
    delta = 0.1 * rng.normal(size=(2, inputs, w[0].size // inputs))
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    assert s.shape[1] == rank
    cut = 1 + INPUT_AXES[name]
    factors[name] = (
        (u * s[:, None]).reshape(*w.shape[:cut], rank) / scale,
        vt.reshape(2, rank, *w.shape[cut:]))
    changed["blocks"][name] = (w + delta.reshape(w.shape)).astype(np.float32)
  with jax.set_mesh(meshes.one()):
    model = lora.add(build.load(CONFIG, params()), how, jax.random.key(0))
    for name, pair in factors.items():
      for letter, array in zip("ab", pair, strict=True):
        setattr(model.blocks, f"{name}_lora_{letter}",
                nnx.Param(jnp.asarray(array, jnp.float32)))
    np.testing.assert_allclose(
        logits(model), logits(build.load(CONFIG, changed)), rtol=0, atol=5e-5)


def test_the_gradient_is_the_chain_rule():
  """dA = scale dW B^T and dB = scale A^T dW, of the merged model's dW."""
  rows, _ = packed_rows()
  with jax.set_mesh(meshes.one()):
    model = adapted()
    found = gradient(model, *build.put_rows(*rows))[1].blocks
    whole = gradient(lora.merged(model), *build.put_rows(*rows))[1].blocks
  for name in INPUT_AXES:
    a, b = (np.asarray(getattr(model.blocks, f"{name}_lora_{x}")[...],
                       np.float64).reshape(shape)
            for x, shape in (("a", (2, -1, 3)), ("b", (2, 3, -1))))
    dw = np.asarray(getattr(whole, name)[...], np.float64).reshape(
        2, a.shape[1], b.shape[2])
    for letter, wanted in (
        ("a", 2 * np.einsum("lio,lro->lir", dw, b)),
        ("b", 2 * np.einsum("lir,lio->lro", a, dw))):
      got = np.asarray(getattr(found, f"{name}_lora_{letter}")[...])
      np.testing.assert_allclose(
          got.reshape(wanted.shape), wanted, rtol=0,
          atol=2e-5 * np.abs(wanted).max(), err_msg=f"{name} {letter}")


@pytest.mark.parametrize("decode, mesh", [
    ("live", meshes.one), ("merged", meshes.one),
    pytest.param("live", meshes.eight, marks=pytest.mark.slow),
    pytest.param("merged", meshes.eight, marks=pytest.mark.slow)])
def test_decoding_with_an_adapter_is_the_training_forward(decode, mesh):
  """Token by token over the cache, against the live adapter's forward."""
  with jax.set_mesh(mesh()):
    model = adapted(dataclasses.replace(LORA, decode=decode))
    found, rows = test_cache.run_model(model)
    whole = build.full_logits
    for row, step, tokens in rows:
      want = jax.nn.log_softmax(forward(whole, model, tokens))[len(tokens) - 1]
      np.testing.assert_allclose(
          found[step, row], want, rtol=0, atol=5e-5)


def forward(full_logits, model, tokens):
  """[T, V] of one sequence, padded to one shape, beside copies of itself."""
  width = 24
  padded = np.zeros((4, width), int)
  padded[:, :len(tokens)] = tokens
  rows = build.put_rows(
      padded, np.tile(np.arange(width), (4, 1)), np.ones((4, width)))
  return sharding.fetch(full_logits(model, *rows))[0]


@pytest.mark.parametrize("fields, message", [
    (dict(targets=("q", "w")), "must name some of q, k, v"),
    (dict(targets=()), "must name some of"),
    (dict(targets=("q", "q")), "names one twice"),
    (dict(rank=0), "lora.rank=0"), (dict(decode="x"), "lora.decode='x'")])
def test_what_is_no_adapter(fields, message):
  with pytest.raises(ValueError, match=message):
    LoraConfig(**{"rank": 2, **fields})
