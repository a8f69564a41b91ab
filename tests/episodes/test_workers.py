"""Real processes and real kills; what is left is read from /proc."""

import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest

from posttrain.episodes import frames, workers
from posttrain.episodes.call import Call
from posttrain.episodes.workers import Settings, WorkerPool
from tests.episodes import hostile

HOSTILE = "tests.episodes.hostile:"
MARK = "POSTTRAIN_TEST_OF_WORKERS"
SETTINGS = Settings(num_workers=2)  # Ten seconds: machines may be busy.
ADD = Call("operator:add", (1, 2))


def make(pool, *calls, seconds=30.0):
  """Makes calls, and returns their results in the order of the calls."""
  numbers, found = [pool.submit(call) for call in calls], {}
  deadline = time.monotonic() + seconds
  while len(found) < len(calls):
    assert time.monotonic() < deadline, f"{len(found)} of {len(calls)}"
    found.update(pool.poll(0.1))
  assert pool.pending == 0 and sorted(found) == numbers
  return [found[number] for number in numbers]


def with_variable(name):
  """Lists processes, zombies left out, that have an environment variable."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
    try:
      if name.encode() + b"=" in path.read_bytes():
        found.append(int(path.parent.name))
    except OSError:
      continue
  return found


def of_pool(monkeypatch):
  """Marks the processes that are started from now on; returns their lister."""
  monkeypatch.setenv(MARK, "1")
  return lambda: [pid for pid in with_variable(MARK) if pid != os.getpid()]


def eventually(condition, seconds=5.0):
  deadline = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > deadline:
      return False
    time.sleep(0.01)
  return True


def zombies():
  """Counts the children of this process that have ended without a wait."""
  count = 0
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      state, parent = path.read_text().rpartition(")")[2].split()[:2]
    except OSError:
      continue
    count += state == "Z" and int(parent) == os.getpid()
  return count


@pytest.fixture(scope="module")
def pool():
  with WorkerPool(SETTINGS) as made:
    yield made


def test_results_come_back_with_what_was_printed(pool):
  found = make(
      pool, ADD, Call("builtins:print", ("said",)),
      Call("os:system", ("echo by a child; echo more >&2",)),
      Call("builtins:dict", kwargs={"a": [1, None, "é"]}))
  assert [result.status for result in found] == ["ok"] * 4
  assert [result.value for result in found] == [
      3, None, 0, {"a": [1, None, "é"]}]
  assert [result.output for result in found] == [
      "", "said\n", "by a child\nmore\n", ""]


def test_seventeen_hostile_calls_harm_no_other(monkeypatch):
  mine = of_pool(monkeypatch)
  with WorkerPool(SETTINGS) as pool:
    calls = [Call(HOSTILE + function.__name__,
                  seconds=0.7 if status == "timeout" else None)
             for function, status in hostile.SEVENTEEN.items()]
    found = make(pool, *[call for each in calls for call in (each, ADD)])
    # A supervisor and two workers: orphans are killed, children are reaped.
    assert eventually(lambda: len(mine()) == 3), mine()
    supervisor = pool._process.pid
    peak = pathlib.Path(f"/proc/{supervisor}/status").read_text()
  assert {
      function.__name__: result.status for function, result in zip(
          hostile.SEVENTEEN, found[::2], strict=True)} == {
      function.__name__: status
      for function, status in hostile.SEVENTEEN.items()}
  assert [result.value for result in found[1::2]] == [3] * 17
  floods = found[2 * [*hostile.SEVENTEEN].index(hostile.floods)]
  assert floods.output == "y" * SETTINGS.output_bytes
  # It kept none of the 64 MB.
  kilobytes = int(peak.partition("VmHWM:")[2].split()[0])
  assert kilobytes < 2**16
  assert not mine()


def test_reasons_say_what_happened(pool):
  raises, leaves, at_once, crashes, closes, hangs = make(pool, *(
      Call(HOSTILE + name, seconds=0.5 if name == "hangs" else None)
      for name in ("raises", "leaves", "leaves_at_once", "crashes",
                   "closes_descriptors", "hangs")))
  assert raises.reason == "KeyError: 'no such key'"
  assert 'raise KeyError("no such key")' in raises.output  # The traceback.
  assert leaves.reason == "SystemExit: 0"
  assert at_once.reason == "The worker exited with status 0."
  assert crashes.reason == "The worker was killed by SIGSEGV."
  assert "lost its connection" in closes.reason
  assert hangs.reason == "more than 0.5 s"
  assert 0.5 <= hangs.seconds < 2.0


def test_nothing_is_left_after_200_calls(monkeypatch):
  mine = of_pool(monkeypatch)
  files = len(os.listdir("/proc/self/fd"))
  mixed = [ADD, Call(HOSTILE + "leaves_at_once"), ADD,
           Call(HOSTILE + "five_children"), ADD, Call(HOSTILE + "raises"),
           Call(HOSTILE + "sleeps_after_return"), ADD]
  with WorkerPool(SETTINGS) as pool:
    found = make(pool, *mixed * 25)
    supervisor = pool._process.pid
    assert eventually(lambda: len(mine()) == 3)
    open_there = len(os.listdir(f"/proc/{supervisor}/fd"))
  wanted = ["ok", "error", "ok", "ok", "ok", "error", "ok", "ok"]
  assert [result.status for result in found] == wanted * 25
  assert open_there < 20
  assert len(os.listdir("/proc/self/fd")) == files
  assert not mine()
  assert zombies() == 0


def test_a_deadline_counts_from_the_start_of_its_call():
  """Five calls of 0.2 s on one worker: the last one starts after 0.8 s."""
  with WorkerPool(Settings(num_workers=1, seconds=0.8)) as pool:
    found = make(pool, *[Call("time:sleep", (0.2,))] * 5,
                 Call("time:sleep", (5.0,), seconds=0.2))
  assert [result.status for result in found] == ["ok"] * 5 + ["timeout"]


def test_a_deadline_is_kept_while_nobody_polls(monkeypatch, tmp_path):
  mine, begun = of_pool(monkeypatch), tmp_path / "begun"
  with WorkerPool(SETTINGS) as pool:
    make(pool, ADD)
    pool.submit(Call("os:system", (
        f"touch {begun}; sleep 600 & setsid sleep 600",), seconds=0.4))
    assert eventually(lambda: begun.exists() and len(mine()) == 3)
    [(_, result)] = pool.poll()
  assert result.status == "timeout"


def test_imports_have_a_deadline_of_their_own(tmp_path):
  module = tmp_path / "slow_to_import.py"
  module.write_text(
      "import time\n"
      "time.sleep(0.3)\n"
      "def judge():\n"
      "  return prepared\n"
      "def prepare():\n"
      "  global prepared\n"
      "  time.sleep(0.3)\n"
      "  prepared = True\n"
      "judge.prepare = prepare\n"
      "def dispatch(name):\n"
      "  from posttrain.tasks import loading\n"
      "  return loading.load_function(name)()\n"
      "dispatch.imports = lambda name: [name]\n")
  other = tmp_path / "quick.py"
  other.write_text(module.read_text().replace("\ntime.sleep(0.3)", ""))
  with WorkerPool(Settings(num_workers=1, seconds=0.5)) as pool:
    found = make(
        pool, Call(f"{module}:judge"),
        Call(f"{other}:dispatch", (f"{other}:judge",)))
    # A new worker imports them before it is given a call.
    make(pool, Call("os:_exit", (0,)))
    found += make(pool, Call(f"{module}:judge", seconds=0.4))
  assert [result.value for result in found] == [True] * 3, found
  assert max(result.seconds for result in found) < 0.5


def test_what_cannot_be_sent_is_an_error_of_that_call(pool):
  deep = []
  for _ in range(10**4):
    deep = [deep]
  found = make(
      pool, Call("builtins:repr", (lambda: 0,)), Call("builtins:set"),
      Call("operator:mul", ("x", frames.MAX_RESULT)),
      Call("no_module:f"), Call("operator:no_function"), Call("no name"),
      Call("builtins:len", (deep,)), Call("operator:mul", ("x", 10**6)),
      Call("builtins:len", (bytes(2**23),)), Call("builtins:chr", (0xd800,)))
  assert [result.status for result in found] == ["error"] * 7 + ["ok"] * 3
  assert [result.value for result in found[-3:]] == [
      "x" * 10**6, 2**23, "\ud800"]
  for result, words in zip(found, (
      "cannot be sent", "not JSON", "bytes as JSON", "no module 'no_module'",
      "no function 'no_function'", "names no function", "cannot be sent"),
      strict=False):
    assert words in result.reason


@pytest.mark.parametrize("body, words", [
    (b'["ok", NaN, ""]', "JSON has no NaN"),
    (b'["ok", -Infinity, ""]', "JSON has no -Infinity"),
    (b'["fine", 1, ""]', "no status"), (b'["ok", 1, 2]', "no status"),
    (b'[["ok"], 1, ""]', "no status"), (b'["ok", 1]', "not enough"),
    (b'["ok", ' + b"[" * 200 + b"]" * 200 + b', ""]', "nested more than 100"),
    (b'["ok", ' + b"[" * 9999 + b"]" * 9999 + b', ""]', "recursion"),
    (b"7", "int")])
def test_what_cannot_be_recorded_is_no_result(body, words):
  """Records are JSON, of which a journal and a report have a part."""
  found = workers._result(frames.Frame(frames.DONE, 1, 0.5, b"said", body))
  assert found.status == "error" and found.output == "said"
  assert words in found.reason


def test_many_open_files_do_not_matter():
  """`select.select` fails from descriptor 1024 on."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
  files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
  try:
    with WorkerPool(SETTINGS) as pool:
      assert pool._channel.socket.fileno() > 1023
      assert make(pool, ADD)[0].value == 3
  finally:
    for file in files:
      os.close(file)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_memory_is_limited():
  half = Settings(num_workers=1, memory_bytes=2**29)
  with WorkerPool(half) as pool:
    taken, added = make(pool, Call("builtins:bytearray", (2**30,)), ADD)
  assert (taken.status, taken.reason) == ("error", "MemoryError")
  assert added.value == 3


