"""Two real processes of four devices, and what happens when one fails."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import pytest

from posttrain import distributed

ROOT = pathlib.Path(__file__).parents[2]


def arguments(*args):
  return [sys.executable, str(ROOT / "launch" / "local.py"), *args]


def launch(*args, **kwargs):
  return subprocess.run(
      arguments(*args), cwd=ROOT, capture_output=True, text=True, timeout=120,
      **kwargs)


def program(tmp_path, source):
  """A module to run; returns (--module argument, environment)."""
  (tmp_path / "program.py").write_text(source)
  return "--module=program", os.environ | {"PYTHONPATH": str(tmp_path)}


def test_two_processes_of_four_devices_reduce_one_array():
  result = launch(
      "--processes=2", "--devices-per-process=4",
      "--module=tests.launch.reduction")
  assert result.returncode == 0, result.stderr
  # The sum of the squares of 0..63 is 63 * 64 * 127 / 6.
  line = "process {} of 2, 4 of 8 devices, sum 85344.0"
  assert line.format(0) in result.stdout
  assert "[1] " + line.format(1) in result.stderr


def test_what_process_0_finds_out_is_told_to_all():
  """Results and errors; the function is not called on the other at all."""
  result = launch("--processes=2", "--module=tests.launch.first_host")
  assert result.returncode == 0, result.stderr
  mine, its = (
      [line.partition(": ")[2] for line in text.splitlines()
       if line.removeprefix("[1] ").startswith(f"process {number}: ")]
      for number, text in ((0, result.stdout), (1, result.stderr)))
  mine, its = ([text.replace(f"process {n}: ", "") for text in lines]
               for n, lines in ((0, mine), (1, its)))
  errors = ["ValueError: no gold", "WorkdirError: in use",
            "OSError: [Errno 28] No space left"]
  assert mine == ["0 (3, 2) True 5000000 own True", *errors[:2], "Odd: ab",
                  errors[2], "called 4 times", "0 goes on"]
  assert its == ["0 (3, 2) True 5000000 own False", *errors[:2],
                 "RuntimeError: Odd: ab", errors[2], "called 0 times",
                 "0 goes on"]


def test_process_0_may_tell_and_go_on():
  """In order, of any size; what all have read leaves the store."""
  result = launch("--processes=2", "--module=tests.launch.broadcasts")
  assert result.returncode == 0, result.stderr
  for number, text in ((0, result.stdout), (1, result.stderr)):
    said = [line.partition(f"process {number}: ")[2]
            for line in text.splitlines() if "process " in line]
    assert said == [f"True, at once {number == 0}", "True, few keys True",
                    "no more", "0 keys are left"]


def test_dry_run_prints_runnable_commands(monkeypatch):
  monkeypatch.setenv(
      "XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8")
  result = launch(
      "--dry-run", "--processes=2", "--devices-per-process=3", "--port=1234",
      "--", "train", "--config=a b.py:debug", "--config.seed=1")
  assert result.returncode == 0
  commands = [shlex.split(line) for line in result.stdout.splitlines()]
  assert len(commands) == 2
  for process_id, words in enumerate(commands):
    assert words[0] == "env"
    assert "JAX_PLATFORMS=cpu" in words
    assert ("XLA_FLAGS=--xla_a=1 --xla_force_host_platform_device_count=3"
            in words)
    assert "POSTTRAIN_COORDINATOR=127.0.0.1:1234" in words
    assert "POSTTRAIN_NUM_PROCESSES=2" in words
    assert f"POSTTRAIN_PROCESS_ID={process_id}" in words
    assert words[-5:] == [
        "-m", "posttrain", "train", "--config=a b.py:debug", "--config.seed=1"]


def test_a_failure_ends_the_others_and_is_the_exit_status(tmp_path):
  module, environment = program(tmp_path, """
import os, sys, time
if os.environ["POSTTRAIN_PROCESS_ID"] == "1":
  print("no such file")
  sys.exit(3)
time.sleep(600)
""")
  before = time.monotonic()
  result = launch("--processes=3", module, env=environment)
  assert result.returncode == 3
  assert time.monotonic() - before < 30
  assert "[1] no such file" in result.stderr
  assert "process 1 ended with status 3" in result.stderr


def test_a_killed_process_gives_the_status_of_its_signal(tmp_path):
  module, environment = program(tmp_path, """
