"""Two starts in one workdir: real processes, stopped, killed and resumed."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest

from posttrain import lease as lease_lib
from posttrain.train import checkpoints
from tests import forked, meshes
from tests.stages import sft_run
from tests.stages.test_sft import repeatable, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
ROOT = pathlib.Path(__file__).parents[2]
ARGV = ["train", "--config=tests/stages/sft_run.py",
        "--config.cold_start.eval_every=0",
        "--config.cold_start.checkpoint.every=2"]


class Starts:
  """Starts of the same run in one workdir."""

  def __init__(self, folder):
    self.path, self._folder = folder / "run", folder
    self._processes = []

  def start(self, *more):
    """A process, and the file of what it says."""
    log = self._folder / f"{len(self._processes)}.log"
    log.touch()
    process = forked.start(
        [*ARGV, f"--workdir={self.path}", *more], log,
        self._folder / "compiled")
    self._processes.append(process)
    return process, log

  def end(self):
    for process in self._processes:
      if process.is_alive():
        forked.kill(process)

  def start_and_stop(self, *more):
    """As `start`; it stands still as soon as it holds the workdir."""
    process, log = self.start(*more)
    forked.wait_until(
        process, log, lambda: f'"pid": {process.pid},' in self.holder())
    os.kill(process.pid, signal.SIGSTOP)
    return process, log

  def holder(self):
    file = self.path / ".lease"
    return file.read_text() if file.exists() else ""

  def refuse(self, holder):
    """Another start says who holds it, with status 2."""
    process, log = self.start()
    forked.finish(process, log, status=2)
    assert f"is held by process {holder.pid} on " in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture
def starts(tmp_path):
  found = Starts(tmp_path)
  yield found
  found.end()


def go_on(process, log):
  os.kill(process.pid, signal.SIGCONT)
  forked.finish(process, log)


@pytest.mark.slow
def test_one_of_two_starts_holds_the_workdir(starts, tmp_path):
  """Two fresh ones; then one is killed, and two resume at once."""
  first, log = starts.start_and_stop()
  starts.refuse(first)
  os.kill(first.pid, signal.SIGCONT)
  forked.wait_until(
      first, log, lambda: forked.last_step(starts.path) >= 3)
  forked.kill(first)
  assert 0 < forked.last_step(starts.path) < 12 and starts.holder()
  second, log = starts.start_and_stop()  # Waits for nothing.
  starts.refuse(second)
  waiting, waiting_log = starts.start("--wait-for-workdir")
  forked.wait_until(
      waiting, waiting_log,
      lambda: "waiting until it leaves" in waiting_log.read_text())
  go_on(second, log)
  forked.finish(waiting, waiting_log)
  assert "cold_start: finished, skipped" in waiting_log.read_text()
  assert [row["step"] for row in rows_of(starts.path)] == list(range(1, 13))
  assert not starts.holder()
  alone = Starts(tmp_path / "alone")
  (tmp_path / "alone").mkdir()
  forked.finish(*alone.start())
  assert repeatable(rows_of(alone.path)) == repeatable(rows_of(starts.path))


@pytest.mark.slow
def test_sigterm_gives_the_workdir_back(starts):
  process, log = starts.start("--config.cold_start.num_steps=100000")
  forked.wait_until(
      process, log, lambda: forked.last_step(starts.path) >= 1)
  os.kill(process.pid, signal.SIGTERM)
  forked.finish(process, log, status=75)
  assert not starts.holder()


def test_sigterm_ends_a_start_that_waits(starts):
  request = lease_lib.LeaseRequest(starts.path)
  lease = request.try_acquire()
  process, log = starts.start("--wait-for-workdir")
  forked.wait_until(
      process, log, lambda: "waiting until it leaves" in log.read_text())
  os.kill(process.pid, signal.SIGTERM)
  forked.finish(process, log, status=75)
  assert lease is not None
  lease.check()
  lease.release()


def test_a_holder_that_was_taken_over_writes_no_checkpoint(tmp_path):
  with jax.set_mesh(meshes.one()):
    context = sft_run.make_context(tmp_path)
    request = lease_lib.LeaseRequest(tmp_path)
    context.workdir.lease = lease = request.try_acquire()
    start = sft_run.start(context)
    theirs = lease.holder.__class__(**{
        **vars(lease.holder), "token": "theirs", "host": "elsewhere"})
    (tmp_path / ".lease").write_bytes(lease_lib._text(theirs, 0))
    with pytest.raises(
        lease_lib.LostError, match=r"taken over by process .* on elsewhere"):
      sft_run.sft.run(context, start)
  with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
    checkpoints.find_step(context.workdir.checkpoints("cold_start"))
  lease.release()
  assert (tmp_path / ".lease").exists()


@pytest.mark.slow
def test_every_process_of_a_second_start_learns_that_it_was_refused(tmp_path):
  """This process holds it; none of the two is left in a collective."""
  lease = lease_lib.LeaseRequest(tmp_path).try_acquire()
  result = subprocess.run(
      [sys.executable, "launch/local.py", "--processes=2",
       "--devices-per-process=1", "--", *ARGV, f"--workdir={tmp_path}"],
      cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert result.returncode == 2, result.stderr
  said = f"posttrain: {tmp_path} is held by process {os.getpid()} on "
  assert said in result.stderr
  assert "Traceback" not in result.stderr
  assert list(tmp_path.iterdir()) == [tmp_path / ".lease"]
  lease.release()