@pytest.mark.slow
def test_workers_that_do_not_start_end_the_run(monkeypatch, capfd):
  monkeypatch.setattr(workers, "_START", workers._START.replace(
      "import supervisor",
      "import worker, supervisor\nworker.serve = None"))
  with WorkerPool(Settings(num_workers=1)) as pool, pytest.raises(
      RuntimeError, match="3 times in a row without a call"):
    make(pool, ADD)
  assert "5 worker processes in a row did not start" in capfd.readouterr().err


def test_output_belongs_to_the_call_that_printed_it(pool):
  """Also where calls are sent ahead, and where workers are replaced."""
  says = [Call("builtins:print", (number,)) for number in range(300)]
  for at in range(20, 300, 40):
    says[at] = Call("os:system", (f"echo {at}; sleep 600 &",))
  found = make(pool, *says)
  assert [result.output for result in found] == [
      f"{number}\n" for number in range(300)]


def test_a_call_is_not_kept_waiting_behind_a_slow_one(pool):
  make(pool, *[ADD] * 50)  # The workers are quick: calls are sent ahead.
  slow = pool.submit(Call("time:sleep", (0.5,)))
  others = {pool.submit(ADD) for _ in range(20)}
  ended = []
  while pool.pending:
    ended += pool.poll(1.0)
  assert ended[-1][0] == slow
  assert {number for number, _ in ended[:-1]} == others


