"""Oracles: the arrays themselves, a byte-level fault injector, a real kill."""

import gc
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from posttrain import sharding
from posttrain.train import checkpoints, fingerprint
from tests import meshes

EXTRAS = {"iterator": {"epoch": 1, "next": [3, 4]}, "seed": 7}


def state(seed=0):
  rng = np.random.default_rng(seed)
  w = rng.normal(size=(64, 32)).astype(np.float32)
  return {
      "model": {"w": sharding.put(w, "embed", "mlp"),
                "scale": sharding.put(w[0], None)},
      "step": sharding.put(np.int32(seed))}


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a),
               jax.device_get(b))


# Tensorstore drops its reads when an error is raised in the middle of them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning")


@pytest.fixture(autouse=True)
def collect():
  yield
  gc.collect()


@pytest.fixture
def mesh():
  with jax.set_mesh(meshes.eight()) as mesh:
    yield mesh


def test_everything_comes_back_in_its_sharding(tmp_path, mesh):
  rollouts = {
      "tokens": np.arange(6, dtype=np.int32).reshape(2, 3),
      "none": np.zeros((2, 0), np.float32), "ids": np.array(["a", "bc"]),
      "mask": np.array([True, False])}
  tree = state()
  with checkpoints.Checkpoints(tmp_path / "c", keep=2) as saver:
    assert saver.latest_step() is None
    saver.save(3, tree, EXTRAS, rollouts=rollouts)
    found = saver.restore(checkpoints.abstract(tree))
  assert found.step == 3
  assert found.extras == EXTRAS
  assert_equal(found.tree, tree)
  for a, b in zip(jax.tree.leaves(found.tree), jax.tree.leaves(tree),
                  strict=True):
    assert a.sharding == b.sharding
  assert_equal(found.rollouts, rollouts)
  assert found.rollouts["tokens"].dtype == np.int32
  assert checkpoints.read_extras(tmp_path / "c") == EXTRAS


