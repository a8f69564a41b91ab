"""Joins the processes of one run into one JAX program.

Every process runs the same command. What differs between them is in the
environment, which `launch/` sets:

  POSTTRAIN_COORDINATOR    host:port of process 0, or "auto" where the machine
                           knows its own cluster (a TPU VM slice)
  POSTTRAIN_NUM_PROCESSES  how many there are      (not with "auto")
  POSTTRAIN_PROCESS_ID     which one this is, 0..  (not with "auto")
  POSTTRAIN_START_SECONDS  how long to wait for the others (300)
  POSTTRAIN_LOST_SECONDS   how long a process may be silent before it counts
                           as lost (100); a killed one is noticed at once
  POSTTRAIN_SLICES         names of the slices, for messages   (optional)

Without POSTTRAIN_COORDINATOR the process is alone and nothing happens.
"""

import ctypes
import os
import pickle
import re
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax._src import distributed as store  # The store has no public name.

from posttrain import host_connections, lease, mistakes, rendezvous, sharding
from posttrain.tasks import exits

T = TypeVar("T")

COORDINATOR = "POSTTRAIN_COORDINATOR"
NUM_PROCESSES = "POSTTRAIN_NUM_PROCESSES"
PROCESS_ID = "POSTTRAIN_PROCESS_ID"
START_SECONDS = "POSTTRAIN_START_SECONDS"
LOST_SECONDS = "POSTTRAIN_LOST_SECONDS"

STORE = "posttrain/first_host/"
PART = 1 << 20  # Bytes of a message, of which gRPC takes 4 MiB.
WAIT_MILLISECONDS = 7 * 24 * 3600 * 1000
# Messages that process 0 may be ahead of the others, and their bytes: the store
# is in the memory of process 0.
MOST_UNREAD = 64
MOST_UNREAD_BYTES = 4 << 20


