#!/usr/bin/env python3
"""Runs `posttrain` as N CPU processes on this machine, joined by JAX.

  python launch/local.py --processes=2 --devices-per-process=4 -- \
      train --config=configs/quickstart.py:debug --workdir=runs/two

The words after `--` go to `python -m posttrain` in every process. The same
program then runs as on a pod slice: one process per host, one global mesh.
The first process prints as usual; the lines of the others are prefixed with
their number. When one process fails or is killed it is named, and the rest are
ended. The exit status is that of the process that failed first; preempted (75)
stays 75, and a process that SIGTERM ended before Python ran (143) is preempted.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 60.0  # Between SIGTERM, which saves a checkpoint, and SIGKILL.
PREEMPTED = 75  # State saved; the same command goes on.
LOST = 69  # Status of a process that has lost another one.
LOSS_SECONDS = 3.0  # Time for the lost process to end too.
DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=\S*")


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--devices-per-process", type=int, default=4)
  parser.add_argument(
      "--port", type=int, default=0, help="coordinator's; 0: any free port")
  parser.add_argument(
      "--module", default="posttrain", help="run as python -m MODULE")
  parser.add_argument(
      "--dry-run", action="store_true", help="print the commands and stop")
  parser.add_argument("args", nargs="*", help="passed on; put -- before them")
  options = parser.parse_args(argv)
  for name in ("processes", "devices_per_process"):
    if getattr(options, name) < 1:
      parser.error(
          f"--{name.replace('_', '-')}={getattr(options, name)}: at least 1")
  return options


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def process_environment(
    options: argparse.Namespace, port: int | str, process_id: int,
) -> dict[str, str]:
  """Returns the variables that process `process_id` has on top of this one's.
  """
  flags = DEVICE_COUNT.sub("", os.environ.get("XLA_FLAGS", ""))
  devices = options.devices_per_process
  count = f"--xla_force_host_platform_device_count={devices}"
  return {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": " ".join([*flags.split(), count]),
      "POSTTRAIN_COORDINATOR": f"127.0.0.1:{port}",
      "POSTTRAIN_NUM_PROCESSES": str(options.processes),
      "POSTTRAIN_PROCESS_ID": str(process_id),
  }


def command(options: argparse.Namespace) -> list[str]:
  return [sys.executable, "-m", options.module, *options.args]


def prefix_lines(process: subprocess.Popen, process_id: int) -> None:
  """Copies a process's output to standard error, each line with its number."""
  assert process.stdout is not None
  for line in process.stdout:
    sys.stderr.buffer.write(f"[{process_id}] ".encode() + line)
    sys.stderr.buffer.flush()


def start(
    options: argparse.Namespace, port: int, process_id: int,
) -> tuple[subprocess.Popen, threading.Thread | None]:
  """Starts a process, and a thread that copies its output (not the first's)."""
  first = process_id == 0
  process = subprocess.Popen(
      command(options),
      env=os.environ | process_environment(options, port, process_id),
      stdin=subprocess.DEVNULL,
      stdout=None if first else subprocess.PIPE,
      stderr=None if first else subprocess.STDOUT)
  if first:
    return process, None
  copier = threading.Thread(
      target=prefix_lines, args=(process, process_id), daemon=True)
  copier.start()
  return process, copier


def wait_until(processes: list[subprocess.Popen], deadline: float) -> None:
  while time.monotonic() < deadline and any(
      process.poll() is None for process in processes):
    time.sleep(0.05)


def end(processes: list[subprocess.Popen]) -> None:
  """Sends SIGTERM, and after a minute SIGKILL to those that still run."""
  for process in processes:
    if process.poll() is None:
      process.terminate()
  wait_until(processes, time.monotonic() + GRACE_SECONDS)
  for process in processes:
    if process.poll() is None:
      process.kill()
      process.wait()


def ending(status: int) -> str:
  if status < 0:
    return f"was ended by {signal.Signals(-status).name}"
  return f"ended with status {status}"


def wait(processes: list[subprocess.Popen]) -> int:
  """Waits for all; ends the rest when one fails. Returns the exit status."""
  while True:
    statuses = [process.poll() for process in processes]
    # The lost process may still be ending, and its status is the reason.
    if set(statuses) - {None, 0} == {LOST}:
      wait_until(processes, time.monotonic() + LOSS_SECONDS)
      statuses = [process.poll() for process in processes]
    failed = [(status in (LOST, PREEMPTED), i, status)
              for i, status in enumerate(statuses) if status]
    if failed:
      _, process_id, status = min(failed)
      if status in (PREEMPTED, -signal.SIGTERM):
        # The others are saving too: do not hurry them.
        wait_until(processes, time.monotonic() + GRACE_SECONDS)
        status = PREEMPTED
      else:
        print(f"launch/local.py: process {process_id} {ending(status)}; "
              "ending the others", file=sys.stderr)
      end(processes)
      # A signal's status as a shell reports it, and as sys.exit can.
      return 128 - status if status < 0 else status
    if all(status == 0 for status in statuses):
      return 0
    time.sleep(0.05)


def main(argv: list[str]) -> int:
  options = parse(argv)
  if options.dry_run:
    for process_id in range(options.processes):
      environment = process_environment(
          options, options.port or "PORT", process_id)
      print(shlex.join(
          ["env", *(f"{k}={v}" for k, v in environment.items()),
           *command(options)]))
    return 0
  port = options.port or free_port()
  processes: list[subprocess.Popen] = []
  copiers: list[threading.Thread] = []

  def forward(signum, unused_frame):
    for process in processes:
      if process.poll() is None:
        process.send_signal(signum)

  # Preemption reaches the processes, which save and exit; so this one waits.
  signal.signal(signal.SIGTERM, forward)
  signal.signal(signal.SIGINT, forward)
  try:
    for process_id in range(options.processes):
      process, copier = start(options, port, process_id)
      processes.append(process)
      copiers += [] if copier is None else [copier]
    return wait(processes)
  finally:
    end(processes)
    for copier in copiers:
      copier.join(timeout=5)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
