"""Lost processes, and the common stop: in threads, and with real processes."""

import contextlib
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from posttrain import host_connections, lease

ROOT = pathlib.Path(__file__).parents[1]
WITHIN = 15.0  # Seconds after which a loss must be known.


def until(holds, seconds=10.0):
  deadline = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < deadline
    time.sleep(0.005)


class Processes:
  """Ends of a line, and with what each of them has left."""

  def __init__(self, count, *, lost_seconds=60.0, silent=()):
    pairs = {n: socket.socketpair() for n in range(1, count)}
    connections = [{n: pair[0] for n, pair in pairs.items()},
                   *({0: pair[1]} for pair in pairs.values())]
    hosts = {n: f"host-{n}" for n in range(count)}
    self.left: dict[int, int] = {}
    self._connections = connections
    self.lines = [
        host_connections.Connections(n, hosts, connections[n],
            lost_seconds=lost_seconds,
                  leave=lambda status, n=n: self._leave(n, status))
        for n in range(count)]
    for n, one in enumerate(self.lines):
      if n not in silent:
        threading.Thread(target=self._run, args=(one,), daemon=True).start()

  @staticmethod
  def _run(one):
    with contextlib.suppress(SystemExit):  # Of `_leave`.
      one.run()

  def _leave(self, number, status):
    self.left.setdefault(number, status)
    self.close(number)
    raise SystemExit

  def close(self, number):
    """Closes a connection, as the kernel does for a process that is gone."""
    for connection in self._connections[number].values():
      with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)

  def terminate(self, number):
    with contextlib.suppress(SystemExit):
      self.lines[number].terminate()

  def stop(self, number):
    """One gets SIGTERM, and all go on to the step at which they stop."""
    self.ask()
    self.terminate(number)
    while not any(found := self.ask()):
      pass
    assert all(found)

  def ask(self):
    return [one.stop_requested() for one in self.lines]

  def wait(self, numbers):
    until(lambda: set(numbers) <= set(self.left))
    return [self.left[number] for number in numbers]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(host_connections, "PULSE", 0.05)
  monkeypatch.setattr(host_connections, "SILENT", 0.5)
  monkeypatch.setattr(host_connections, "PARTING", 0.3)


@pytest.mark.parametrize("seed", range(12))
def test_all_stop_at_the_same_call(seed):
  """Processes go at their own speeds, and one or all get SIGTERM."""
  rng = random.Random(seed)
  count = rng.randint(1, 5)
  processes = Processes(count)
  asked, stopped = [0] * count, {}

  def loop(number, pause):
    while not processes.lines[number].stop_requested():
      asked[number] += 1
      time.sleep(pause)
    stopped[number] = asked[number]

  threads = [threading.Thread(
      target=loop, args=(n, rng.uniform(0.001, 0.01)), daemon=True)
      for n in range(count)]
  for thread in threads:
    thread.start()
  time.sleep(rng.uniform(0.02, 0.1))
  everyone = list(range(count))
  rng.shuffle(everyone)
  most = max(asked)
  for number in everyone[:rng.choice([1, count])]:
    processes.terminate(number)
  for thread in threads:
    thread.join(10)
  assert len(set(stopped.values())) == 1 and len(stopped) == count, stopped
  assert stopped[0] >= most
  assert not processes.left
  assert all(one.stop_requested() for one in processes.lines)


@pytest.mark.parametrize("which", [0, 2])
def test_before_the_first_call_all_leave_at_once(which, capfd):
  processes = Processes(3)
  processes.terminate(which)
  assert processes.wait(range(3)) == [75, 75, 75]
  assert capfd.readouterr().err.count("before the first step") == 3


@pytest.mark.parametrize("gone, named", [
    (0, "process 0 (host-0), the coordinator, is lost: "),
    (2, "process 2 (host-2) is lost: ")])
def test_a_closed_connection_is_a_lost_process(gone, named, capfd):
  processes = Processes(4, silent=[gone])
  others = [n for n in range(4) if n != gone]
  processes.close(gone)
  assert processes.wait(others) == [69, 69, 69]
  said = capfd.readouterr().err.splitlines()
  assert len(said) == 3 and all(named in text for text in said)