import os, signal, time
if os.environ["POSTTRAIN_PROCESS_ID"] == "0":
  os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
""")
  result = launch("--processes=2", module, env=environment)
  assert result.returncode == 137
  assert "process 0 was ended by SIGKILL; ending the others" in result.stderr


def test_a_process_that_misses_another_one_is_not_the_reason(tmp_path):
  """A process that is killed closes its connections before it has ended."""
  module, environment = program(tmp_path, """
import os, signal, sys, time
if os.environ["POSTTRAIN_PROCESS_ID"] == "0":
  sys.exit(69)
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
""")
  result = launch("--processes=2", module, env=environment)
  assert result.returncode == 137
  assert "process 1 was ended by SIGKILL" in result.stderr


def test_sigterm_before_python_handles_it_is_a_preemption(tmp_path):
  module, environment = program(tmp_path, """
import os, signal, sys, time
if os.environ["POSTTRAIN_PROCESS_ID"] == "0":
  os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.5)
sys.exit(75)
""")
  assert launch("--processes=2", module, env=environment).returncode == 75


def test_sigterm_reaches_every_process_and_preempted_stays_75(tmp_path):
  module, environment = program(tmp_path, """
import os, pathlib, signal, sys, time
me = os.environ["POSTTRAIN_PROCESS_ID"]
def save(*unused):
  signal.signal(signal.SIGTERM, signal.SIG_DFL)  # A second one would kill.
  time.sleep(0.5 * int(me))  # Process 1 is still saving when 0 has exited.
  pathlib.Path(sys.argv[1], "saved" + me).touch()
  sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "ready" + me).touch()
time.sleep(600)
""")
  process = subprocess.Popen(
      arguments("--processes=2", module, "--", str(tmp_path)), cwd=ROOT,
      env=environment)
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline and not all(
      (tmp_path / f"ready{i}").exists() for i in range(2)):
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 75
  assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_at_least_one_process():
  result = launch("--processes=0")
  assert result.returncode == 2
  assert "--processes=0: at least 1" in result.stderr


def set_environment(monkeypatch, **variables):
  for name in (distributed.COORDINATOR, distributed.NUM_PROCESSES,
               distributed.PROCESS_ID):
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv("POSTTRAIN_" + name, value)


def test_alone_without_a_coordinator(monkeypatch):
  set_environment(monkeypatch)
  distributed.initialize()
  assert jax.process_count() == 1


@pytest.mark.parametrize("variables, message", [
    (dict(NUM_PROCESSES="2"), "NUM_PROCESSES are set, but POSTTRAIN_COORDINA"),
    (dict(COORDINATOR="h:1"), "POSTTRAIN_NUM_PROCESSES is None"),
    (dict(COORDINATOR="h:1", NUM_PROCESSES="2"), "PROCESS_ID is None"),
    (dict(COORDINATOR="h:1", NUM_PROCESSES="2", PROCESS_ID="-1"), "is '-1'"),
    (dict(COORDINATOR="h:1", NUM_PROCESSES="2", PROCESS_ID="2"), "not in 0..1"),
])
def test_an_incomplete_environment_is_an_error(monkeypatch, variables, message):
  set_environment(monkeypatch, **variables)
  with pytest.raises(ValueError, match=re.escape(message)):
    distributed.initialize()


COUNT_THREADS = """
import os
from posttrain import distributed
distributed.initialize(cpu_devices=2)
import jax
jax.block_until_ready(jax.numpy.ones(3))
names = [open(f"/proc/self/task/{thread}/comm").read()
         for thread in os.listdir("/proc/self/task")]
print(jax.device_count(), sum("Eigen" in name for name in names))
"""


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/task").exists(), reason="needs /proc")
def test_devices_that_share_cores_have_threads_to_spare():
  """With as many threads as cores, all can wait for each other."""
  env = {name: value for name, value in os.environ.items()
         if name not in ("PJRT_NPROC", "XLA_FLAGS")}
  devices, threads = map(int, subprocess.run(
      [sys.executable, "-c", COUNT_THREADS], env=env, check=True,
      capture_output=True, text=True).stdout.split())
  assert devices == 2
  assert threads >= os.cpu_count() + 4
