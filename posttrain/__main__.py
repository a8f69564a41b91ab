"""`python -m posttrain` is the `posttrain` command: a process's start and end.

SIGTERM means "preempted" from the first line on, and is ignored once there is
an exit status. The other processes of a run are told that status, so that this
one does not count as lost.
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
  # Before the other imports, which take seconds: a SIGTERM during them would
  # otherwise kill the process with a status that no launcher restarts.
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
      host_connections.wait_for_loss()
      traceback.print_exc()
      status = FAILED
  finally:
    preemption.ignore()
  if host_connections.current() is not None:
    part(status)
  sys.exit(status)


def part(status: int | str | None) -> None:
  """Tells the other processes the status; ends this one if it has failed.

  A failed process ends without the interpreter's shutdown, in which JAX would
  wait for all processes: those that still need this one would never come.
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
