"""Connections between the processes of a run: who is alive, and when to stop.

The connections of the rendezvous stay open: process 0 has one with each of the
others. When a process is killed its kernel closes its connection, so that all
notice at once, whatever their programs wait for. A host that loses its power or
its network closes nothing; it counts as lost when it has been silent for
`POSTTRAIN_LOST_SECONDS`. A process that loses another one names it, and ends
with status LOST: a program over all of them cannot go on without one.

Preemption (SIGTERM to any process) is agreed on here too. Every process calls
`stop_requested` at the same points of its loop and counts these calls. Process
0 asks all for their counts, and holds those that call meanwhile; the call after
the highest count is the one at which all stop. Before the first call there is
nothing to save, and all end at once. They also end at once if SIGTERM comes
while a process is silent, since the others may be waiting for it.

Messages are lines of JSON. This module uses sockets only, and one thread.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

LOST = os.EX_UNAVAILABLE  # 69: another process is gone.
PREEMPTED = os.EX_TEMPFAIL  # 75: SIGTERM, and the state is saved.
PULSE = 2.0  # Seconds between two signs of life.
SILENT = 15.0  # Seconds of silence after which a warning is printed.
PARTING = 2.0  # Seconds in which the others may leave by themselves.
FAILING = 5.0  # Seconds until a loss is noticed: more than PULSE + PARTING.


@dataclasses.dataclass
class Peer:
  """Another process, as its messages describe it.

  Attributes:
    heard: the time of its last message.
    waits: seconds for which it had waited for its devices at that time; 0 if it
      did not wait.
    calls: how often it had called `stop_requested` when process 0 asked; None
      before its answer.
    status: the exit status that it has announced; None while it is in the run.
    open: true until its connection is closed.
  """

  number: int
  connection: socket.socket
  heard: float
  buffer: bytes = b""
  waits: float = 0.0
  calls: int | None = None
  status: int | None = None
  open: bool = True


class Connections:
  """This process's end of the connections, and the thread that reads them."""

  def __init__(
      self, number: int, hosts: Mapping[int, str],
      connections: Mapping[int, socket.socket], *, lost_seconds: float,
      waits: Callable[[], float] = lambda: 0.0,
      leave: Callable[[int], Any] = os._exit,
  ):
    """Registers the connections; `start` begins to read them.

    Args:
      number: this process's number.
      hosts: host names of all processes, by number.
      connections: with all others for process 0, with process 0 for the others.
      lost_seconds: how long a process may be silent before it counts as lost.
      waits: returns how long this process has been waiting for its devices.
      leave: ends the process with a status.
    """
    self.number, self._hosts = number, dict(hosts)
    self._lost_seconds, self._waits, self._leave = lost_seconds, waits, leave
    self._selector = selectors.DefaultSelector()
    self._peers: dict[int, Peer] = {}
    for other, connection in connections.items():
      connection.settimeout(FAILING)
      self._peers[other] = Peer(other, connection, time.monotonic())
      self._selector.register(
          connection, selectors.EVENT_READ, self._peers[other])

    self._changed = threading.Condition(threading.RLock())
    self._calls = 0
    self._holding = False
    self._stop_at: int | None = None
    self._terminated = False  # SIGTERM came to this process or another one.
    self._status: int | None = None  # With which this process leaves.
    self._failed: tuple[float, str, int] | None = None

  def start(self) -> "Connections":
    threading.Thread(target=self.run, name="line", daemon=True).start()
    return self

  def name(self, process: int) -> str:
    return f"process {process} ({self._hosts[process]})"

  def silences(self) -> dict[int, float]:
    """Seconds since the last message of each other process in the run."""
    now = time.monotonic()
    with self._changed:
      return {peer.number: now - peer.heard for peer in self._there()}

  def waiting(self) -> dict[int, float]:
    """Seconds for which each process in the run has waited for its devices."""
    with self._changed:
      return {self.number: self._waits()} | {
          peer.number: peer.waits for peer in self._there()}

  def terminate(self) -> None:
    """Records a SIGTERM to this process; may be called from any thread."""
    with self._changed:
      self._terminated = True
      if self.number:  # Process 0 alone decides, whoever has the signal.
        self._send(self._peers[0], "terminated", True)
      else:
        self._hold()

  def stop_requested(self) -> bool:
    """Tests if all processes stop now; all must call this equally often."""
    with self._changed:
      # A process that went on while the counts are collected could pass the
      # call at which the others stop.
      while self._holding and self._stop_at is None:
        self._changed.wait()
      self._calls += 1
      return self._stop_at is not None and self._calls >= self._stop_at

  def part(self, status: int) -> None:
    """Announces this process's exit status, so that it does not count as lost.
    """
    with self._changed:
      self._status = status
      for peer in self._peers.values():
        self._send(peer, "status", status)
      if status not in (0, PREEMPTED):
        self._wait_for_partings()

  def drop(self) -> None:
    """Closes a forked child's copies of the connections.

    Nothing is sent or unregistered, since the connections and the selector's
    state are the parent's too. No lock is taken: the thread that held it does
    not exist in the child.
    """
    for peer in self._peers.values():
      peer.connection.close()
    self._selector.close()

  def _there(self) -> list[Peer]:
    return [peer for peer in self._peers.values() if peer.status is None]

  def run(self) -> None:
    """Reads the connections for as long as the process lives."""
    pulse = time.monotonic()
    while True:
      ready = self._selector.select(max(0.0, pulse - time.monotonic()))
      with self._changed:
        for key, _ in ready:
          self._read(key.data)
        now = time.monotonic()
        if now < pulse:
          continue
        for peer in self._peers.values():
          # A process that was stopped itself (SIGSTOP, a debugger, swapping)
          # must not blame the others for messages that it did not read.
          if now - pulse > PULSE:
            peer.heard = now
          self._send(peer, "waits", self._waits())
        self._check(now)
        pulse = now + PULSE

  def _read(self, peer: Peer) -> None:
    try:
      data = peer.connection.recv(1 << 16)
    except OSError:
      data = b""
    if not data:
      self._selector.unregister(peer.connection)
      peer.connection.close()
      peer.open = False
      if peer.status is None:
        self._lose(peer, "it was killed or has crashed: its connection closed")
      return
    peer.heard = time.monotonic()
    # A message may come in pieces; what follows the last newline is kept.
    *lines, peer.buffer = (peer.buffer + data).split(b"\n")
    for line in lines:
      for kind, value in json.loads(line).items():
        self._take(peer, kind, value)

  def _take(self, peer: Peer, kind: str, value: Any) -> None:
    if kind == "waits":
      peer.waits = value
    elif kind == "terminated":
      self._terminated = True
      self._hold()
    elif kind == "hold":
      self._terminated = self._holding = True
      self._send(peer, "calls", self._calls)
    elif kind == "calls":
      peer.calls = value
      self._decide()
    elif kind == "stop":
      self._stop_at = value
      self._changed.notify_all()
    elif kind == "status":
      self._parted(peer, value)
    elif kind == "end":
      self._end(*value)

  def _hold(self) -> None:
    """Asks all for their counts, and holds them until the stop is decided."""
    if not self._holding:
      self._holding = True
      for peer in self._there():
        self._send(peer, "hold", True)
      self._decide()

  def _decide(self) -> None:
    """Sets the call at which all stop, once every count is known (process 0).
    """
    there = self._there()
    if not self._holding or self._stop_at is not None or any(
        peer.calls is None for peer in there):
      return
    # The furthest process has passed its last call, so all stop at the next.
    calls = max([self._calls, *(peer.calls or 0 for peer in there)])
    if not calls:
      self._end_all("SIGTERM before the first step: nothing is lost, and the "
                    "same command starts again.", PREEMPTED)
      return
    self._stop_at = calls + 1
    for peer in there:
      self._send(peer, "stop", self._stop_at)
    self._changed.notify_all()

  def _parted(self, peer: Peer, status: int) -> None:
    """Ends this process too, unless the other one has finished in good order.
    """
    peer.status = status
    name = self.name(peer.number)
    if status == PREEMPTED and self._stop_at is None:
      self._end_all(f"{name} was preempted. The same command goes on from the "
                    "last checkpoint.", PREEMPTED)
    elif status not in (0, PREEMPTED):
      text = (f"{name} failed with status {status}, and says why. No process "
              "can go on without it.")
      if self.number:  # JAX's coordinator goes with process 0.
        self._end(text, status)
      # A shared cause makes all processes fail alike. Each is given the time to
      # print its own error before it is told that another one has failed.
      self._failed = self._failed or (time.monotonic() + PARTING, text, status)
    if not self.number:
      self._decide()

  def _check(self, now: float) -> None:
    """Ends the run if a process was silent for too long, or has failed."""
    for peer in self._there():
      silent = now - peer.heard
      if silent >= self._lost_seconds:
        self._lose(peer, f"it has not been heard of for {silent:.0f} s")
      elif self._terminated and silent >= SILENT:
        self._end_all(
            f"SIGTERM, and {self.name(peer.number)} has not been heard of for "
            f"{silent:.0f} s. The same command goes on from the last "
            "checkpoint.", PREEMPTED)
    if self._failed and now >= self._failed[0]:
      self._end_all(*self._failed[1:])

  def _lose(self, peer: Peer, why: str) -> None:
    coordinator = "" if peer.number else ", the coordinator,"
    self._end_all(
        f"{self.name(peer.number)}{coordinator} is lost: {why}. Whole "
        "checkpoints are kept, and the same command goes on from the last.",
        PREEMPTED if self._terminated else LOST)

  def _end_all(self, text: str, status: int) -> None:
    """Ends this process; process 0 also tells all others to end."""
    if not self.number:
      for peer in self._there():
        self._send(peer, "end", [text, status])
    self._end(text, status)

  def _end(self, text: str, status: int) -> None:
    if self._status is not None:  # It was leaving, and has printed why.
      self._leave(self._status)
    # One write, so that the lines of several processes do not mix.
    sys.stderr.write(f"posttrain: {text}\n")
    sys.stderr.flush()
    self._wait_for_partings()
    self._leave(status)

  def _wait_for_partings(self) -> None:
    """Lets process 0 wait until the others have closed, for `PARTING` at most.

    JAX aborts those that are still there when its coordinator has gone.
    """
    deadline = time.monotonic() + PARTING
    for peer in self._peers.values() if not self.number else ():
      with contextlib.suppress(OSError):
        while peer.open and (left := deadline - time.monotonic()) > 0:
          peer.connection.settimeout(left)
          peer.open = bool(peer.connection.recv(1 << 16))

  def _send(self, peer: Peer, kind: str, value: Any) -> None:
    if peer.open:
      # A peer that is gone is noticed where its connection is read.
      with contextlib.suppress(OSError):
        peer.connection.sendall(json.dumps({kind: value}).encode() + b"\n")


_current: Connections | None = None


def use(connections: Connections) -> None:
  """Makes these the connections of this process."""
  global _current
  _current = connections


def current() -> Connections | None:
  """Returns the connections of this process; None if it is alone."""
  return _current


def _after_fork_in_child() -> None:
  """Leaves the connections to the parent.

  A child's copy would keep them open when the parent is killed, and the others
  would not notice.
  """
  global _current
  if _current is not None:
    _current.drop()
  _current = None


os.register_at_fork(after_in_child=_after_fork_in_child)


def wait_for_loss() -> None:
  """Gives the thread time to end this process, if another one is lost.

  For an error that may be due to the loss: its own message would mislead.
  """
  if _current is not None:
    time.sleep(FAILING)