def test_the_call_behind_is_not_blamed(tmp_path):
  """The first one leaves what kills the worker when the next one runs."""
  module = tmp_path / "poison.py"
  module.write_text(
      "import os\n"
      "poisoned = False\n"
      "def poison():\n"
      "  global poisoned\n"
      "  poisoned = True\n"
      "def innocent():\n"
      "  if poisoned: os._exit(3)\n"
      "  return 1\n")
  with WorkerPool(Settings(num_workers=1)) as pool:
    found = make(pool, Call(f"{module}:poison"),
                 *[Call(f"{module}:innocent")] * 3)
  assert [result.value for result in found] == [None, 1, 1, 1]


def test_cancel_forgets_calls_and_ends_workers(monkeypatch):
  mine = of_pool(monkeypatch)
  with WorkerPool(Settings(seconds=60.0)) as pool:
    for _ in range(10):
      pool.submit(Call("os:system", ("sleep 600",)))
    assert eventually(lambda: len(mine()) >= 5)
    pool.cancel()
    assert (pool.pending, pool.poll(1.0)) == (0, [])
    assert make(pool, ADD)[0].value == 3
    assert eventually(lambda: len(mine()) == 3)
    for number in range(20):  # Also workers that are about to start.
      for _ in range(3):
        pool.submit(Call("os:getpid"))
      pool.submit(Call("time:sleep", (600,)))
      time.sleep(0.002 * number)
      pool.cancel()
      time.sleep(0.001 * number)
      if number % 3 == 0:
        assert make(pool, ADD)[0].value == 3
    pool.submit(Call(HOSTILE + "hangs"))
  assert not mine()


