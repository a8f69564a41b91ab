"""Real signals to real processes; hosts must leave after the same step."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from posttrain.train import preemption

ALONE = textwrap.dedent("""
    import time
    from posttrain.train import preemption
    preemption.install()
    for step in range(1, 10_000):
      print(step, flush=True)
      if preemption.requested():
        print("saved", flush=True)
        raise preemption.Preempted(f"preempted after step {step}")
      time.sleep(0.01)
""")

HOST = textwrap.dedent("""
    import sys, time, jax
    import numpy as np
    from posttrain import distributed, sharding
    from posttrain.train import checkpoints, preemption
    preemption.install()
    distributed.initialize()
    with jax.set_mesh(sharding.make_mesh(2, 1)):
      add = jax.jit(lambda x: x + x.sum())
      x = sharding.put(np.zeros(2, np.float32), "batch")
      with checkpoints.Checkpoints(sys.argv[1], keep=1) as saver:
        # Two stages: the step starts again at one in the second.
        for step in [*range(1, 30), *range(1, 2000)]:
          x = add(x)
          print(step, flush=True)
          if step % 10 == 0:
            saver.save(step, {"x": x}, {})
          if preemption.requested():
            saver.save(step, {"x": x}, {})
            saver.close()
            raise preemption.Preempted("preempted")
          time.sleep(0.005)
""")


def start(code, *arguments, env=None):
  return subprocess.Popen(
      [sys.executable, "-c", code, *arguments], env=env,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sigterm_saves_and_exits_with_75():
  process = start(ALONE)
  assert process.stdout is not None
  while int(process.stdout.readline()) < 5:
    pass
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  assert out.splitlines()[-1] == "saved", err
  assert process.returncode == preemption.EXIT_STATUS == 75
  assert preemption.EXIT_STATUS == os.EX_TEMPFAIL


def test_two_hosts_leave_after_the_same_step(tmp_path, free_port):
  """Only the second host gets the signal, in its second stage."""
  env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
      "POSTTRAIN_COORDINATOR": f"localhost:{free_port}",
      "POSTTRAIN_NUM_PROCESSES": "2"}
  hosts = [
      start(HOST, str(tmp_path / "c"),
            env=env | {"POSTTRAIN_PROCESS_ID": str(i)}) for i in range(2)]
  second = hosts[1].stdout
  assert second is not None
  steps = (int(line) for line in second if line.strip().isdigit())
  assert [next(steps) for _ in range(29 + 8)][-1] == 8
  hosts[1].send_signal(signal.SIGTERM)
  last = []
  for host in hosts:
    out, err = host.communicate(timeout=120)
    assert host.returncode == 75, err
    last.append([line for line in out.splitlines() if line.isdigit()][-1])
  assert last[0] == last[1]
  assert int(last[0]) < 1000
  assert [p.name for p in (tmp_path / "c").iterdir()] == [last[0]]


def test_sigterm_ends_a_process_at_once_before_its_first_step():
  """While its main thread is in C, as it is when it compiles."""
  process = start(
      "from posttrain.train import preemption; preemption.install(); "
      "import hashlib; print(flush=True); "
      "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10 ** 8)")
  assert process.stdout is not None
  process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=10)
  assert process.returncode == preemption.EXIT_STATUS
  assert "SIGTERM before the first step" in err


def handles_sigterm(process):
  """Tests if the kernel has a handler for it."""
  status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
  caught = next(line.split()[1] for line in status.splitlines()
                if line.startswith("SigCgt:"))
  return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3, 1.0])
def test_sigterm_while_the_command_begins_is_a_preemption(tmp_path, delay):
  """Imports take seconds; the handler is there before them."""
  process = subprocess.Popen(
      [sys.executable, "-m", "posttrain", "train",
       "--config=configs/tiny.py:debug", f"--workdir={tmp_path / 'run'}"],
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"})
  started = time.monotonic()
  while not handles_sigterm(process):
    assert time.monotonic() - started < 60 and process.poll() is None
  time.sleep(delay)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=30)
  assert process.returncode == 75, err
  assert err == (
      "posttrain: SIGTERM before the first step: nothing is lost, and the same "
      "command starts again.\n")


ENDS = textwrap.dedent("""
    import atexit, sys, time
    from posttrain import __main__
    from posttrain.cli import main
    from posttrain.train import preemption
    class Late:
      def __del__(self):
        print("late", flush=True)
        time.sleep(1)
    def run(argv):
      global kept
      kept = Late()
      preemption.requested()
      print("the last line", flush=True)
      return int(sys.argv[1])
    atexit.register(time.sleep, 0.5)
    main.main = run
    __main__.run()
""")


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize("after", ["the last line", "late"])
def test_sigterm_after_the_last_line_changes_no_status(after, status):
  """Python's own end takes the handler away, and has an exit status then."""
  process = start(ENDS, str(status))
  assert process.stdout is not None
  assert after in iter(lambda: process.stdout.readline().strip(), "")
  while process.poll() is None:
    process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
  assert process.returncode == status


FORKS = textwrap.dedent("""
    import multiprocessing, os, signal, sys, threading, time
    from posttrain.train import preemption
    def children(context):
      for _ in range(20):  # Some have not run a line when the signal comes.
        child = context.Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join()
        assert child.exitcode == -signal.SIGTERM
      pool = context.Pool(2)
      pool.map_async(time.sleep, [60, 60])
      time.sleep(0.3)
      pool.terminate()
      pool.join()
    preemption.install()
    thread = threading.Thread(
        target=children, args=(multiprocessing.get_context("fork"),))
    thread.run() if sys.argv[1] == "main" else thread.start()
    thread.ident and thread.join()
    time.sleep(0.3)
    print(preemption.requested(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    while not preemption.requested():
      time.sleep(0.01)
    print("its own", flush=True)
""")


@pytest.mark.parametrize("thread", ["main", "other"])
def test_sigterm_to_a_forked_child_ends_that_child_alone(thread):
  process = start(FORKS, thread)
  try:
    out, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert (process.returncode, out) == (0, "False\nits own\n"), err


def test_a_forked_child_may_take_sigterm_for_itself():
  process = start(textwrap.dedent("""
      import os, signal, time
      from posttrain.train import preemption
      preemption.install()
      preemption.requested()
      child = os.fork()
      if not child:
        preemption.install()
        os.kill(os.getpid(), signal.SIGTERM)
        while not preemption.requested():
          time.sleep(0.01)
        os._exit(5)
      assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
      time.sleep(0.3)
      print(preemption.requested())
  """))
  try:
    out, err = process.communicate(timeout=30)
  finally:
    process.kill()
  assert (process.returncode, out) == (0, "False\n"), err


def test_the_message_is_for_people():
  assert str(preemption.Preempted("saved at 3")) == "saved at 3"
  assert preemption.Preempted("x").code == 75
