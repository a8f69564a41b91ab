"""Layouts are in the types; a mesh changes where numbers live, not the numbers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.model import cache as kv
from posttrain.model import transformer
from posttrain.model.presets import PRESETS
from tests import meshes
from tests.model import build

EVERYTHING = build.make_config(**build.OPTIONS["everything"])

LAYOUTS = {
    "embedding": "float32[128@tensor,32@fsdp]",
    "head": "float32[32@fsdp,128@tensor]",
    "final_norm": "float32[32]",
    "blocks/attn_norm": "float32[2,32]",
    "blocks/mlp_norm": "float32[2,32]",
    "blocks/q": "float32[2,32@fsdp,2@tensor,2,12]",
    "blocks/k": "float32[2,32@fsdp,2@tensor,12]",
    "blocks/v": "float32[2,32@fsdp,2@tensor,12]",
    "blocks/o": "float32[2,2@tensor,2,12,32@fsdp]",
    "blocks/q_bias": "float32[2,2@tensor,2,12]",
    "blocks/k_bias": "float32[2,2@tensor,12]",
    "blocks/v_bias": "float32[2,2@tensor,12]",
    "blocks/q_norm": "float32[2,12]",
    "blocks/k_norm": "float32[2,12]",
    "blocks/gate": "float32[2,32@fsdp,48@tensor]",
    "blocks/up": "float32[2,32@fsdp,48@tensor]",
    "blocks/down": "float32[2,48@tensor,32@fsdp]",
}


@functools.lru_cache
def born(mesh, seed):
  with jax.set_mesh(mesh):
    return transformer.init(EVERYTHING, seed)


def layouts(model):
  leaves = jax.tree.leaves_with_path(transformer.to_dict(model))
  return {jax.tree_util.keystr(path, simple=True, separator="/"):
          str(jax.typeof(leaf)) for path, leaf in leaves}


def test_parameters_are_born_in_their_layout():
  assert layouts(born(meshes.eight(), 3)) == LAYOUTS


def test_the_gradient_has_the_layout_of_the_parameters():
  """On a mesh of 256 chips that is not there, at a published size."""
  config = dataclasses.replace(
      PRESETS["qwen3-32b"], dtype="bfloat16", remat="full")
  mesh = jax.sharding.AbstractMesh(
      (32, 8), ("fsdp", "tensor"),
      axis_types=(jax.sharding.AxisType.Explicit,) * 2)
  with jax.sharding.use_abstract_mesh(mesh):
    model = transformer.abstract(config)
    rows = [jax.ShapeDtypeStruct(
        (64, 1024), jnp.int32, sharding=jax.sharding.NamedSharding(
            mesh, sharding.spec("batch", "length")))] * 3
    loss = lambda model, *rows: model(*rows).astype(jnp.float32).sum()
    grads = jax.eval_shape(jax.grad(loss), model, *rows)
  for w, g in zip(
      jax.tree.leaves(model), jax.tree.leaves(grads), strict=True):
    assert (g.shape, g.dtype, g.sharding.spec) == (
        w.shape, w.dtype, w.sharding.spec)


def test_a_seed_gives_the_same_weights_on_any_mesh():
  one, eight, other = (
      sharding.fetch(born(mesh, seed)) for mesh, seed in (
          (meshes.one(), 3), (meshes.eight(), 3), (meshes.one(), 4)))
  jax.tree.map(np.testing.assert_array_equal, one, eight)
  assert not np.array_equal(one.embedding[...], other.embedding[...])


def test_activations_and_cache_are_split_by_rows_and_heads():
  rows = np.ones((4, 6), int)

  def trace(model, tokens):
    hidden, cache = model.prefill(tokens, tokens, tokens)
    cache = kv.resize(kv.fan_out(cache, 3), 10)
    seen.update(
        hidden=str(jax.typeof(hidden)), k=str(jax.typeof(cache.layers[0].k)),
        positions=str(jax.typeof(cache.positions)),
        logits=str(jax.typeof(model.logits(hidden))))
    return hidden

  seen: dict[str, str] = {}
  with jax.set_mesh(meshes.eight()):
    jax.eval_shape(trace, born(meshes.eight(), 3), *build.put_rows(rows))
  assert seen == {
      "hidden": "float32[4@fsdp,6,32]", "k": "float32[12@fsdp,2@tensor,10,12]",
      "positions": "int32[12@fsdp,10]",
      "logits": "float32[4@fsdp,6,128@tensor]"}


def test_gather_keeps_the_tensor_split():
  with jax.set_mesh(meshes.eight()):
    w = jax.jit(lambda: sharding.shard(jnp.zeros((8, 16)), "embed", "mlp"))()
    assert str(jax.typeof(w)) == "float32[8@fsdp,16@tensor]"
    w = jax.jit(sharding.gather_fsdp)(w)
    assert str(jax.typeof(w)) == "float32[8,16@tensor]"


def test_put_and_fetch_are_inverse():
  array = np.arange(48, dtype=np.float32).reshape(8, 6)
  with jax.set_mesh(meshes.eight()):
    placed = sharding.put(array, "batch", "vocab")
    assert str(jax.typeof(placed)) == "float32[8@fsdp,6@tensor]"
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 3)}
    back = sharding.fetch({"a": placed})["a"]
    assert sharding.axis_size("batch") == 4
    assert sharding.axis_size("mlp") == 2
    assert sharding.axis_size("length") == 1
  np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("sizes,shape", [
    (dict(fsdp=-1, tensor=1), (8, 1)), (dict(fsdp=-1, tensor=2), (4, 2)),
    (dict(fsdp=2, tensor=-1), (2, 4)), (dict(fsdp=8, tensor=1), (8, 1))])
def test_minus_one_is_what_is_left(sizes, shape):
  meshes.eight()  # Skips where there are fewer devices.
  mesh = sharding.make_mesh(**sizes, devices=jax.devices()[:8])
  assert tuple(mesh.shape.values()) == shape


@pytest.mark.parametrize("fsdp,tensor", [
    (3, 2), (-1, 3), (4, 1), (-1, -1), (0, -1), (16, 1), (-1, 0), (-2, -4)])
def test_a_mesh_that_does_not_fit_names_its_keys(fsdp, tensor):
  meshes.eight()
  message = f"mesh.fsdp={fsdp} and mesh.tensor={tensor} do not multiply"
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(fsdp, tensor, devices=jax.devices()[:8])


@pytest.mark.parametrize("fields,shape,message", [
    (dict(kv_heads=3, heads=9), (1, 2),
     r"kv_heads=3 cannot be split over mesh\.tensor=2\. Use mesh\.tensor=1"),
    (dict(kv_heads=2), (2, 4),
     r"kv_heads=2 cannot be split over mesh\.tensor=4\. Use mesh\.tensor=2"),
    (dict(kv_heads=4, mlp=50), (1, 4),
     r"mlp=50 cannot be split over mesh\.tensor=4\. Use mesh\.tensor=2"),
    (dict(embed=36), (8, 1),
     r"embed=36 cannot be split over mesh\.fsdp=8\. Use mesh\.fsdp=6"),
])
def test_a_model_that_a_mesh_does_not_divide_names_the_key(
    fields, shape, message):
  with jax.set_mesh(meshes.mesh(*shape)), pytest.raises(
      ValueError, match=message):
    transformer.init(build.make_config(**fields), 0)
