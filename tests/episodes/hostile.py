"""Calls that do harm, each within bounds; they can be rewards, too."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

HELD = []
NUM_BYTES = 64 * 2**20  # Of output.


def good(*_, **__):
  return 1.0


def raises(*_, **__):
  raise KeyError("no such key")


def nan(*_, **__):
  return float("nan")


def inf(*_, **__):
  return float("inf")


def huge(*_, **__):
  return 10**400


def string(*_, **__):
  return "1.0"


def a_list(*_, **__):
  return [1.0]


def hangs(*_, **__):
  while True:
    time.sleep(60)


def leaves(*_, **__):
  sys.exit(0)


def leaves_at_once(*_, **__):
  os._exit(0)


def crashes(*_, **__):
  ctypes.string_at(0)


def five_children(*_, **__):
  """Leaves children, of which some are in sessions of their own."""
  for number in range(5):
    subprocess.Popen(["sleep", "600"], start_new_session=number > 2)
  return 1.0


def closes_descriptors(*_, **__):
  os.closerange(0, 4096)
  return 1.0


def floods(*_, **__):
  line = b"y" * 2**16
  for _ in range(NUM_BYTES // len(line)):
    os.write(1, line)
  return 1.0


def holds_2_gb(*_, **__):
  HELD.append(bytes(2 * 10**9))  # Address space alone: it is not touched.
  return 1.0


def forks_on(*_, **__):
  """Forks five times in every process; half of the 31 children return."""
  parent = os.getpid()
  for _ in range(5):
    os.fork()
  if os.getpid() != parent and os.getpid() % 2:
    time.sleep(600)
  return 1.0


def ignores_sigterm(*_, **__):
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  hangs()


def sleeps_after_return(*_, **__):
  """Leaves a thread that ends the process when another call runs."""
  threading.Thread(target=lambda: (time.sleep(1.0), os._exit(7))).start()
  return 1.0


def kills_supervisor(*_, **__):
  os.kill(os.getppid(), signal.SIGKILL)
  time.sleep(5)


def stops_supervisor(*_, **__):
  os.kill(os.getppid(), signal.SIGSTOP)
  time.sleep(5)


# The status of each in a pool; as rewards, the values that are no finite
# numbers become errors.
SEVENTEEN = {
    raises: "error", nan: "error", inf: "error", huge: "ok", string: "ok",
    a_list: "ok", hangs: "timeout", leaves: "error", leaves_at_once: "error",
    crashes: "error", five_children: "ok", closes_descriptors: "error",
    floods: "ok", holds_2_gb: "ok", forks_on: "ok", ignores_sigterm: "timeout",
    sleeps_after_return: "ok",
}
