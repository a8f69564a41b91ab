"""Preemption: SIGTERM makes every host leave its loop after the same step.

Cluster schedulers announce an eviction with SIGTERM and grant some seconds.
A stage calls `requested()` once between two steps, on every host; when it is
true, the stage saves a checkpoint and raises `Preempted`, which ends the
process with status 75 (EX_TEMPFAIL of sysexits.h: "try again later"). A rollout
may take longer than the seconds that are granted: between two of its decode
chunks `leave_if_requested()` raises, and the caller of the rollout catches it
and reports what is kept.

Until a process has called `requested` for the first time there is nothing to
save, and SIGTERM ends it at once, with status 75 too: while it imports JAX,
reads weights or compiles. Several processes agree on the step over their
connections (`host_connections`).

A thread takes the signal, since the main one may be waiting for devices, and
those for a host that is gone. A forked child has no part in this: SIGTERM ends
it alone. This module imports the standard library and modules without JAX only,
since it is imported before all else.
"""

import os
import signal
import sys
import threading

from posttrain import host_connections, lease

EXIT_STATUS = host_connections.PREEMPTED

_pipe: tuple[int, int] | None = None
_exit = os._exit  # A run replaces it, see `tasks.exits`.
_received = False
_calls = 0
# The signals that a thread had blocked before its fork; forks of two threads
# may overlap.
_forking = threading.local()


class Preempted(SystemExit):
  """State is saved; left uncaught, the process exits with status 75."""

  def __init__(self, message: str):
    super().__init__(EXIT_STATUS)
    self.message = message

  def __str__(self) -> str:
    return self.message


def install() -> None:
  """Makes SIGTERM a request; call it in the main thread, any number of times.
  """
  global _pipe
  if _pipe is None:
    _pipe = os.pipe()
    os.set_blocking(_pipe[1], False)
    threading.Thread(target=_listen, name="sigterm", daemon=True).start()
  # Python runs signal handlers in the main thread, between two bytecodes: in a
  # call into XLA that may be minutes later. The descriptor is written to at
  # once, in C, by whichever thread the signal comes to.
  signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
  signal.signal(signal.SIGTERM, _handle)


def ignore() -> None:
  """Ignores SIGTERM, so that a process at its end keeps its exit status.
  Python puts the default handler back when it ends, but leaves this.
  """
  signal.signal(signal.SIGTERM, signal.SIG_IGN)


def requested() -> bool:
  """Tests if all hosts save and leave now; every host calls it at every step.

  The count of the calls, rather than the step, is what hosts agree on: it
  goes on rising when the next stage starts at step 0. Once true, it stays so.
  """
  global _calls
  here = host_connections.current()
  if here is not None:
    return here.stop_requested()
  _calls += 1
  return _received


def nothing_to_save() -> None:
  """Declares that there is nothing to save: SIGTERM ends the process at once.
  """
  global _calls
  _calls = 0
  if _received:
    _terminate()


def leave_if_requested() -> None:
  """Raises `Preempted` if SIGTERM has come; every host calls it equally often.
  """
  if requested():
    raise Preempted("SIGTERM within a rollout, which is dropped.")


def _before_fork() -> None:
  """Blocks SIGTERM until the child has handlers of its own.

  A signal to the child before that would be written to the parent's pipe.
  """
  _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
  signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
  """Removes our handler in the child: its pipe is read by the parent.

  A child that calls `install` gets a pipe and a thread of its own.
  """
  global _pipe
  if _pipe is not None:
    signal.set_wakeup_fd(-1)
    if signal.getsignal(signal.SIGTERM) is _handle:
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in _pipe:
      os.close(end)
    _pipe = None
  _after_fork()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork,
    after_in_child=_after_fork_in_child)


def _handle(signum: int, frame: object) -> None:
  """Wakes the thread, if an event loop has replaced the wakeup descriptor."""
  del frame
  assert _pipe is not None
  os.write(_pipe[1], bytes([signum]))


def _listen() -> None:
  assert _pipe is not None
  while True:
    if signal.SIGTERM in os.read(_pipe[0], 64):
      _terminate()


def _terminate() -> None:
  global _received
  _received = True
  here = host_connections.current()
  if here is not None:
    here.terminate()
  elif not _calls:
    print("posttrain: SIGTERM before the first step: nothing is lost, and the "
          "same command starts again.", file=sys.stderr, flush=True)
    lease.release_all()
    _exit(EXIT_STATUS)