def initialize(*, cpu_devices: int = 1) -> None:
  """Joins the other processes; call it before anything touches a device.

  Args:
    cpu_devices: how many this process has where there is no accelerator;
      an XLA_FLAGS that says so already (as `launch/local.py` sets) wins.

  Raises:
    ValueError: the environment is incomplete or contradicts itself.
    StartError: not all processes have started in time.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  forced = re.search(r"xla_force_host_platform_device_count=(\d+)", flags)
  if forced:
    cpu_devices = int(forced[1])
  else:
    jax.config.update("jax_num_cpu_devices", cpu_devices)
  spare_threads(cpu_devices)
  coordinator = os.environ.get(COORDINATOR)
  if not coordinator:
    alone = [name for name in (NUM_PROCESSES, PROCESS_ID) if name in os.environ]
    if alone:
      raise ValueError(
          f"{' and '.join(alone)} are set, but {COORDINATOR} is not. Set it to "
          "host:port of process 0, or unset the others.")
    return
  seconds = _integer(START_SECONDS, "300")
  if coordinator == "auto":
    _join(*detect(seconds), seconds=seconds)
    return
  num_processes = _integer(NUM_PROCESSES)
  process_id = _integer(PROCESS_ID)
  if not 0 <= process_id < num_processes:
    raise ValueError(
        f"{PROCESS_ID}={process_id} is not in 0..{num_processes - 1}, which "
        f"{NUM_PROCESSES}={num_processes} needs.")
  # This matters on CPU devices only; gloo is the one that is built in.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # Binding to the given address alone keeps loopback runs off the network.
  _join(coordinator, num_processes, process_id, seconds=seconds,
        bind=coordinator.rpartition(":")[0])


def _join(
    coordinator: str, num_processes: int, process_id: int, *, seconds: int,
    bind: str = "",
) -> None:
  """Waits for all processes, connects them, and joins them in JAX.

  The order matters: JAX's own start would abort without naming who is missing,
  and its detection of a lost process is slower than a closed connection.
  """
  lost_seconds = _integer(LOST_SECONDS, "100")
  hosts, connections = rendezvous.meet(
      coordinator, num_processes, process_id, seconds=seconds, bind=bind)
  host_connections.use(host_connections.Connections(
      process_id, hosts, connections, lost_seconds=lost_seconds,
      waits=sharding.waits, leave=_leave).start())
  delay_aborts()

  # The connections take SIGTERM and notice a lost process first; two services
  # that answer to one signal would stop the hosts at different steps.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
      coordinator, num_processes, process_id,
      coordinator_bind_address=(
          coordinator if bind and process_id == 0 else None),
      # JAX's heartbeat is the second line only: it aborts with a stack trace.
      heartbeat_timeout_seconds=max(100, 2 * lost_seconds))


def delay_aborts() -> None:
  """Gives this process some seconds to end by itself before JAX aborts it.

  JAX aborts as soon as its coordinator has gone, with a stack trace and a
  status that tell nothing. Its client cannot call back into Python, so SIGABRT
  is handled by C's `sleep`, which takes the signal's number, 6, for seconds.
  The abort goes on when it returns.
  """
  c = ctypes.CDLL(None)
  c.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  c.signal.restype = ctypes.c_void_p
  c.signal(signal.SIGABRT, ctypes.cast(c.sleep, ctypes.c_void_p))


def detect(seconds: int) -> tuple[str, int, int]:
  """Asks JAX for the coordinator, the number of processes and this one's.

  Args:
    seconds: to wait for the cluster's metadata.

  Raises:
    ValueError: the machine knows no cluster that it is part of.
  """
  from jax._src import clusters  # JAX gives them to nobody else.
  coordinator, num_processes, process_id, _ = (
      clusters.ClusterEnv.auto_detect_unset_distributed_params(
          None, None, None, None, None, seconds))
  if coordinator is None or num_processes is None or process_id is None:
    raise ValueError(
        f"{COORDINATOR} is auto, and this machine knows no cluster that it is "
        "in. Set it to host:port of process 0, or unset it.")
  return coordinator, num_processes, process_id


def spare_threads(cpu_devices: int) -> None:
  """Raises the number of XLA's threads where CPU devices share the cores.
  A device that waits for another in a collective holds a thread of the pool
  that both use, and so does one that waits for parts of its own product. With
  as many threads as cores all can end up waiting: a run of the quickstart was
  aborted so, on two cores ("Expected 2 threads to join the rendezvous"). The
  threads change no number. Call it before anything touches a device.
  """
  if cpu_devices > 1:
    threads = (os.cpu_count() or 1) + 2 * cpu_devices
    os.environ.setdefault("PJRT_NPROC", str(threads))


def _leave(status: int) -> None:
  """Ends the process at once, and frees its lease for the next start."""
  lease.release_all()
  exits.leave(status)


def on_first_host(function: Callable[[], T], *, wait: bool = True) -> T:
  """Calls a function on process 0 alone, and broadcasts its result.

  For what a host finds out by itself: a judge is asked once rather than once a
  host, and a grader may be late on one of them. Every host has to call this.
  The others wait for as long as it takes, in the coordinator's store, as a
  collective on CPUs gives up after 30 s.

  Args:
    function: needs no other host. What it returns is pickled.
    wait: process 0 waits until all have the result. False: it goes on at once,
      for results that come often, such as the calls that end in each chunk.

  Raises:
    Exception: what it raised there, on every host, so that none is left
      behind in a collective. An exception of a user's class is a RuntimeError
      on the others. Whether it is a user's mistake is for process 0 to tell,
      which has the traceback.
  """
  if jax.process_count() == 1:
    return function()
  # Process 0's time counts as waiting too: otherwise it would look like a
  # straggler, whose own time is longer than the others'.
  with sharding.waiting():
    if jax.process_index() != 0:
      found, failure, is_mistake = pickle.loads(_messages.receive())
      if failure is not None:
        if not is_mistake:
          mistakes.mark_as_none(failure)
        raise failure
      return found
    try:
      found = function()
      outcome = pickle.dumps((found, None, False))
    except Exception as error:
      # The others must get an answer before this host leaves the call.
      _messages.send(pickle.dumps((
          None, _portable(error), mistakes.line(error) is not None)), wait=True)
      raise
    _messages.send(outcome, wait=wait)
    return found


def _portable(error: Exception) -> Exception:
  """Converts an error to one that other hosts can unpickle."""
  try:
    if type(error).__module__.partition(".")[0] in ("builtins", "posttrain"):
      copy = pickle.loads(pickle.dumps(error))
      if type(copy) is type(error) and str(copy) == str(error):
        return copy
  except Exception:  # Its class takes other arguments than it keeps.
    pass
  return RuntimeError(f"{type(error).__name__}: {error}")


class _Messages:
  """Messages of process 0 to all hosts, in the coordinator's store.

  Every host makes the same calls in the same order, so they count alike without
  talking to each other. A key may be deleted only when all have read it, and
  the store would grow with every message if none was. So all wait for each
  other from time to time, when a message says so, and then process 0 deletes
  what was sent until then.
  """

  def __init__(self):
    self._number = 0  # No two messages may share a key.
    self._waits = 0  # Times at which all have waited for each other.
    self._unread = self._unread_bytes = 0

  def send(self, content: bytes, *, wait: bool) -> None:
    """Sends a message, on process 0.

    Args:
      content: of any size.
      wait: until all have read it; otherwise only where too much is unread.
    """
    self._unread += 1
    self._unread_bytes += len(content)
    wait |= (self._unread >= MOST_UNREAD
             or self._unread_bytes >= MOST_UNREAD_BYTES)
    parts = [content[i:i + PART] for i in range(0, len(content), PART)]
    for number, part in enumerate(parts[1:], 1):
      self._client.key_value_set_bytes(f"{self._key}{number}", part)
    # A short message is one round trip: what else it says is in its first part.
    self._client.key_value_set_bytes(
        f"{self._key}0", bytes([wait]) + len(parts).to_bytes(4) + parts[0])
    self._end(wait)

  def receive(self) -> bytes:
    """Reads the next message, on the other hosts."""
    read = lambda number: self._client.blocking_key_value_get_bytes(
        f"{self._key}{number}", WAIT_MILLISECONDS)
    first = read(0)
    content = first[5:] + b"".join(
        read(number) for number in range(1, int.from_bytes(first[1:5])))
    self._end(bool(first[0]))
    return content

  def _end(self, wait: bool) -> None:
    if wait:
      self._client.wait_at_barrier(self._key, WAIT_MILLISECONDS)
      if jax.process_index() == 0:
        self._client.key_value_delete(self._folder)
      self._waits += 1
      self._unread = self._unread_bytes = 0
    self._number += 1

  @property
  def _client(self) -> Any:
    assert store.global_state.client is not None
    return store.global_state.client

  @property
  def _folder(self) -> str:
    return f"{STORE}{self._waits}/"

  @property
  def _key(self) -> str:
    return f"{self._folder}{self._number}/"


_messages = _Messages()


def _integer(name: str, default: str | None = None) -> int:
  value = os.environ.get(name, default)
  if value is None or not value.isdecimal():
    raise ValueError(
        f"{name} is {value!r}, and must be a whole number when {COORDINATOR} "
        "is host:port.")
  return int(value)