def test_a_loss_after_sigterm_is_a_preemption():
  """When slices are taken away, one host may have no time to save."""
  processes = Processes(3)
  processes.stop(1)
  processes.left[2] = 137
  processes.close(2)
  assert processes.wait([0, 1]) == [75, 75]


def test_one_that_says_nothing_is_lost(capfd):
  processes = Processes(3, lost_seconds=1.0, silent=[1])
  before = time.monotonic()
  assert processes.wait([0, 2]) == [69, 69]
  assert time.monotonic() - before > 0.9
  assert "process 1 (host-1) is lost: it has not been heard of for 1 s" in (
      capfd.readouterr().err)


@pytest.mark.parametrize("silent, gets", [(1, 0), (1, 2), (0, 1)])
def test_sigterm_does_not_wait_for_one_that_says_nothing(silent, gets, capfd):
  processes = Processes(3, silent=[silent])
  for number in {0, 1, 2} - {silent}:
    assert not processes.lines[number].stop_requested()
  processes.terminate(gets)
  # Those that have not heard of SIGTERM hear that process 0 is lost, later.
  others = {0, 1, 2} - {silent} if silent else {gets}
  assert set(processes.wait(others)) == {75}
  assert f"process {silent} (host-{silent}) has not been heard of" in (
      capfd.readouterr().err)


@pytest.mark.parametrize("status", [0, 75])
def test_who_leaves_in_good_order_is_not_lost(status):
  processes = Processes(3)
  if status:
    processes.stop(2)
  for number in (1, 0, 2):
    processes.lines[number].part(status)
    processes.close(number)
  time.sleep(0.3)
  assert set(processes.left.values()) <= {status}


@pytest.mark.parametrize("gone", [0, 1])
def test_a_failure_ends_the_others_with_its_status(gone, capfd):
  processes = Processes(3)
  processes.lines[gone].part(3)
  processes.close(gone)
  assert processes.wait([n for n in range(3) if n != gone]) == [3, 3]
  assert capfd.readouterr().err.count(
      f"process {gone} (host-{gone}) failed with status 3, and says why") == 2


def test_one_that_is_preempted_alone_takes_the_others_along():
  processes = Processes(3)
  processes.lines[1].part(75)
  processes.close(1)
  assert processes.wait([0, 2]) == [75, 75]


def test_who_is_silent_and_who_waits():
  processes = Processes(3, silent=[2])
  processes.lines[1]._waits = lambda: 7.0
  first = processes.lines[0]
  until(lambda: first.silences()[2] > 0.3)
  assert first.silences()[1] < first.silences()[2]
  assert first.waiting() == {0: 0.0, 1: 7.0, 2: 0.0}
  processes.lines[1].part(0)
  until(lambda: set(first.silences()) == {2})
  assert set(first.waiting()) == {0, 2}


