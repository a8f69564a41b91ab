"""`posttrain`, with short times for `train.hosts`, and hosts that misbehave.

  python -m tests.stages.hosts_run train --config=tests/stages/sft_run.py ...

With STOP=step:seconds the second process, or that of WHICH, stands still for so
long before it reads the batch of that step (a SIGSTOP, which another process
ends again); with KILL=step it is killed there; with HANG=step:seconds its main
thread sleeps.
"""

import itertools
import os
import signal
import subprocess
import time

from posttrain import __main__, host_connections
from posttrain.data import batches
from posttrain.telemetry import stragglers


def stand_still(seconds: str) -> None:
  me = os.getpid()
  subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {me}"])
  os.kill(me, signal.SIGSTOP)


def misbehave(step: int, act) -> None:
  count, original = itertools.count(1), batches.Batches.__next__

  def next_or_act(self):
    if next(count) == step:
      act()
    return original(self)

  batches.Batches.__next__ = next_or_act


if __name__ == "__main__":
  host_connections.PULSE, host_connections.SILENT = 0.5, 3.0
  stragglers.STUCK = 3.0
  if os.environ["POSTTRAIN_PROCESS_ID"] == os.environ.get("WHICH", "1"):
    if "STOP" in os.environ:
      at, seconds = os.environ["STOP"].split(":")
      misbehave(int(at), lambda: stand_still(seconds))
    if "HANG" in os.environ:
      at, seconds = os.environ["HANG"].split(":")
      misbehave(int(at), lambda: time.sleep(float(seconds)))
    if "KILL" in os.environ:
      misbehave(int(os.environ["KILL"]), lambda: os.kill(
          os.getpid(), signal.SIGKILL))
  __main__.run()
