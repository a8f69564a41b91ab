"""Processes that add over all of them, step by step; one may misbehave.

  python -m tests.line_run WHICH ACT STEP [SECONDS]

The beginning and the end are those of `posttrain`; between them is a loop of
collectives instead of a pipeline. Process WHICH does ACT before that step:
"kill" and "stop" (stand still) are signals, "raise" is an exception, "hang" is
a main thread that sleeps, and "none" is nothing. "judge" is what fails in
`on_first_host`, which all call.
"""

import os
import signal
import time

import numpy as np

from posttrain import (
  __main__,
  distributed,
  host_connections,
  mistakes,
  sharding,
)
from posttrain.cli import arguments, main
from posttrain.train import preemption

STEPS = 4000


def act(what: str, seconds: float) -> None:
  if what == "raise":
    raise RuntimeError("by itself")
  if what == "hang":
    time.sleep(seconds)
  elif what not in ("none", "judge"):
    os.kill(os.getpid(), dict(
        kill=signal.SIGKILL, stop=signal.SIGSTOP)[what])


def work(argv: list[str]) -> int:
  which, what, at, *seconds = argv
  distributed.initialize()
  for step in range(1, STEPS):
    if step == int(at) and which == os.environ["POSTTRAIN_PROCESS_ID"]:
      act(what, float(seconds[0]) if seconds else 0.0)
    if step == int(at) and what == "judge":
      distributed.on_first_host(lambda: int("no number"))
    sharding.of_all_hosts(np.array(step))
    print(step, flush=True)
    if preemption.requested():
      print("saved", flush=True)
      raise preemption.Preempted("saved")
    time.sleep(0.005)
  return 0


if __name__ == "__main__":
  host_connections.PULSE, host_connections.SILENT = 0.3, 2.0
  if "LATE" in os.environ:  # As on a machine that is busy.
    lose = host_connections.Connections._lose
    host_connections.Connections._lose = lambda *arguments: (
        time.sleep(float(os.environ["LATE"])), lose(*arguments))
  # Nobody's code but ours is between the command line and `on_first_host`.
  mistakes.LIBRARIES += (os.path.dirname(__file__),)
  arguments.parse = lambda argv: ("work", argv)
  main.VERBS["work"] = work
  __main__.run()