def test_a_forked_child_does_not_keep_the_line_of_its_parent():
  ours, theirs = socket.socketpair()
  process = subprocess.Popen(
      [sys.executable, "-c", """if True:
      import os, signal, socket, sys, time
      from posttrain import host_connections as line
      connection = socket.socket(fileno=int(sys.argv[1]))
      line.use(line.Connections(
          1, {0: "a", 1: "b"}, {0: connection}, lost_seconds=60).start())
      child = os.fork()
      if not child:
        time.sleep(60)
      print(child, flush=True)
      sys.stdin.readline()
      os.kill(os.getpid(), signal.SIGKILL)
      """, str(theirs.fileno())], cwd=ROOT, pass_fds=[theirs.fileno()],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  theirs.close()
  assert process.stdin is not None and process.stdout is not None
  child = int(process.stdout.readline())
  try:
    time.sleep(0.5)
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
      assert ours.recv(1 << 16)  # The parent is there, and says so.
    ours.settimeout(10)
    process.stdin.write("\n")
    process.stdin.flush()
    while ours.recv(1 << 16):
      pass
    assert lease.is_running(child)
  finally:
    os.kill(child, signal.SIGKILL)
    process.communicate()


class Run:
  """Real processes of tests/line_run.py, without a launcher."""

  def __init__(self, folder, port, count, *arguments):
    self._files = [(folder / f"{n}.out", folder / f"{n}.err")
                   for n in range(count)]
    self.processes = []
    for number, (out, err) in enumerate(self._files):
      with out.open("w") as stdout, err.open("w") as stderr:
        self.processes.append(subprocess.Popen(
            [sys.executable, "-m", "tests.line_run", *map(str, arguments)],
            cwd=ROOT, stdout=stdout, stderr=stderr, env=os.environ | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
                "POSTTRAIN_COORDINATOR": f"127.0.0.1:{port}",
                "POSTTRAIN_NUM_PROCESSES": str(count),
                "POSTTRAIN_PROCESS_ID": str(number)}))

  def out(self, number):
    return self._files[number][0].read_text().splitlines()

  def err(self, number):
    return self._files[number][1].read_text()

  def wait_for_step(self, number, step):
    until(lambda: str(step) in self.out(number), 120.0)

  def statuses(self, numbers=(0, 1), seconds=120.0):
    return [self.processes[n].wait(seconds) for n in numbers]

  def kill(self):
    for process in self.processes:
      process.kill()
      process.wait()


@pytest.fixture
def start(tmp_path, free_port):
  runs = []

  def start(count, *arguments):
    runs.append(Run(tmp_path, free_port, count, *arguments))
    return runs[-1]

  yield start
  for run in runs:
    run.kill()


@pytest.mark.slow
@pytest.mark.parametrize("count, gone, name", [
    (2, 1, "process 1 ({})"), (3, 2, "process 2 ({})"),
    (2, 0, "process 0 ({}), the coordinator,")])
def test_a_killed_process_is_named_by_the_others(
    start, monkeypatch, count, gone, name):
  if not gone:  # JAX aborts those that have lost its coordinator, and waits.
    monkeypatch.setenv("LATE", "2")
  run = start(count, gone, "kill", 20)
  assert run.processes[gone].wait(120) == -signal.SIGKILL
  others = [n for n in range(count) if n != gone]
  assert set(run.statuses(others, WITHIN)) == {69}
  said = f"posttrain: {name.format(socket.gethostname())} is lost: "
  for number in others:
    assert run.err(number).splitlines()[-1].startswith(said)
    assert "Traceback" not in run.err(number)


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_sigterm_ends_those_that_wait_for_one_that_stands_still(start, gone):
  run = start(2, gone, "stop", 20)
  left = run.processes[1 - gone]
  run.wait_for_step(1 - gone, 19)
  time.sleep(1)
  left.send_signal(signal.SIGTERM)
  assert left.wait(WITHIN) == 75
  assert f"process {gone} ({socket.gethostname()}) has not been heard of" in (
      run.err(1 - gone))


@pytest.mark.slow
@pytest.mark.parametrize("which", [(1,), (0, 1)])
def test_sigterm_to_one_or_all_stops_all_at_one_step(start, which):
  run = start(2, 0, "none", 0)
  run.wait_for_step(0, 30)
  for number in which:
    run.processes[number].send_signal(signal.SIGTERM)
  assert run.statuses() == [75, 75]
  assert run.out(0)[-2:] == run.out(1)[-2:]
  assert run.out(0)[-1] == "saved"


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_one_that_fails_alone_ends_the_others(start, which):
  run = start(2, which, "raise", 20)
  assert run.statuses() == [1, 1]
  assert "RuntimeError: by itself" in run.err(which)
  other = run.err(1 - which)
  assert f"process {which} ({socket.gethostname()}) failed with status 1" in (
      other)
  assert "Traceback" not in other


@pytest.mark.slow
def test_what_fails_on_the_first_host_alone_is_told_by_it(start):
  """A ValueError of somebody else's code is no mistake on any host."""
  run = start(2, 0, "judge", 20)
  assert run.statuses() == [1, 1]
  assert "ValueError: invalid literal for int()" in run.err(0)
  assert "Traceback" in run.err(0)
