"""Rendezvous of a run's processes, before JAX joins them.

JAX waits for all processes too, but when its time is out it aborts each of them
without saying which one is missing. So process 0 first listens on the
coordinator's address itself, and all processes end with the names of those that
did not connect. The connections stay open, for `host_connections`. This module
uses sockets only.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

SLICES = "POSTTRAIN_SLICES"  # Names of the slices in order, for messages.
HEARING_SECONDS = 5.0  # Time for a caller to say who it is.


class StartError(RuntimeError):
  """Not all processes of a run are there; the message names those missing."""


# Names of the hosts of all processes, and connections, each by process number:
# process 0 has one with each other process, and each of those with process 0.
Answers = tuple[dict[int, str], dict[int, socket.socket]]


def meet(
    coordinator: str, num_processes: int, process_id: int, *,
    seconds: float, bind: str = "",
) -> Answers:
  """Waits until every process has connected; raises in each that has, if not.

  Args:
    coordinator: host:port of process 0.
    seconds: to wait for the others.
    bind: the host that process 0 listens on; "": all of its addresses.

  Raises:
    StartError: processes are missing, or two have one number; names them.
  """
  deadline = time.monotonic() + seconds
  if process_id == 0:
    port = int(coordinator.rpartition(":")[2])
    return _listen((bind, port), num_processes, deadline)
  return _answer(
      coordinator, {"process": process_id, "of": num_processes,
                    "host": socket.gethostname()}, deadline)


def _listen(
    address: tuple[str, int], num_processes: int, deadline: float,
) -> Answers:
  """Accepts the other processes, and tells them all who is there or what is
  wrong.
  """
  hosts = {0: socket.gethostname()}
  callers: dict[int, socket.socket] = {}
  problem = ""
  with socket.create_server(address, backlog=num_processes) as server:
    while not problem and len(callers) < num_processes - 1:
      server.settimeout(max(deadline - time.monotonic(), 0.001))
      try:
        connection, _ = server.accept()
      except TimeoutError:
        problem = _missing(hosts, num_processes)
        break
      caller = _hear(connection)
      if caller is None:
        connection.close()
        continue
      number = caller["process"]
      former = callers.get(number)
      if caller["of"] != num_processes or number == 0 or (
          former is not None and _is_there(former)):
        problem = (
            f"process {number} of {caller['of']} on {caller['host']} is one "
            f"too many: process 0 on {hosts[0]} expects {num_processes} "
            "different ones. Is another run under way?")
        callers[-1] = connection  # So that it is told the problem too.
        break
      callers[number], hosts[number] = connection, caller["host"]
      # A caller that gave up and started again would otherwise count twice: its
      # first connection is still in the backlog.
      if len(callers) == num_processes - 1:
        for gone in [n for n, c in callers.items() if not _is_there(c)]:
          callers.pop(gone).close()
          del hosts[gone]
  for connection in callers.values():
    _tell(connection, problem, hosts)
  if problem:
    raise StartError(problem)
  return hosts, callers


def _hear(connection: socket.socket) -> dict[str, Any] | None:
  """Reads a caller's message; None if it is not from a process of ours."""
  connection.settimeout(HEARING_SECONDS)
  try:
    caller = json.loads(connection.makefile("rb").readline(4096))
    return {"process": int(caller["process"]), "of": int(caller["of"]),
            "host": str(caller["host"])}
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _is_there(connection: socket.socket) -> bool:
  """Tests if a caller is still connected."""
  # A peek takes no byte and does not wait. No byte and no end of the stream
  # means that the other side is there, since it is silent until it is told.
  connection.setblocking(False)
  try:
    return bool(connection.recv(1, socket.MSG_PEEK))
  except BlockingIOError:
    return True
  except OSError:
    return False


def _tell(
    connection: socket.socket, problem: str, hosts: Mapping[int, str],
) -> None:
  """Sends the verdict; if it is a problem, lets the caller close first."""
  connection.settimeout(HEARING_SECONDS)
  verdict = {"problem": problem, "hosts": [hosts[n] for n in sorted(hosts)]}
  with contextlib.suppress(OSError):
    connection.sendall(json.dumps(verdict).encode() + b"\n")
    if problem:
      # Let the caller close first: a connection that is closed with unread
      # bytes is reset, and the message could be lost.
      connection.recv(1)
  if problem:
    connection.close()


def _answer(
    coordinator: str, caller: Mapping[str, str | int], deadline: float,
) -> Answers:
  """Connects to process 0, and returns its answer once all processes are there.
  """
  host, _, port = coordinator.rpartition(":")
  while (left := deadline - time.monotonic()) > 0:

    # A connection is refused until process 0 listens: try again. It may have
    # started later than this process, and its deadline is its own; so the
    # answer may take up to twice the time that is left here.
    verdict = None
    with contextlib.suppress(OSError, ValueError):
      connection = socket.create_connection(
          (host, int(port)), HEARING_SECONDS)
      verdict = _ask(connection, caller, 2 * left + HEARING_SECONDS)
    if verdict is not None:
      if verdict["problem"]:
        connection.close()
        raise StartError(verdict["problem"])
      return dict(enumerate(verdict["hosts"])), {0: connection}
    time.sleep(0.1)
  raise StartError(
      f"{_name(0, int(caller['of']))} did not start, or cannot be reached "
      f"from {caller['host']} at {coordinator}.")


def _ask(
    connection: socket.socket, caller: Mapping[str, str | int], seconds: float,
) -> dict[str, Any] | None:
  """Sends who calls, and reads the verdict of process 0.

  Returns: None if process 0 hangs up; the connection is then closed.
  """
  try:
    connection.sendall(json.dumps(dict(caller)).encode() + b"\n")
    connection.settimeout(seconds)
    # Unbuffered: what follows the line belongs to `host_connections`.
    line = connection.makefile("rb", buffering=0).readline()
    if line.endswith(b"\n"):
      return json.loads(line)
  except BaseException:
    connection.close()
    raise
  connection.close()
  return None


def _missing(hosts: Mapping[int, str], num_processes: int) -> str:
  """Writes the message that names the processes that did not connect."""
  names = {n: _name(n, num_processes) for n in range(num_processes)}
  absent = [name for number, name in names.items() if number not in hosts]
  there = [f"{names[number]} on {host}" for number, host in sorted(
      hosts.items())]
  return (
      f"{len(absent)} of {num_processes} processes did not start: "
      f"{', '.join(absent)}. There are {', '.join(there[:8])}"
      f"{', ...' if len(there) > 8 else ''}. Start the same command on every "
      "host.")


def _name(number: int, num_processes: int) -> str:
  """Names a process, by its slice if the launcher has named the slices."""
  slices = [name for name in os.environ.get(SLICES, "").split(",") if name]
  if not slices or num_processes % len(slices):
    return f"process {number}"
  hosts = num_processes // len(slices)
  return f"worker {number % hosts} of {slices[number // hosts]}"
