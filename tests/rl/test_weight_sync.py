"""Oracle: the arrays themselves, bit for bit, on other devices."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.model import transformer
from posttrain.rl import weight_sync
from posttrain.train import trainable
from tests.model import build

PLAN = trainable.Plan(lora=None, pattern="", frozen_dtype="float32")


def meshes(train: dict, sample: dict, devices: int):
  """Of the eight devices, so many sample."""
  sizes = dict(fsdp=-1, tensor=1, expert=1, data=1)
  return sharding.roles_of({
      **sizes, **train, "context": train.get("context", 1), "roles": "split",
      "sampling": {**sizes, **sample, "devices": devices}}, jax.devices()[:8])


LAYOUTS = {
    "as it is": (dict(fsdp=2, tensor=2), dict(fsdp=2, tensor=2), 4),
    "turned": (dict(fsdp=2, tensor=2), dict(fsdp=1, tensor=4), 4),
    "to fewer": (dict(fsdp=6), dict(fsdp=1, tensor=2), 2),
    "to more": (dict(fsdp=2), dict(fsdp=3, tensor=2), 6),
    "from context": (dict(fsdp=2, context=2), dict(data=2, fsdp=2), 4),
    "experts": (dict(fsdp=2, expert=2), dict(fsdp=2, tensor=2), 4)}


def sync_of(config, sampling, **options):
  with jax.set_mesh(sampling):
    like = weight_sync.sampler_dtypes(
        trainable.abstract(config, PLAN)[0],
        **{"weights_dtype": "compute"} | options)
  return like, weight_sync.WeightSync(like, sampling)


@pytest.mark.parametrize("slab", [1, 2**28])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_becomes_every_other(name, slab, monkeypatch):
  monkeypatch.setattr(weight_sync, "SLAB_BYTES", slab)
  train, sample, devices = LAYOUTS[name]
  option = "experts" if name == "experts" else "gemma"
  config = build.make_config(**build.OPTIONS[option] | dict(
      embed=24, mlp=24, kv_heads=4, heads=4))
  training, sampling = meshes(train, sample, devices)
  assert not set(training.devices.flat) & set(sampling.devices.flat)
  like, sync = sync_of(config, sampling)
  with jax.set_mesh(training):
    model = transformer.init(config, 3)
    copy = sync(model)
  for source, wanted, found in zip(*map(
      jax.tree.leaves, (model, like, copy)), strict=True):
    np.testing.assert_array_equal(jax.device_get(found), jax.device_get(source))
    assert found.sharding == jax.NamedSharding(sampling, wanted.sharding.spec)
    assert found.dtype == wanted.dtype
  assert sync.bytes == sum(x.nbytes for x in jax.tree.leaves(copy))


def test_matrices_travel_as_the_sampler_multiplies_by_them():
  config = build.make_config(dtype="bfloat16")
  training, sampling = meshes(dict(), dict(), 4)
  _, sync = sync_of(config, sampling)
  with jax.set_mesh(training):
    model = transformer.init(config, 3)
    copy = sync(model)
  q, norm = copy.blocks.q[...], copy.blocks.attn_norm[...]
  assert q.dtype == jnp.bfloat16 and norm.dtype == jnp.float32
  assert copy.embedding[...].dtype == jnp.float32
  np.testing.assert_array_equal(
      jax.device_get(q), jax.device_get(model.blocks.q[...].astype("bfloat16")))
  whole, _ = sync_of(config, sampling, weights_dtype="int8")
  assert {x.dtype for x in jax.tree.leaves(whole)} == {jnp.dtype("float32")}
  # The next version moves what has changed, and that alone.
  changed = jax.tree.map(lambda w: w, model)
  changed.embedding[...] = model.embedding[...] + 1
  with jax.set_mesh(training):
    again = sync(changed)
  assert sync.bytes == again.embedding[...].nbytes
  assert again.blocks.q[...] is q
  np.testing.assert_array_equal(
      jax.device_get(again.embedding[...]),
      jax.device_get(model.embedding[...]) + 1)


def test_a_damaged_copy_is_found(monkeypatch):
  config = build.make_config()
  training, sampling = meshes(dict(), dict(), 4)
  _, sync = sync_of(config, sampling)
  original = weight_sync.moved

  def damaged(x, like):
    copy = original(x, like)
    if x.shape != (config.padded_vocab_size, config.embed):
      return copy
    with jax.set_mesh(sampling):
      return copy.at[0, 0].add(1e-6, out_sharding=copy.sharding)

  monkeypatch.setattr(weight_sync, "moved", damaged)
  with jax.set_mesh(training), pytest.raises(
      weight_sync.WeightSyncError, match="embedding has the fingerprint 0x"):
    sync(transformer.init(config, 3))


@dataclasses.dataclass(frozen=True)
class Device:
  process_index: int
  id: int


def test_every_process_has_devices_of_both_roles():
  devices = [Device(p, 4 * p + n) for n, p in itertools.product(
      range(4), range(2))]
  first, rest = sharding.split_devices(devices, 3)
  assert [d.id for d in first] == [0, 1, 2, 4, 5, 6]
  assert [d.id for d in rest] == [3, 7]
  with pytest.raises(ValueError, match=r"devices=4 leaves process 0 no device"):
    sharding.split_devices(devices, 4)