def test_a_call_that_kills_the_supervisor_is_found(monkeypatch):
  mine, said = of_pool(monkeypatch), []
  kills = Call(HOSTILE + "kills_supervisor")
  with WorkerPool(SETTINGS, said.append) as pool:
    first = pool._process.pid
    found = make(
        pool, *[Call("time:sleep", (0.05,))] * 3, kills, ADD, kills,
        *[Call("time:sleep", (0.05,))] * 3)
    assert pool._process.pid != first
    assert eventually(lambda: len(mine()) == 3)
  assert [result.status for result in found] == [
      "ok", "ok", "ok", "error", "ok", "error", "ok", "ok", "ok"]
  assert "ended the supervisor" in found[3].reason
  assert any("kills_supervisor" in line for line in said)
  assert not mine()


@pytest.mark.slow
def test_a_call_that_stops_the_supervisor_is_found(monkeypatch):
  monkeypatch.setattr(workers, "ASK_SECONDS", 0.2)
  monkeypatch.setattr(workers, "SILENT_SECONDS", 0.5)
  with WorkerPool(Settings(num_workers=1)) as pool:
    found = make(pool, ADD, Call(HOSTILE + "stops_supervisor"), ADD)
  assert [result.status for result in found] == ["ok", "error", "ok"]


def test_a_supervisor_that_does_not_start_ends_the_run(monkeypatch):
  monkeypatch.setattr(workers, "_START", "raise SystemExit(3)")
  with WorkerPool(SETTINGS) as pool, pytest.raises(
      RuntimeError, match=r"3 times in a row without a call.*status 3"):
    make(pool, ADD)


def test_signals_to_all_change_no_result(monkeypatch):
  """As a launcher or a scheduler sends them when a run is to end."""
  mine = of_pool(monkeypatch)
  with WorkerPool(SETTINGS) as pool:
    make(pool, ADD)
    asked = {pool.submit(Call("time:sleep", (0.3,))) for _ in range(2)}
    time.sleep(0.1)
    before = sorted(mine())
    for number in (signal.SIGTERM, signal.SIGINT):
      for pid in before:
        os.kill(pid, number)
    ended = []
    while pool.pending:
      ended += pool.poll(1.0)
    assert sorted(mine()) == before
  assert {(number, result.status) for number, result in ended} == {
      (number, "ok") for number in asked}


def test_a_killed_run_leaves_no_process(monkeypatch, tmp_path):
  mine = of_pool(monkeypatch)
  ready = tmp_path / "ready"
  script = (
      "import time\n"
      "from posttrain.episodes.workers import *\n"
      "pool = WorkerPool(Settings(seconds=600.0))\n"
      "pool.submit(Call('tests.episodes.hostile:ignores_sigterm'))\n"
      "pool.submit(Call('os:system', ("
      f"'setsid sleep 600 & touch {ready}; sleep 600',)))\n"
      "time.sleep(600)\n")
  run = subprocess.Popen([sys.executable, "-c", script])
  assert eventually(ready.exists, 20.0)
  assert len(mine()) >= 6
  run.kill()
  run.wait()
  assert eventually(lambda: not mine()), mine()


def test_it_needs_no_jax():
  subprocess.run([sys.executable, "-c", (
      "import sys\n"
      "from posttrain.episodes import supervisor, workers\n"
      "assert not {'jax', 'flax'} & set(sys.modules)\n")], check=True)


def test_results_come_in_the_order_in_which_the_calls_end():
  with WorkerPool(Settings(num_workers=3)) as pool:
    make(pool, *[ADD] * 3)
    numbers = [pool.submit(Call("time:sleep", (seconds,)))
               for seconds in (0.35, 0.2, 0.05)]
    time.sleep(0.5)
    assert [number for number, _ in pool.poll()] == numbers[::-1]


def test_frames_survive_any_cut():
  sent = [frames.Frame(frames.JOB, 2**40, 0.5, b"a:b", bytes(1000)),
          frames.Frame(frames.PING),
          frames.Frame(frames.DONE, 3, 1e9, b"", b"x")]
  data = b"".join(map(frames.encode, sent))
  for step in (1, 7, 25, 10**6):
    buffer, found = bytearray(), []
    for at in range(0, len(data), step):
      buffer += data[at:at + step]
      while frame := frames.take(buffer, 2000):
        found.append(frame)
    assert found == sent and not buffer
  with pytest.raises(ValueError, match="no frame"):
    frames.take(bytearray(data), 999)
  with pytest.raises(ValueError, match="no frame"):
    frames.take(bytearray(b"?" * 30), 2**40)
