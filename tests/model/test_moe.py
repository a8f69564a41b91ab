"""Oracles: NumPy token by token; the two forms of each other; one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import sharding
from posttrain.model import grouped_kernel, moe, transformer
from posttrain.model.presets import PRESETS
from tests import meshes
from tests.model import build, numpy_transformer, test_transformer

CONFIG = build.make_config(**build.OPTIONS["experts"])
N, E, K, D, F = 40, 8, 3, 16, 12


def rows_of_four():
  """Packed rows with padding, as many as the largest mesh has parts."""
  rows, _ = test_transformer.packed_rows()
  return [np.concatenate([x, x[::-1]]) for x in rows]


def with_form(form: str):
  return dataclasses.replace(CONFIG, moe=form)


# One device's part: plain arrays.


def inputs(seed=0, concentrated=False):
  """x, choice, weights and the matrices; or all tokens to the last experts."""
  rng = np.random.default_rng(seed)
  choice = np.array([rng.permutation(E)[:K] for _ in range(N)])
  if concentrated:
    choice = np.tile(np.arange(E - K, E), (N, 1))
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return (normal(N, D), choice.astype(np.int32), np.abs(normal(N, K)),
          normal(E, D, F), normal(E, D, F), normal(E, F, D))


def by_hand(x, choice, weights, gate, up, down):
  out = np.zeros(x.shape)
  for n in range(len(x)):
    for expert, weight in zip(choice[n], weights[n], strict=True):
      if 0 <= expert < len(gate):
        z = x[n] @ gate[expert].astype(np.float64)
        out[n] += weight * (z / (1 + np.exp(-z)) * (x[n] @ up[expert])
                            ) @ down[expert]
  return out


@pytest.mark.parametrize("form", moe.FORMS)
@pytest.mark.parametrize("concentrated", [False, True])
def test_no_token_is_dropped(form, concentrated):
  """Not even if all of them go to three of eight experts."""
  arrays = inputs(concentrated=concentrated)
  out = jax.jit(functools.partial(moe.FORMS[form], activation=jax.nn.silu))(
      *arrays)
  np.testing.assert_allclose(out, by_hand(*arrays), rtol=0, atol=2e-4)


@pytest.mark.parametrize("form", moe.FORMS)
def test_experts_elsewhere_add_nothing(form):
  """The parts of two devices with half of the experts each are the whole."""
  x, choice, weights, *matrices = inputs()
  run = functools.partial(moe.FORMS[form], activation=jax.nn.silu)
  halves = [
      run(x, choice - first, weights,
          *(w[first:first + E // 2] for w in matrices))
      for first in (0, E // 2)]
  for part, first in zip(halves, (0, E // 2), strict=True):
    np.testing.assert_allclose(
        part, by_hand(x, choice - first, weights,
                      *(w[first:first + E // 2] for w in matrices)),
        rtol=0, atol=2e-4)


KERNEL = functools.partial(grouped_kernel.product, interpret=True)


@pytest.mark.parametrize("grouped_form", [
    moe.grouped, functools.partial(moe.grouped, product=KERNEL)],
    ids=["ragged", "kernel"])
def test_both_forms_have_one_gradient(grouped_form):
  """The gradients of every input, on a device with experts 2 to 5 of eight."""
  x, choice, weights, *matrices = inputs()
  floats = (x, weights, *(w[2:6] for w in matrices))
  probe = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

  def loss(floats, form):
    x, weights, *matrices = floats
    out = form(x, choice - 2, weights, *matrices, jax.nn.silu)
    return jnp.sum(out * probe)

  dense, grouped = (
      jax.grad(loss)(floats, form) for form in (moe.dense, grouped_form))
  assert all(np.abs(g).max() > 0.1 for g in dense)
  build.assert_same_leaves(grouped, dense, tolerance=1e-5)


# The whole model, on meshes.


@functools.cache
def loss_and_gradient(form, shape):
  with jax.set_mesh(meshes.mesh(*shape)):
    model = build.load(with_form(form), build.random_params(CONFIG))
    loss, grads = test_transformer.gradient(
        model, *build.put_rows(*rows_of_four()))
    for w, g in zip(jax.tree.leaves(model), jax.tree.leaves(grads),
                    strict=True):
      assert str(jax.typeof(w)) == str(jax.typeof(g))
    return float(loss), sharding.fetch(grads)


@pytest.mark.parametrize("form,shape", [
    ("grouped", (1, 1, 1)), ("dense", (2, 2, 2)), ("grouped", (2, 2, 2)),
    pytest.param("grouped", (1, 1, 4), marks=pytest.mark.slow),
    pytest.param("dense", (4, 2, 1), marks=pytest.mark.slow)])
def test_a_mesh_and_a_form_change_neither_loss_nor_gradient(form, shape):
  loss, grads = loss_and_gradient(form, shape)
  want_loss, want = loss_and_gradient("dense", (1, 1, 1))
  assert loss == pytest.approx(want_loss, rel=1e-6)
  build.assert_same_leaves(grads, want, tolerance=1e-5)


@pytest.mark.parametrize("shape", [
    (1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_the_kernels_gradient_on_a_mesh(shape, monkeypatch):
  used = []

  def kernel(*arrays):
    used.append(arrays)
    return KERNEL(*arrays)

  monkeypatch.setitem(moe.PRODUCTS, "cpu", kernel)
  jax.clear_caches()  # Of the same model without.
  loss, grads = loss_and_gradient.__wrapped__("grouped", shape)
  jax.clear_caches()
  assert used
  want_loss, want = loss_and_gradient("dense", (1, 1, 1))
  assert loss == pytest.approx(want_loss, rel=1e-6)
  build.assert_same_leaves(grads, want, tolerance=1e-5)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6),
       st.integers(0, 30))
@settings(max_examples=8, deadline=None)
def test_a_group_s_matrix_has_its_own_rows_gradient(sizes, behind):
  """Empty groups, one that fills several tiles, rows of no group (NaN)."""
  rng = np.random.default_rng(sum(sizes))
  sizes = np.array(sizes, np.int32) * 8
  rows, cotangent = (
      rng.normal(size=(sizes.sum() + 1 + behind, n)).astype(np.float32)
      for n in (5, 7))
  rows[sizes.sum():], cotangent[sizes.sum():] = np.nan, np.nan
  found = grouped_kernel._of_matrices(rows, cotangent, sizes, interpret=True)
  ends = np.cumsum(sizes)
  for group, (end, size) in enumerate(zip(ends, sizes, strict=True)):
    of = slice(end - size, end)
    np.testing.assert_allclose(
        found[group], rows[of].T.astype(np.float64) @ cotangent[of],
        rtol=0, atol=1e-4)


def test_experts_are_split_over_their_axis_and_stay_there():
  with jax.set_mesh(meshes.with_experts()):
    blocks = transformer.to_dict(transformer.abstract(CONFIG))["blocks"]
    layouts = {name: str(jax.typeof(blocks[name]))
               for name in ("router", "gate", "up", "down", "q")}
    gathered = jax.eval_shape(
        lambda w: sharding.gather_fsdp(w), blocks["gate"])
  assert layouts == {
      "router": "float32[2,32@(fsdp,expert),8]",
      "gate": "float32[2,8@expert,32@fsdp,24@tensor]",
      "up": "float32[2,8@expert,32@fsdp,24@tensor]",
      "down": "float32[2,8@expert,24@tensor,32@fsdp]",
      "q": "float32[2,32@(fsdp,expert),2@tensor,2,8]"}
  assert str(jax.typeof(gathered)) == "float32[2,8@expert,32,24@tensor]"


def test_the_gradient_of_a_published_size_has_its_layout():
  """On 256 chips that are not there."""
  config = dataclasses.replace(
      PRESETS["qwen3-30b-a3b"], dtype="bfloat16", remat="full", moe="grouped")
  mesh = jax.sharding.AbstractMesh(
      (8, 8, 4), ("fsdp", "expert", "tensor"),
      axis_types=(jax.sharding.AxisType.Explicit,) * 3)
  with jax.sharding.use_abstract_mesh(mesh):
    model = transformer.abstract(config)
    rows = [jax.ShapeDtypeStruct(
        (128, 1024), jnp.int32, sharding=jax.sharding.NamedSharding(
            mesh, sharding.spec("batch", "length")))] * 3
    loss = lambda model, *rows: model(*rows).astype(jnp.float32).sum()
    grads = jax.eval_shape(jax.grad(loss), model, *rows)
  for w, g in zip(jax.tree.leaves(model), jax.tree.leaves(grads), strict=True):
    assert (g.shape, g.dtype, g.sharding.spec) == (
        w.shape, w.dtype, w.sharding.spec)


@pytest.mark.parametrize("fields,shape,message", [
    (dict(num_experts=6, experts_per_token=2), (1, 1, 4),
     r"num_experts=6 cannot be split over mesh\.expert=4\. Use mesh\.expert=3"),
    (dict(embed=36, num_experts=8, experts_per_token=2), (4, 1, 2),
     r"embed=36 cannot be split over mesh\.fsdp \* mesh\.expert=8\. Use"),
    (dict(), (1, 1, 2), r"mesh\.expert=2 splits experts, and the model has"),
])
def test_a_mesh_that_does_not_divide_the_experts_names_the_key(
    fields, shape, message):
  with jax.set_mesh(meshes.mesh(*shape)), pytest.raises(
      ValueError, match=message):
    transformer.init(build.make_config(**fields), 0)


# What the routers did.


@functools.cache
def traffic(shape=(1, 1, 1)):
  with jax.set_mesh(meshes.mesh(*shape)):
    model = build.load(CONFIG, build.random_params(CONFIG))
    _, found = jax.jit(lambda model, *rows: model.routed(*rows))(
        model, *build.put_rows(*rows_of_four()))
    return sharding.fetch(found)


def test_the_traffic_is_that_of_a_loop_over_tokens():
  """The first layer's router reads what NumPy can tell; padding apart."""
  tokens, positions, segment_ids = rows_of_four()
  with jax.set_mesh(meshes.one()):
    params = numpy_transformer.float64(build.random_params(CONFIG))
  block = {name: w[0] for name, w in params["blocks"].items()}
  load, mass, entropy = np.zeros(8), np.zeros(8), 0.0
  for row in range(len(tokens)):
    order = np.arange(tokens.shape[1])
    same = segment_ids[row][:, None] == segment_ids[row]
    x = params["embedding"][tokens[row]]
    norm = lambda name, x: numpy_transformer.rms_norm(x, block[name], CONFIG)
    x = x + numpy_transformer.attention(
        block, CONFIG, "global", norm("attn_norm", x), positions[row],
        same & (order[:, None] >= order))
    read = norm("mlp_norm", x)
    _, chosen = numpy_transformer.experts(block, CONFIG, read)
    real = segment_ids[row] > 0
    np.testing.assert_array_equal(
        np.sort(traffic().choice[0, row][real]), np.sort(chosen[real]))
    np.add.at(load, chosen[real].ravel(), 1)
    probs = numpy_transformer.softmax(read[real] @ block["router"])
    mass += probs.sum(0)
    entropy -= (probs * np.log(probs)).sum()
  np.testing.assert_array_equal(traffic().load[0], load)
  np.testing.assert_allclose(traffic().mass[0], mass, rtol=1e-5)
  np.testing.assert_allclose(traffic().entropy[0], entropy, rtol=1e-5)
  assert traffic().tokens.tolist() == [(segment_ids > 0).sum()] * 2


def test_the_traffic_is_the_same_on_a_mesh():
  one, eight = traffic(), traffic((2, 2, 2))
  for name in ("choice", "load", "tokens"):
    np.testing.assert_array_equal(getattr(one, name), getattr(eight, name))
  np.testing.assert_allclose(one.mass, eight.mass, rtol=1e-5)


def test_a_model_without_experts_has_no_traffic():
  with jax.set_mesh(meshes.one()):
    config = build.make_config()
    model = build.load(config, build.random_params(config))
    assert model.routed(*build.put_rows(*rows_of_four()))[1] is None
