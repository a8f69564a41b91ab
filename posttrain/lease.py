"""Lease of a workdir: one holder at a time, by a file with a heartbeat.

The file `.lease` of a workdir names its holder: host, process, since when, and
a counter that the holder raises every `BEAT` seconds. Another start finds out
if the holder is alive:

  on this machine     at once, by the process's id and start time, within one
                      boot and one namespace of processes
  on another machine  by watching the file. If it changes, the holder is alive;
                      if it has not changed for `LENGTH` seconds, the lease is
                      taken over. Clocks of two machines are never compared.

A file that cannot be read as a lease is watched in the same way. A lease is
released when its holder exits, on SIGTERM too; what SIGKILL leaves behind is
taken over as above. A holder that stood still or could not write for that long
may find its lease taken over. It notices at its next heartbeat, and stops at
its next row of metrics or result (`Lease.check_known`), or before its next
checkpoint (`Lease.check`).

A lock of the kernel orders starts that take the lease at the same moment. On
local disks it orders all of them, on NFS and buckets those of one machine. Two
machines that take over one dead lease there within a second can both go on,
until the one that wrote first reads the file again.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

NAME = ".lease"
BEAT = 10.0  # Seconds between two heartbeats.
# Above the minute for which NFS and gcsfuse may show an old file.
LENGTH = 120.0
POLL = 0.5  # Seconds between two reads of a lease that is watched.
LEAVING = 2.0  # Seconds to wait for a heartbeat that is being written.
PROC = pathlib.Path("/proc")


class HeldError(ValueError):
  """Somebody else holds the workdir."""


class LostError(OSError):
  """Somebody else has taken the lease of this process over."""


@dataclasses.dataclass(frozen=True)
class Holder:
  """A process that holds a workdir, as its lease describes it.

  Attributes:
    token: a random name of this one lease.
    host: the machine's name.
    pid: the process's id, within `namespace`.
    started: when the process started, in ticks since the machine's boot.
    boot: id of the machine's boot; "" without /proc. Two machines, and two
      boots of one, differ in it.
    namespace: the namespace of process ids; containers have their own.
    directory: device and inode of the workdir; a copy of it has others.
    since: when the lease was taken, for people.
  """

  token: str
  host: str
  pid: int
  started: int
  boot: str
  namespace: str
  directory: tuple[int, int]
  since: str

  def __str__(self) -> str:
    return f"process {self.pid} on {self.host}, since {self.since}"


class Lease:
  """A lease that this process holds; `LeaseRequest` makes one."""

  def __init__(self, path: pathlib.Path, holder: Holder):
    self._path, self.holder = path, holder
    self._beats, self._stop = 0, threading.Event()
    # Never reset, even if the taker has left again: it has written meanwhile,
    # and what this process knows of the workdir is out of date.
    self._taker: Holder | None = None
    self._thread = threading.Thread(
        target=self._run, name="lease", daemon=True)
    self._thread.start()
    _held.append(self)

  def check(self) -> None:
    """Reads the file, and checks that this process still holds the lease.

    Raises:
      LostError: somebody else holds it; names the holder.
    """
    self._read_taker()
    self.check_known()

  def check_known(self) -> None:
    """Raises `LostError` if a heartbeat has found the lease lost; reads no
    file.
    """
    if self._taker is not None:
      raise LostError(
          f"The workdir {self._path.parent} was taken over by {self._taker}: "
          "this process did not renew its lease for too long. It stops, and "
          "writes nothing more. Let one of the two go on.")

  def release(self) -> None:
    """Ends the heartbeat, and removes the file if it is still this lease's."""
    self._stop.set()
    self._thread.join(LEAVING)
    if self in _held:
      _held.remove(self)
    with contextlib.suppress(OSError):
      _, found = _read(self._path)
      if found is not None and found.token == self.holder.token:
        self._path.unlink()

  def _run(self) -> None:
    while not self._stop.wait(BEAT):
      # A disk that is full now may have room at the next beat.
      with contextlib.suppress(OSError):
        self._renew()

  def _read_taker(self) -> None:
    _, found = _read(self._path)
    if found is not None and found.token != self.holder.token:
      self._taker = found

  def _renew(self) -> None:
    self._read_taker()
    # Another holder's file is never overwritten; one that is damaged or gone
    # is written again.
    if self._taker is None:
      self._beats += 1
      _replace(self._path, self.holder, self._beats)


_held: list[Lease] = []  # This process's leases.


def release_all() -> None:
  """Releases this process's leases, before an exit that unwinds nothing."""
  for lease in list(_held):
    lease.release()


class LeaseRequest:
  """An attempt to acquire a workdir's lease, by polling.

  Args:
    directory: the workdir, which is made if it does not exist.
    wait: wait for a live holder until it leaves, rather than raise.
    say: takes a line about what is waited for.
  """

  def __init__(
      self, directory: str | os.PathLike, *, wait: bool = False,
      say: Callable[[str], None] = lambda text: None,
  ):
    self._path = pathlib.Path(directory, NAME)
    self._wait, self._say, self._said = wait, say, ""
    self._watch = _Watch()

  def try_acquire(self) -> Lease | None:
    """Acquires the lease if it is free; else sleeps for `POLL` seconds.

    Returns:
      None where the lease is held or it is not known yet: call again.

    Raises:
      HeldError: somebody else holds it; names the holder and the remedy.
      OSError: the directory cannot be written.
    """
    directory = self._path.parent
    directory.mkdir(parents=True, exist_ok=True)
    me = _me(directory)
    text, found = _read(self._path)
    lives = self._watch.is_alive(text, found, me)
    if lives is False and _write(self._path, me, over=text):
      return Lease(self._path, me)
    who = str(found) if found else "somebody whose lease cannot be read"
    if lives and not self._wait:
      raise HeldError(
          f"{directory} is held by {who}. One run at a time may write there: "
          "wait for it or stop it, name another --workdir, or give "
          "--wait-for-workdir.")
    self._tell({
        True: f"{directory} is held by {who}; waiting until it leaves",
        None: f"{directory} is held by {who}; waiting up to {LENGTH:.0f} s "
        "for a sign of life",
        False: f"{directory} is being taken by another start",
    }[lives])
    time.sleep(POLL)
    return None

  def _tell(self, news: str) -> None:
    if news != self._said:  # Once per state, and not at every poll.
      self._say(news)
    self._said = news


