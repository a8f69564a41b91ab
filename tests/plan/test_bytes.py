"""Oracle: the arrays of a real run on eight devices of a CPU."""

import collections
import pathlib

import jax
import pytest

from posttrain import config as config_lib
from posttrain import pipeline, sharding
from posttrain.plan import programs
from posttrain.programs import program as program_lib
from posttrain.rl import experience
from posttrain.sampler import decode, prefill
from posttrain.stages import training
from tests import meshes

GOLDEN = pathlib.Path(__file__).parent / "golden_config.py"


def small_config():
  config = config_lib.read_file(str(GOLDEN))
  config.model_overrides.update(layers=2, embed=64, mlp=96, head_dim=16)
  config.mesh.update(fsdp=4, tensor=2)
  config.compute.update(dtype="float32", remat="none")
  config.reason.num_minibatches = 2  # Old logprobs, and later updates.
  config.reason.rollout.update(cache_dtype="int8", weights_dtype="int8")
  config.reason.loss.importance_sampling = "truncate"
  return config_lib.resolve(config)


def local_bytes(tree):
  """What the first device holds of all arrays that are on devices."""
  return sum(
      x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)
      if isinstance(x, jax.Array))


@pytest.mark.slow
def test_logical_bytes_are_those_of_a_real_run(tmp_path, monkeypatch):
  meshes.eight()  # Or skips.
  config, real = small_config(), collections.defaultdict(set)

  def watch(kind, function):
    def call(*args, **kwargs):
      real[kind].add(local_bytes((args, kwargs)))
      return function(*args, **kwargs)
    return call

  def watched_update(section, loss, make=training.make_update):
    adamw, update = make(section, loss)
    return adamw, watch("update", update)

  planned = collections.defaultdict(set)
  with jax.set_mesh(sharding.make_mesh(4, 2)):
    for program in programs.of_config(programs.set_up(config)):
      kind = program.kind.replace("later_update", "update")
      planned[kind].add(program_lib.shard_bytes(program.arguments))
      if program.kind == "old_logprobs":
        beside = program_lib.shard_bytes(program.beside)
  assert beside > 0

  monkeypatch.setattr(training, "make_update", watched_update)
  for module, kind, name in (
      (prefill, "prefill", "feed"), (prefill, "place", "place"),
      (decode, "unstack", "unstacked"), (decode, "decode", "decode"),
      (decode, "resize", "resize"),
      (experience, "logprobs", "sequence_logprobs")):
    monkeypatch.setattr(module, name, watch(kind, getattr(module, name)))
  pipeline.train(config, str(tmp_path / "run"))

  planned["logprobs"] = planned.pop("old_logprobs") | planned.pop(
      "ref_logprobs")
  # These take no array of the devices, or what others take too.
  assert set(real) == set(planned) - {"empty", "done", "begin"}
  for kind in ("update", "prefill", "unstack", "logprobs"):
    assert real[kind] == planned[kind], kind
  # Rows may be done before the last size.
  for kind in ("decode", "resize", "place"):
    assert real[kind] <= planned[kind], kind
  assert len(real["update"]) == 3  # Of SFT, and with and without old logprobs.


def test_what_is_offloaded_is_beside_no_program():
  """The optimizer and the reference of GRPO; SFT has no phases."""
  config = small_config()
  def found():
    with jax.set_mesh(meshes.one()):
      return list(programs.of_config(programs.set_up(config)))
  before = found()
  with config.unlocked():
    config.compute.offload = ("reference", "optimizer")
  for a, b in zip(before, found(), strict=True):
    assert a.name == b.name and not a.waiting
    names = {"reference", "optimizer"} if a.stage == "reason" else set()
    assert set(b.waiting) == names & set(a.beside), a.name
    assert set(b.beside) == set(a.beside) - names
    assert program_lib.shard_bytes(b.waiting) + program_lib.shard_bytes(
        b.beside) == program_lib.shard_bytes(a.beside)
  feed = next(p for p in before if p.name.startswith("reason/prefill"))
  assert {"reference", "optimizer"} <= set(feed.beside)
