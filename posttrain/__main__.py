"""`python -m posttrain` is the `posttrain` command.

A process's beginning and its end, around `main.main`. SIGTERM means "preempted"
from the first line on, and nothing any more once there is an exit status. The
other processes of a run are told that status, so that this one is not lost.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from posttrain import host_connections
from posttrain.train import preemption

FAILED = 1
INTERRUPTED = 128 + signal.SIGINT


def run(argv: Sequence[str] | None = None) -> NoReturn:
  """Runs a command, and ends the process with its status."""
  preemption.install()
  from posttrain.cli import main
  try:
    status: int | str | None = main.main(argv)
  except SystemExit as error:
    status = error.code
  except BaseException as error:
    if host_connections.current() is None:
      raise
    status = INTERRUPTED
    if not isinstance(error, KeyboardInterrupt):
      host_connections.hear_out()
      traceback.print_exc()
      status = FAILED
  finally:
    preemption.ignore()
  if host_connections.current() is not None:
    part(status)
  sys.exit(status)


def part(status: int | str | None) -> None:
  """Tells the other processes; ends this one if it has failed.

  JAX would wait for all of them before it lets a process go, and those that a
  failed one has left do not come.
  """
  if isinstance(status, str):
    print(status, file=sys.stderr)
  code = status if isinstance(status, int) else FAILED if status else 0
  sys.stdout.flush()
  sys.stderr.flush()
  here = host_connections.current()
  assert here is not None
  here.part(code)
  if code not in (0, preemption.EXIT_STATUS):
    os._exit(code)


if __name__ == "__main__":
  run()