class _Watch:
  """Liveness of a holder, from the contents of its file so far."""

  def __init__(self) -> None:
    self._text: bytes | None = None
    self._since = 0.0
    self._moved: bool | None = None  # True once the file has changed.

  def is_alive(
      self, text: bytes | None, found: Holder | None, me: Holder,
  ) -> bool | None:
    """Tests if the holder is alive; None as long as that is not known.

    Args:
      text: the file's content; None if there is no file.
      found: the holder that it names; None if it cannot be read.
      me: this process.
    """
    if text is None:
      return False
    if found is not None and _is_here(found, me):
      if _started(found.pid) != found.started:  # Gone, or its id is reused.
        return False
      if found.directory == me.directory:
        return True
      # A workdir that was copied while its run was on: the process is alive
      # and holds the original. The copy's lease is not renewed, so it is
      # watched like one of another machine.
    now = time.monotonic()
    # The holder's beat counter changes the text. The clock here is this
    # process's own, so it does not matter what time the holder has.
    if text != self._text:
      self._moved = None if self._text is None else True
      self._text, self._since = text, now
    return False if now - self._since >= LENGTH else self._moved


def _is_here(found: Holder, me: Holder) -> bool:
  """Tests if the holder's process id can be looked up on this machine."""
  return bool(me.boot) and (
      (found.boot, found.namespace) == (me.boot, me.namespace))


def _me(directory: pathlib.Path) -> Holder:
  at = directory.stat()
  boot = namespace = ""
  with contextlib.suppress(OSError):
    namespace = os.readlink(PROC / "self/ns/pid")
    boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
  return Holder(
      token=uuid.uuid4().hex, host=socket.gethostname(), pid=os.getpid(),
      started=_started(os.getpid()) or 0, boot=boot, namespace=namespace,
      directory=(at.st_dev, at.st_ino),
      since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))


def is_running(pid: int) -> bool:
  """Tests if this machine has a process with that id."""
  return _started(pid) is not None


def _started(pid: int) -> int | None:
  """Returns when a process started, in ticks since boot; None without one.

  A zombie does not count.
  """
  try:
    stat = (PROC / str(pid) / "stat").read_text()
  except OSError:
    return None
  # The second field is the command's name in brackets, which may itself
  # contain brackets and spaces: the fixed fields follow the last one.
  fields = stat.rpartition(")")[2].split()
  return None if fields[0] in "ZX" else int(fields[19])


def _read(path: pathlib.Path) -> tuple[bytes | None, Holder | None]:
  """Reads the file: its bytes, None without one, and its holder, if any."""
  try:
    text = path.read_bytes()
  except FileNotFoundError:
    return None, None
  try:
    return text, _holder(json.loads(text)["holder"])
  except (ValueError, TypeError, KeyError, RecursionError):
    return text, None


def _holder(data: dict[str, Any]) -> Holder:
  """Makes a Holder of JSON data; raises TypeError or ValueError if it is none.
  """
  device, inode = data["directory"]
  found = Holder(**data | {"directory": (device, inode)})
  for field in dataclasses.fields(Holder):
    if field.type in (int, str) and type(
        getattr(found, field.name)) is not field.type:
      raise TypeError(field.name)
  return found


def _text(holder: Holder, beats: int) -> bytes:
  return json.dumps(
      {"holder": dataclasses.asdict(holder), "beats": beats}).encode()


def _write(path: pathlib.Path, holder: Holder, *, over: bytes | None) -> bool:
  """Writes the lease for the first time; False if another start was first.

  Args:
    over: the file's content when its holder was found dead; None if there was
      no file.
  """
  with _lock(path.parent) as alone:
    if not alone or _read(path)[0] != over:
      return False
    if over is not None:
      _replace(path, holder, 0)
      return True
    # "x" is atomic on NFS too, where the lock may not reach other machines.
    try:
      with path.open("xb") as file:
        file.write(_text(holder, 0))
    except FileExistsError:
      return False
    return True


def _replace(path: pathlib.Path, holder: Holder, beats: int) -> None:
  # Renamed in one piece: who watches the file never reads half of one.
  partial = path.with_name(f"{NAME}.{holder.token}.partial")
  partial.write_bytes(_text(holder, beats))
  partial.replace(path)


@contextlib.contextmanager
def _lock(directory: pathlib.Path) -> Iterator[bool]:
  """Locks out other starts, as far as the file system can.

  The lock is on the directory, so that it needs no file, and the kernel drops
  it when the process ends. Nobody waits for it, since its owner may stand
  still: who does not get it polls again.

  Yields:
    True if no other process has the lock.
  """
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield False
      return
    except OSError:  # A file system without locks.
      pass
    yield True
  finally:
    os.close(descriptor)
