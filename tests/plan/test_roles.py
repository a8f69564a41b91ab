"""Roles on devices of their own, against a real run on eight of a CPU."""

import collections
import functools
import json
import pathlib

import jax
import pytest

from posttrain import config as config_lib
from posttrain import pipeline, sharding
from posttrain.plan import measure, plan, programs, topology
from posttrain.programs import program
from posttrain.programs import transfer as transfer_lib
from posttrain.rl import experience, weight_sync
from posttrain.sampler import decode, prefill
from posttrain.stages import stage, training
from posttrain.train import fingerprint
from tests import meshes

GOLDEN = pathlib.Path(__file__).parent / "golden_config.py"


def split_config():
  """Half of the devices each; the tables are frozen."""
  config = config_lib.read_file(str(GOLDEN))
  config.stages = ("reason",)
  config.model_overrides.update(layers=2, embed=64, mlp=96, head_dim=16)
  config.mesh = dict(fsdp=4, tensor=1, roles="split", sampling=dict(
      devices=4, fsdp=2, tensor=2))
  config.compute.update(remat="none")
  config.reason.update(trained="blocks/.*", num_steps=3, log_every=1)
  return config_lib.resolve(config)


def local_bytes(tree):
  """What one device of those that hold them has of all arrays."""
  return sum(x.addressable_shards[0].data.nbytes
             for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))


@pytest.mark.slow
def test_bytes_are_those_of_a_real_run(tmp_path, monkeypatch):
  meshes.eight()  # Or skips.
  config, real = split_config(), collections.defaultdict(collections.Counter)

  def watch(kind, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
      devices = {d for x in jax.tree.leaves((args, kwargs)) if isinstance(
          x, jax.Array) for d in x.sharding.device_set}
      name = kind
      if kind == "fingerprints":
        name += "_sent" if devices == training_devices else "_arrived"
      real[name][local_bytes((args, kwargs))] += 1
      return function(*args, **kwargs)
    return call

  training_mesh, sampling_mesh = sharding.roles_of(config.mesh)
  training_devices = set(training_mesh.devices.flat)
  assert not training_devices & set(sampling_mesh.devices.flat)
  with jax.set_mesh(training_mesh):
    found = programs.set_up(config)
    planned = list(programs.of_config(found, sampling_mesh))
    [transfer] = programs.transfers(found, sampling_mesh)
  expected = collections.defaultdict(collections.Counter)
  for each in planned:
    size = program.shard_bytes(each.arguments)
    first = each.detail == "first"  # Before the first of three batches only.
    expected[each.kind][size] += 1 if first else 3 * int(each.calls)
    on = {d for x in jax.tree.leaves(each.arguments)
          for d in x.sharding.mesh.devices.flat}
    mesh = sampling_mesh if each.role == program.SAMPLING else training_mesh
    assert on == (set() if each.kind == "empty"  # A scalar of the host alone.
                  else set(mesh.devices.flat)), each.name

  make = training.make_update
  def watched_update(section, loss):
    adamw, update = make(section, loss)
    return adamw, watch("update", update)

  monkeypatch.setattr(training, "make_update", watched_update)
  for module, kind, name in (
      (prefill, "prefill", "feed"), (decode, "unstack", "unstacked"),
      (experience, "ref_logprobs", "sequence_logprobs"),
      (weight_sync, "gather", "gathered"),
      (fingerprint, "fingerprints", "fingerprints")):
    monkeypatch.setattr(module, name, watch(kind, getattr(module, name)))
  pipeline.train(config, str(tmp_path / "run"))

  for kind in ("update", "prefill", "unstack", "ref_logprobs"):
    assert set(real[kind]) == set(expected[kind]), kind
  # The first batch moves what is frozen too, and gathers it besides.
  frozen = [x for x in transfer.arrays if not x.trained]
  assert {x.name for x in frozen} >= {"embedding"}
  for x in frozen:
    expected["gather"][program.shard_bytes([x.sent])] += 1
  for kind in ("fingerprints_sent", "fingerprints_arrived"):
    expected[kind][program.shard_bytes([
        x.cast if kind.endswith("sent") else x.arrived
        for x in transfer.arrays if x.trained])] -= 1  # Of the first batch.
    # Checkpoints take others.
    assert expected[kind] == {
        size: real[kind][size] for size in expected[kind]}, kind
  assert real["gather"] == +expected["gather"]
  rows = [json.loads(line) for line in (
      tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  total = lambda arrays: sum(
      x.arrived.size * x.arrived.dtype.itemsize for x in arrays)
  moved = [x for x in transfer.arrays if x.trained]
  assert [row["perf/weight_sync_bytes"] for row in rows] == [
      total(transfer.arrays), total(moved), total(moved)]


def test_a_training_device_serves_its_share():
  """Of three sampling devices two training devices serve two and one."""
  x = jax.ShapeDtypeStruct((10,), "float32", sharding=(
      jax.sharding.NamedSharding(
          meshes.one(), jax.sharding.PartitionSpec())))
  arrays = [transfer_lib.Array("a", x, x, True),
            transfer_lib.Array("b", x, x, False)]
  for training_count, sampling_count, share in ((2, 3, 2), (3, 1, 1)):
    each = transfer_lib.Transfer(
        "reason", arrays, training_count, sampling_count)
    assert each.received() == 40 and each.received(first=True) == 80
    assert each.sent() == share * 40 and each.sent(first=True) == share * 80


def timed(kind, role, seconds):
  each = program.Program("reason", kind, lambda: None, (), calls=2, role=role)
  return measure.Result(each, None, None, measure.roofline.Times(
      seconds, 0, 0, 0), 1.0)


def test_roles_that_overlap_take_as_long_as_the_slower():
  config = split_config()
  results = [timed("update", program.TRAINING, 3.0),
             timed("decode", program.SAMPLING, 5.0)]
  for staleness, expected in ((0, 16.0), (1, 10.0)):
    config.reason.staleness = staleness
    found = plan.Plan(
        topology.parse("v5e:2x2"),
        {program.TRAINING: {"fsdp": 2}, program.SAMPLING: {"fsdp": 2}},
        stage.Setup(config, None, None, None), results, [], [])
    assert found.step_seconds("reason") == expected
    assert found.role_seconds("reason", program.SAMPLING) == 10.0