def test_arrays_may_be_donated_while_they_are_being_written(tmp_path, mesh):
  update = jax.jit(
      lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  tree = state()
  kept = jax.device_get(jax.tree.map(jnp.copy, tree))
  with checkpoints.Checkpoints(tmp_path / "c", keep=1) as saver:
    saver.save(1, tree, {})
    for _ in range(5):
      tree = update(tree)
    found = saver.restore(checkpoints.abstract(tree))
  assert_equal(found.tree, kept)


def test_another_mesh_and_a_part_of_the_tree(tmp_path, mesh):
  tree = state()
  with checkpoints.Checkpoints(tmp_path / "c", keep=1) as saver:
    saver.save(1, tree, {})
  one = meshes.one()
  with jax.set_mesh(one):
    wanted = checkpoints.abstract({"model": state(1)["model"]})
    found = checkpoints.restore(tmp_path / "c", wanted)
  assert set(found.tree) == {"model"}
  assert found.tree["model"]["w"].sharding.mesh == one
  assert_equal(found.tree["model"], tree["model"])
  assert found.rollouts is None


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_not_finite_is_never_the_best(tmp_path, mesh, mode):
  """Such as the loss of an update that was skipped."""
  with checkpoints.Checkpoints(
      tmp_path / "c", keep=1, keep_best=1, best_metric="loss",
      best_mode=mode) as saver:
    for step, loss in enumerate(
        (np.nan, 0.5, np.nan, np.inf, -np.inf), start=1):
      saver.save(step, state(step), {}, metrics={"loss": loss})
    saver.wait()
    assert saver.best_step() == 2
    assert saver.steps() == [2, 5]


def test_keeps_the_latest_and_the_best(tmp_path, mesh):
  saver = checkpoints.Checkpoints(
      tmp_path / "c", keep=2, keep_best=1, best_metric="eval_loss",
      best_mode="min")
  with saver:
    for step, loss in enumerate([5.0, 1.0, 4.0, 3.0, 2.0]):
      saver.save(step, state(step), {}, metrics={"eval_loss": loss})
    saver.wait()
    assert saver.best_step() == 1
  assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1", "3", "4"]
  with pytest.raises(FileNotFoundError, match=r"step 2; it has \[1, 3, 4\]"):
    checkpoints.find_step(tmp_path / "c", 2)
  # The ranking survives a restart.
  with checkpoints.Checkpoints(
      tmp_path / "c", keep=1, keep_best=1, best_metric="eval_loss",
      best_mode="min") as saver:
    saver.save(5, state(5), {}, metrics={"eval_loss": 9.0})
    saver.wait()
    assert saver.best_step() == 1
  assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1", "5"]


def test_a_saved_step_is_not_written_twice(tmp_path, mesh):
  with checkpoints.Checkpoints(tmp_path / "c", keep=1) as saver:
    saver.save(1, state(1), {"a": 1})
    saver.save(1, state(2), {"a": 2})
  assert checkpoints.read_extras(tmp_path / "c") == {"a": 1}


def test_errors_of_the_caller(tmp_path, mesh):
  with pytest.raises(ValueError, match=r"checkpoint\.keep is 0"):
    checkpoints.Checkpoints(tmp_path / "c", keep=0)
  with pytest.raises(ValueError, match=r"checkpoint\.best_metric"):
    checkpoints.Checkpoints(tmp_path / "c", keep=1, keep_best=1)
  with pytest.raises(FileNotFoundError, match="does not exist"):
    checkpoints.restore(tmp_path / "none", {})
  with checkpoints.Checkpoints(
      tmp_path / "c", keep=1, keep_best=1, best_metric="reward") as saver:
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
      saver.restore(checkpoints.abstract(state()))
    with pytest.raises(ValueError, match=r"'reward'.*\['loss'\]"):
      saver.save(1, state(), {}, metrics={"loss": 1.0})
    with pytest.raises(ValueError, match="model/w is a tuple"):
      saver.save(1, {"model": {"w": (1, 2)}}, {})
    saver.save(1, state(), {"seed": 1}, metrics={"reward": 1.0})
    wanted = checkpoints.abstract(state())
    wanted["model"]["w"] = jax.ShapeDtypeStruct(
        (64, 16), np.float32, sharding=wanted["model"]["w"].sharding)
    with pytest.raises(
        ValueError, match=r"'model/w' is float32\[64, 32\] there.*\[64, 16\]"):
      saver.restore(wanted)
    wanted["model"] = {"v": wanted["model"]["w"]}
    with pytest.raises(ValueError, match="no array 'model/v'"):
      saver.restore(wanted)
    found = saver.restore(checkpoints.abstract(state()))
  with pytest.raises(ValueError, match="seed=1, and this run has 2"):
    checkpoints.check_same(found, seed=2)


def test_any_flipped_bit_is_an_error_with_the_path_or_harmless(tmp_path):
  """Every file of a checkpoint, some bits each: never other numbers."""
  rng = np.random.default_rng(0)
  with jax.set_mesh(meshes.one()):
    tree = state()
    with checkpoints.Checkpoints(tmp_path / "c", keep=1) as saver:
      saver.save(1, tree, EXTRAS, rollouts={"r": np.arange(50)})
    wanted = checkpoints.abstract(tree)
    damaged = 0
    for file in sorted((tmp_path / "c" / "1").rglob("*")):
      if not file.is_file() or file.stat().st_size == 0:
        continue
      whole = file.read_bytes()
      for _ in range(2):
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(changed)
        try:
          found = checkpoints.restore(tmp_path / "c", wanted)
        except (OSError, ValueError) as error:
          assert str(tmp_path / "c" / "1") in str(error)
          damaged += 1
        else:
          assert_equal(found.tree, tree)
          assert found.extras == EXTRAS
          assert_equal(found.rollouts, {"r": np.arange(50)})
      file.write_bytes(whole)
    assert damaged >= 5


@pytest.mark.parametrize("item", ["state", "extras", "rollouts"])
def test_a_cut_or_missing_file_names_the_path(tmp_path, mesh, item):
  tree = state()
  with checkpoints.Checkpoints(tmp_path / "c", keep=1) as saver:
    saver.save(1, tree, EXTRAS, rollouts={"r": np.arange(1000)})
  # Orbax may hold small arrays twice, so one damaged file may be harmless.
  files = [
      file for file in (tmp_path / "c" / "1" / item).rglob("*")
      if file.is_file()]
  for file in files:
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
  where = str(tmp_path / "c" / "1")
  with pytest.raises(OSError, match=f"{where}.*damaged or missing"):
    checkpoints.restore(tmp_path / "c", checkpoints.abstract(tree))
  for file in files:
    file.unlink()
  with pytest.raises(OSError, match=f"{where}.*damaged or missing"):
    checkpoints.restore(tmp_path / "c", checkpoints.abstract(tree))
  shutil.rmtree(tmp_path / "c" / "1" / item)  # Rollouts may be left out.
  with pytest.raises(OSError, match=f"{where}.*damaged or missing"):
    checkpoints.restore(tmp_path / "c", checkpoints.abstract(tree))


def test_fingerprints():
  """The same on every mesh, another for any changed or moved element."""
  rng = np.random.default_rng(0)
  w = rng.normal(size=(8, 16)).astype(np.float32)
  numbers = set()
  for shape in ((1, 1), (8, 1), (2, 4)):
    with jax.set_mesh(meshes.mesh(*shape)):
      numbers.add(fingerprint.of({"w": sharding.put(w, "embed", "mlp")})["w"])
  assert len(numbers) == 1
  bits = w.view(np.uint32).ravel().astype(object)
  index = np.arange(w.size).astype(object)
  weight = ((index * 2654435761) * 2 + 1)
  assert numbers == {int(np.sum(bits * weight) % 2**32)}
  for dtype in (np.float32, ml_dtypes.bfloat16, np.int32, np.int8, np.bool_):
    x = (w * 10).astype(dtype)
    y = x.copy()
    y[3, 5] = not y[3, 5] if dtype == np.bool_ else y[3, 5] + 1
    a, b = (fingerprint.of({"x": jnp.asarray(v)})["x"] for v in (x, y))
    assert a != b


LOOP = textwrap.dedent("""
    import sys, time, jax, numpy as np
    from posttrain import sharding
    from posttrain.train import checkpoints
    directory, steps = sys.argv[1], int(sys.argv[2])
    with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
      with checkpoints.Checkpoints(directory, keep=2) as saver:
        for step in range(1, steps + 1):
          w = np.full((3_000_000,), step, np.float32)
          w += np.random.default_rng(step).normal(size=w.shape)
          saver.save(step, {"w": sharding.put(w, None)}, {"step": step})
          print(step, flush=True)
""")


def unfinished(directory: pathlib.Path) -> list[str]:
  return [p.name for p in directory.iterdir() if not p.name.isdigit()]


def test_killed_inside_a_write(tmp_path):
  """SIGKILL while Orbax writes: that one is not there, the last whole one is.
  """
  process = subprocess.Popen(
      [sys.executable, "-c", LOOP, str(tmp_path / "c"), "100"],
      env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
      text=True)
  assert process.stdout is not None
  for line in process.stdout:  # `save` has returned; its writing goes on.
    if int(line) == 3:
      break
  deadline = time.time() + 30
  while not unfinished(tmp_path / "c") and time.time() < deadline:
    pass
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  half_written = unfinished(tmp_path / "c")
  assert half_written, "the kill came between two writes"
  with jax.set_mesh(meshes.one()):
    with checkpoints.Checkpoints(tmp_path / "c", keep=2) as saver:
      step = saver.latest_step()
      assert step is not None and step >= 2
      wanted = checkpoints.abstract(
          {"w": sharding.put(np.zeros(3_000_000, np.float32), None)})
      found = saver.restore(wanted)
      saver.save(step + 1, {"w": found.tree["w"]}, {"step": step + 1})
    assert not unfinished(tmp_path / "c")
  w = np.full((3_000_000,), step, np.float32)
  w += np.random.default_rng(step).normal(size=w.shape)
  np.testing.assert_array_equal(found.tree["w"], w)
  assert found.extras == {"step": step}


HOST = textwrap.dedent("""
    import json, pathlib, sys, jax, numpy as np
    index, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    from posttrain import sharding
    from posttrain.train import checkpoints
    from posttrain.train.checkpoint_integrity import DamagedError
    with jax.set_mesh(sharding.make_mesh(fsdp=4, tensor=2)):
      # Large enough to be in files of its own, and not in an index.
      w = np.arange(4096, dtype=np.float32).reshape(64, 64)
      tree = {"w": sharding.put(w, "embed", "mlp"),
              "step": sharding.put(np.int32(4))}
      with checkpoints.Checkpoints(directory, keep=2) as saver:
        saver.save(1, tree, {"a": 1}, rollouts={"r": np.arange(3)})
        saver.save(4, tree, {"a": 4}, rollouts={"r": np.arange(4)})
        found = saver.restore(checkpoints.abstract(tree))
        # What the other host wrote and reads is damaged in a third one.
        saver.save(6, tree, {"a": 6})
        saver.wait()
        files = pathlib.Path(directory, "6/state/ocdbt.process_1").rglob("*")
        for file in files if index == 0 else ():
          if file.is_file():
            file.write_bytes(b"")
        assert sharding.on_any_host(index == 1)  # And all have waited.
        try:
          saver.restore(checkpoints.abstract(tree))
        except DamagedError as error:
          assert ("another host" in str(error)) == (index == 0), error
        else:
          raise AssertionError("a damaged checkpoint was read")
        saver.set_aside(6)
        assert saver.steps() == [4]
        assert saver.restore(checkpoints.abstract(tree)).step == 4
      back = sharding.fetch(found.tree)
      np.testing.assert_array_equal(back["w"], w)
      assert (found.step, found.extras) == (4, {"a": 4})
      np.testing.assert_array_equal(found.rollouts["r"], np.arange(4))
    print(json.dumps({"ok": index}))
""")


def test_two_processes_save_and_restore_and_one_reads_it(tmp_path, free_port):
  env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  hosts = [
      subprocess.Popen(
          [sys.executable, "-c", HOST, str(i), str(free_port),
           str(tmp_path / "c")],
          env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      for i in range(2)]
  for index, host in enumerate(hosts):
    out, err = host.communicate(timeout=120)
    assert host.returncode == 0, err
    assert json.loads(out.splitlines()[-1]) == {"ok": index}
  with jax.set_mesh(meshes.one()):
    wanted = {"w": jax.ShapeDtypeStruct(
        (64, 64), np.float32,
        sharding=sharding.put(np.zeros((64, 64)), "embed", None).sharding)}
    found = checkpoints.restore(tmp_path / "c", wanted)
  np.testing.assert_array_equal(
      found.tree["w"], np.arange(4096, dtype=np.float32).reshape(64, 64))
