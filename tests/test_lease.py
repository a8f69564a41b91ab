"""One holder at a time: real processes, real kills, files of other machines."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from posttrain import config as config_lib
from posttrain import lease as lease_lib
from posttrain import workdir as workdir_lib
from posttrain.evaluation import summary
from posttrain.stages import evaluation_cells
from posttrain.telemetry import metrics

ROOT = pathlib.Path(__file__).parents[1]
# Takes the lease of a directory, says so, and holds it until it is told.
HOLD = """
import sys
from posttrain import lease
try:
  request = lease.LeaseRequest(sys.argv[1])
  while (held := request.try_acquire()) is None:
    pass
except lease.HeldError as error:
  print(error, flush=True)
  sys.exit(2)
print("held", flush=True)
sys.stdin.readline()
held.release()
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(lease_lib, "BEAT", 0.05)
  monkeypatch.setattr(lease_lib, "LENGTH", 0.5)
  monkeypatch.setattr(lease_lib, "POLL", 0.02)


def take(path, **options):
  request = lease_lib.LeaseRequest(path, **options)
  while True:
    lease = request.try_acquire()
    if lease is not None:
      return lease


def start(path):
  return subprocess.Popen(
      [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def elsewhere(path, **changes):
  """A lease as another machine would have written it."""
  holder = dataclasses.replace(
      lease_lib._me(path), host="elsewhere", boot="another", token="theirs",
      **changes)
  (path / ".lease").write_bytes(lease_lib._text(holder, 0))
  return holder


class Beating:
  """The heartbeat of a holder on another machine."""

  def __init__(self, path, holder):
    self._path, self._holder, self._stop = path, holder, threading.Event()
    self._thread = threading.Thread(target=self._run)

  def _run(self):
    beats = 0
    while not self._stop.wait(0.05):
      beats += 1
      lease_lib._replace(self._path / ".lease", self._holder, beats)

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._stop.set()
    self._thread.join()


def test_of_eight_processes_that_start_together_one_holds(tmp_path):
  """In a directory that is not there yet; each time another may be first."""
  processes = [start(tmp_path / "run") for _ in range(8)]
  said = [process.stdout.readline() for process in processes]
  [winner] = [i for i, line in enumerate(said) if line == "held\n"]
  for i, process in enumerate(processes):
    if i != winner:
      assert process.wait(30) == 2
      assert f"is held by process {processes[winner].pid} on " in said[i]
      assert "--wait-for-workdir" in said[i]
  processes[winner].communicate("\n")
  assert processes[winner].returncode == 0
  assert list((tmp_path / "run").iterdir()) == []


def test_a_start_that_stands_still_while_it_takes_holds_up_nobody(tmp_path):
  """It has the kernel's lock: who would take over waits, and may leave."""
  with lease_lib._lock(tmp_path) as alone:
    assert alone
    said = []
    request = lease_lib.LeaseRequest(tmp_path, say=said.append)
    assert request.try_acquire() is None
    assert said == [f"{tmp_path} is being taken by another start"]
    elsewhere(tmp_path)
    request.try_acquire()
    assert "for a sign of life" in said[-1]
  assert take(tmp_path) is not None


def test_what_a_killed_holder_leaves_is_taken_at_once(tmp_path):
  """Also before anybody has waited for the dead process (a zombie)."""
  process = start(tmp_path)
  assert process.stdout.readline() == "held\n"
  os.kill(process.pid, signal.SIGKILL)
  deadline = time.monotonic() + 30
  while lease_lib.is_running(process.pid):
    assert time.monotonic() < deadline
  lease = lease_lib.LeaseRequest(tmp_path).try_acquire()  # The first look.
  assert lease is not None
  lease.release()
  process.communicate()


def test_a_process_id_that_was_given_out_again_is_not_the_holder(tmp_path):
  """Process 1 lives; what wrote the lease had another start time."""
  me = lease_lib._me(tmp_path)
  dead = dataclasses.replace(me, pid=1, started=me.started + 10**6)
  (tmp_path / ".lease").write_bytes(lease_lib._text(dead, 3))
  assert lease_lib.LeaseRequest(tmp_path).try_acquire() is not None


def test_a_holder_elsewhere_that_lives_is_found_out(tmp_path):
  said = []
  with Beating(tmp_path, elsewhere(tmp_path)), pytest.raises(
      lease_lib.HeldError, match=r"process \d+ on elsewhere, since 20"):
    take(tmp_path, say=said.append)
  assert len(said) == 1 and "for a sign of life" in said[0]


def test_a_holder_elsewhere_that_is_gone_is_waited_out(tmp_path):
  elsewhere(tmp_path)
  before = time.monotonic()
  lease = take(tmp_path)
  assert 0.5 <= time.monotonic() - before < 5
  lease.check()
  lease.release()
  assert not (tmp_path / ".lease").exists()


def test_waiting_for_a_holder_until_it_dies_or_leaves(tmp_path):
  holder, said = elsewhere(tmp_path), []
  with Beating(tmp_path, holder):
    thread = threading.Timer(1.0, lambda: None)
    request = lease_lib.LeaseRequest(tmp_path, wait=True, say=said.append)
    thread.start()
    while thread.is_alive():
      assert request.try_acquire() is None
  while (lease := request.try_acquire()) is None:
    pass
  assert [line.partition("; ")[2] for line in said] == [
      "waiting up to 0 s for a sign of life", "waiting until it leaves"]
  other = lease_lib.LeaseRequest(tmp_path, wait=True)
  assert other.try_acquire() is None
  lease.release()
  assert other.try_acquire() is not None


def test_a_copy_of_a_workdir_is_not_held(tmp_path):
  """The process lives, but holds another directory."""
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  held = take(tmp_path / "a")
  (tmp_path / "b/.lease").write_bytes((tmp_path / "a/.lease").read_bytes())
  held.release()
  assert take(tmp_path / "b") is not None


@pytest.mark.parametrize("boot", ["", "another"])
def test_without_proc_or_in_another_container_ids_mean_nothing(
    tmp_path, monkeypatch, boot):
  """A live process of that number says nothing: it is watched."""
  me = lease_lib._me(tmp_path)
  other = dataclasses.replace(
      me, token="theirs", namespace="pid:[1]" if boot else "", boot=boot and
      me.boot)
  (tmp_path / ".lease").write_bytes(lease_lib._text(other, 0))
  if not boot:
    monkeypatch.setattr(lease_lib, "PROC", tmp_path / "none")
  assert lease_lib.LeaseRequest(tmp_path).try_acquire() is None
  assert take(tmp_path) is not None


def test_a_holder_that_was_taken_over_finds_out(tmp_path):
  lease = take(tmp_path)
  lease.check()
  theirs = elsewhere(tmp_path)
  with pytest.raises(lease_lib.LostError, match="over by process"):
    lease.check()
  time.sleep(0.3)  # Some heartbeats: none writes over it.
  assert json.loads((tmp_path / ".lease").read_text()) == {
      "holder": dataclasses.asdict(theirs) | {
          "directory": list(theirs.directory)}, "beats": 0}
  lease.release()
  assert (tmp_path / ".lease").exists()


def test_the_heartbeat_finds_out_and_nothing_more_is_written(tmp_path):
  """Also once the one who took it has left again."""
  workdir = workdir_lib.Workdir(tmp_path)
  workdir.lease = lease = take(tmp_path)
  writer = metrics.Writer(
      workdir.metrics, workdir.tensorboard, "reason", restored_step=0,
      check=workdir.check_known_lease)
  writer.write(1, {"loss": 1.0})
  workdir.finish("first", {})
  elsewhere(tmp_path)
  time.sleep(0.5)  # Some heartbeats.
  (tmp_path / ".lease").unlink()
  time.sleep(0.2)
  for write in (
      lambda: writer.write(2, {"loss": 1.0}), lease.check,
      lambda: workdir.finish("reason", {"step": 2}),
      lambda: workdir.write_json("measure/eval/init.json", {}),
      lambda: metrics.Writer(
          workdir.metrics, workdir.tensorboard, "reason", restored_step=0,
          check=workdir.check_known_lease)):
    with pytest.raises(lease_lib.LostError, match="over by process"):
      write()
  writer.close()
  lease.release()
  assert [row["step"] for row in metrics.read(workdir.metrics)] == [1]
  assert {path.name for path in tmp_path.iterdir()} == {
      "metrics.jsonl", "tensorboard", "first"}


def test_no_cell_of_an_evaluation_begins_without_the_lease(tmp_path):
  """Before a heartbeat has found out, and on every host."""
  config = config_lib.load(str(ROOT / "configs/tiny.py"))
  workdir = workdir_lib.Workdir(tmp_path)
  workdir.lease = lease = take(tmp_path)
  kept = evaluation_cells.KeptCells(types.SimpleNamespace(
      section=config.measure, config=config, workdir=workdir,
      directory=tmp_path / "measure"))
  assert kept.read("init", summary.Cell()) is None
  elsewhere(tmp_path)
  with pytest.raises(lease_lib.LostError, match="over by process"):
    kept.read("init", summary.Cell())
  lease.release()


def test_a_heartbeat_is_seen_and_a_lease_that_was_removed_comes_back(tmp_path):
  lease = take(tmp_path)
  beats = lambda: json.loads((tmp_path / ".lease").read_text())["beats"]
  first = beats()
  deadline = time.monotonic() + 30
  while beats() < first + 3:
    assert time.monotonic() < deadline
  (tmp_path / ".lease").unlink()
  while not (tmp_path / ".lease").exists():
    assert time.monotonic() < deadline
  lease.check()
  lease.release()
  assert list(tmp_path.iterdir()) == []


def damages(text):
  rng = random.Random(0)
  yield from (b"", b"\xff\xfe", b"null", b"[]", b"{}", b'{"holder": 3}',
              b"[" * 100_000, text[:len(text) // 2], text + b"x")
  holder = json.loads(text)["holder"]
  for name in holder:
    for value in (None, -1, "x", [], {}, [1, 2, 3], 1e300):
      yield json.dumps(
          {"holder": holder | {name: value}, "beats": 0}).encode()
    yield json.dumps({"holder": {
        key: holder[key] for key in holder if key != name}}).encode()
  for _ in range(200):
    changed = bytearray(text)
    changed[rng.randrange(len(text))] = rng.randrange(256)
    yield bytes(changed)


def test_a_damaged_lease_is_an_unknown_holder(tmp_path, monkeypatch):
  """Waited out; or, where it still says who holds it, a refusal."""
  monkeypatch.setattr(lease_lib, "LENGTH", 0.0)
  monkeypatch.setattr(lease_lib, "POLL", 0.0)
  lease = take(tmp_path)
  text = (tmp_path / ".lease").read_bytes()
  lease.release()
  for damage in damages(text):
    (tmp_path / ".lease").write_bytes(damage)
    try:
      take(tmp_path).release()
    except lease_lib.HeldError as error:
      assert f"process {os.getpid()} on " in str(error)
