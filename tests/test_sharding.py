"""Layouts are in the types; a mesh changes where numbers live, not the numbers.
"""

import dataclasses
import functools
import re

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
    hidden, cache, _ = model.extend(
        tokens, tokens, kv.empty(model.config, 4, 10), model.unstacked())
    seen.update(
        hidden=str(jax.typeof(hidden)), k=str(jax.typeof(cache.layers[0].k)),
        positions=str(jax.typeof(cache.positions)),
        logits=str(jax.typeof(model.logits(hidden))))
    return hidden

  seen: dict[str, str] = {}
  with jax.set_mesh(meshes.eight()):
    jax.eval_shape(trace, born(meshes.eight(), 3), *build.put_rows(rows))
  assert seen == {
      "hidden": "float32[4@fsdp,6,32]", "k": "float32[4@fsdp,2@tensor,10,12]",
      "positions": "int32[4@fsdp,10]",
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
    (3, 2), (-1, 3), (4, 1), (-1, -1), (0, -1), (16, 1), (-1, 0), (3, 5)])
def test_a_mesh_that_does_not_fit_names_its_keys(fsdp, tensor):
  """And its advice is followed: what it says to set fits."""
  meshes.eight()
  sizes = dict(fsdp=fsdp, tensor=tensor)
  message = f"mesh.fsdp={fsdp} and mesh.tensor={tensor} do not fit 8 devices"
  with pytest.raises(ValueError, match=message) as caught:
    sharding.make_mesh(**sizes, devices=jax.devices()[:8])
  advised = re.search(r"Set mesh\.(\w+)=-1", str(caught.value))
  assert bool(advised) == ((fsdp, tensor) in ((3, 2), (4, 1), (16, 1)))
  if advised:
    sharding.make_mesh(
        **(sizes | {advised[1]: -1}), devices=jax.devices()[:8])
  elif -1 in (fsdp, tensor):
    assert "sizes beside -1 must multiply to a divisor of 8" in str(
        caught.value)


@pytest.mark.parametrize("fields,shape,message", [
    (dict(kv_heads=3, heads=9), dict(fsdp=1, tensor=2),
     r"kv_heads=3 cannot be split over mesh\.tensor=2\. Use mesh\.tensor=1"),
    (dict(kv_heads=2), dict(fsdp=2, tensor=4),
     r"kv_heads=2 cannot be split over mesh\.tensor=4\. Use mesh\.tensor=2"),
    (dict(kv_heads=4, mlp=50), dict(fsdp=1, tensor=4),
     r"mlp=50 cannot be split over mesh\.tensor=4\. Use mesh\.tensor=2"),
    (dict(embed=36), dict(fsdp=8, tensor=1),
     r"embed=36 cannot be split over mesh\.fsdp=8\. Use mesh\.fsdp=6"),
    (dict(embed=36), dict(fsdp=2, tensor=1, context=4),
     r"embed=36 cannot be split over mesh\.fsdp \* mesh\.context=8\. Use"),
    (dict(kv_heads=6, heads=18), dict(fsdp=1, tensor=2, context=4),
     r"mesh\.context=4 divides neither the 3 kv heads that a part of "
     r"mesh\.tensor=2 has nor the 3 query heads of each.*mesh\.context=3"),
])
def test_a_model_that_a_mesh_does_not_divide_names_the_key(
    fields, shape, message):
  with jax.set_mesh(meshes.mesh(**shape)), pytest.raises(
      ValueError, match=message):
    transformer.init(build.make_config(**fields), 0)


def test_replicas_and_parts_of_the_length_in_the_types():
  """Rows are split over both; parameters rest split over "context" only."""
  mesh = meshes.mesh(fsdp=1, tensor=2, data=2, context=2)
  assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
  with jax.set_mesh(mesh):
    put = lambda *axes: str(jax.typeof(sharding.put(
        np.zeros((8, 8), np.float32), *axes)))
    assert put("batch", "length") == "float32[8@(data,fsdp),8@context]"
    assert put("rows", "slots") == "float32[8@(data,fsdp,context),8]"
    assert put("embed", "mlp") == "float32[8@(fsdp,context),8@tensor]"
    w = sharding.put(np.zeros((8, 8), np.float32), "embed", "mlp")
    gathered = jax.jit(sharding.gather_fsdp)(w)
    assert str(jax.typeof(gathered)) == "float32[8,8@tensor]"
    sizes = sharding.mesh_sizes()
  assert (sizes.parts, sizes.batch, sizes.rows) == (2, 2, 4)


def test_parts_of_a_length_become_rows_and_parts_again():
  array = np.arange(8 * 12 * 3).reshape(8, 12, 3).astype(np.float32)
  with jax.set_mesh(meshes.with_context()):
    x = sharding.put(array, "batch", "length", None)
    rows = jax.jit(sharding.length_to_rows)(x)
    assert str(jax.typeof(rows)) == "float32[16@(fsdp,context),6,3]"
    # Nothing has moved: each device has what it had.
    for before, after in zip(
        x.addressable_shards, rows.addressable_shards, strict=True):
      assert before.device == after.device
      np.testing.assert_array_equal(before.data, after.data)
    back = jax.jit(sharding.rows_to_length)(rows)
    assert jax.typeof(back) == jax.typeof(x)
    np.testing.assert_array_equal(np.asarray(back), array)
    whole = jax.jit(sharding.whole_length)(x)
    assert str(jax.typeof(whole)) == "float32[8@fsdp,12,3]"


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  """A device of some slice, as far as a mesh needs it."""

  id: int
  slice_index: int
  platform: str = "cpu"
  device_kind: str = "fake"
  process_index: int = 0


def test_of_several_slices_the_first_axis_goes_across():
  devices = [FakeDevice(n, n // 8) for n in range(16)]
  slices = lambda **sizes: np.vectorize(lambda d: d.slice_index)(
      sharding.make_mesh(devices=devices, **sizes).devices)
  found = slices(data=2, fsdp=-1, tensor=2)
  assert found.shape == (2, 4, 2)
  assert (found[0] == 0).all() and (found[1] == 1).all()
  found = slices(data=4, context=2)  # Two replicas in each slice.
  assert (found.reshape(4, -1) == [[0], [0], [1], [1]]).all()
  found = slices(fsdp=-1, tensor=4)  # Without replicas "fsdp" does.
  assert (found == [[0], [0], [1], [1]]).all()
  with pytest.raises(ValueError, match=(
      r"mesh\.fsdp=1 cannot be split over the 2 slices .* Set mesh\.data or "
      r"mesh\.fsdp to a multiple of 2")):
    slices(fsdp=1, tensor=16)
