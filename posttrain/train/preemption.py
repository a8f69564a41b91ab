"""SIGTERM -> every host leaves its loop after the same step, with status 75.

Cluster schedulers announce an eviction with SIGTERM and grant some seconds.
A stage asks `requested()` once between two steps, on every host; when it is
true, the stage saves a checkpoint and raises `Preempted`, which ends the
process with status 75 (EX_TEMPFAIL of sysexits.h: "try again later"). Any
other status means finished (0) or failed, and is not worth a restart. A rollout
may last for longer than the seconds that are granted: between two of its chunks
`leave_if_requested()` raises, and whoever asked for the rollout catches it and
says what is kept.

With one process a Python signal handler sets a flag. Under `jax.distributed`
the coordination service catches the signal on whichever host gets it, and
picks a step that no host has begun: no collective, and no cost per step.
"""

import signal
import types

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 75

_received = False
_reached = False
_calls = 0


class Preempted(SystemExit):
  """State is saved; left uncaught, the process exits with status 75."""

  def __init__(self, message: str):
    super().__init__(EXIT_STATUS)
    self.message = message

  def __str__(self) -> str:
    return self.message


def install() -> None:
  """Makes SIGTERM a request; call once, after `jax.distributed.initialize`.

  Under `jax.distributed` this does nothing: JAX has taken the signal, and a
  Python handler would hide it from the coordination service.
  """
  if not jax.distributed.is_initialized():
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(signum: int, frame: types.FrameType | None) -> None:
  del signum, frame
  global _received
  _received = True


def requested() -> bool:
  """Whether to save and leave now. Every host calls this at every step.

  The count of the calls, rather than the step, is what hosts agree on: it
  goes on rising when the next stage starts at step 0. Once true, it stays so.
  """
  global _calls, _reached
  _calls += 1
  if not jax.distributed.is_initialized():
    return _received
  _reached |= multihost_utils.reached_preemption_sync_point(_calls)
  return _reached


def leave_if_requested() -> None:
  """Raises `Preempted` where SIGTERM has come; every host calls it alike."""
  if requested():
    raise Preempted("SIGTERM within a rollout, which is dropped.")
