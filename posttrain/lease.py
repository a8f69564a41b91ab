"""One holder of a workdir at a time: a lease in a file, with a heartbeat.

The file `.lease` of a workdir says who holds it: host, process, since when, and
a counter that the holder raises every `BEAT` seconds. Another start finds out
whether the holder lives:

  of this machine   at once: the process is there or it is not (its id and start
                    time, within one boot and one namespace of processes)
  of another one    the file is watched. If it changes, the holder lives; if it
                    has not changed for `LENGTH` seconds, the lease is taken
                    over. Clocks of two machines are never compared.

What cannot be read as a lease is watched in the same way. A lease is released
when its holder leaves, by SIGTERM too; what SIGKILL leaves behind is taken over
as above. A holder whose lease has been taken, since it stood still or could not
write for that long, finds out at its next heartbeat, and stops at its next row
of metrics or result (`Lease.check_known`), or before its next checkpoint
(`Lease.check`).

A lock of the kernel orders starts that take it at the same moment: on local
disks all of them, on NFS and buckets those of each machine by itself. Two
machines that take over one dead lease there within a second can both go on
until the one that wrote first looks again.
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
POLL = 0.5  # Seconds between two looks at a lease that is watched.
LEAVING = 2.0  # Seconds that a heartbeat under way may take at the end.
PROC = pathlib.Path("/proc")


class HeldError(ValueError):
  """Somebody else holds the workdir."""


class LostError(OSError):
  """Somebody else has taken the lease of this process over."""


@dataclasses.dataclass(frozen=True)
class Holder:
  """A process that holds a workdir, as its lease has it.

  Attributes:
    token: of one lease of one process; no other has it.
    host: its name.
    pid: of the process, within `namespace`.
    started: of the process, in ticks since the machine's boot.
    boot: which boot of which machine; "" where there is no /proc.
    namespace: of process ids.
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
  """A lease that this process holds; `Taking` makes one."""

  def __init__(self, path: pathlib.Path, holder: Holder):
    self._path, self.holder = path, holder
    self._beats, self._stop = 0, threading.Event()
    self._taker: Holder | None = None  # For good, even if it has left again.
    self._thread = threading.Thread(
        target=self._run, name="lease", daemon=True)
    self._thread.start()
    _held.append(self)

  def check(self) -> None:
    """Looks whether this process still holds it.

    Raises:
      LostError: somebody else does; says who.
    """
    self._look()
    self.check_known()

  def check_known(self) -> None:
    """Raises `LostError` if a look before has found it lost; reads no file."""
    if self._taker is not None:
      raise LostError(
          f"The workdir {self._path.parent} was taken over by {self._taker}: "
          "this process did not renew its lease for too long. It stops, and "
          "writes nothing more. Let one of the two go on.")

  def release(self) -> None:
    """Ends the heartbeat, and removes the file if it is still ours."""
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
      with contextlib.suppress(OSError):  # A full disk: at the next beat.
        self._renew()

  def _look(self) -> None:
    _, found = _read(self._path)
    if found is not None and found.token != self.holder.token:
      self._taker = found

  def _renew(self) -> None:
    self._look()
    # Never over somebody else's; what is damaged or gone is written anew.
    if self._taker is None:
      self._beats += 1
      _replace(self._path, self.holder, self._beats)


_held: list[Lease] = []  # By this process.


def let_go() -> None:
  """Releases what this process holds; for ends that unwind nothing."""
  for lease in list(_held):
    lease.release()


class Taking:
  """The attempt to take a workdir's lease: one look after the other.

  Args:
    directory: the workdir, which is made if it is not there.
    wait: for a holder that lives, until it leaves.
    say: is told what is waited for.
  """

  def __init__(
      self, directory: str | os.PathLike, *, wait: bool = False,
      say: Callable[[str], None] = lambda text: None,
  ):
    self._path = pathlib.Path(directory, NAME)
    self._wait, self._say, self._said = wait, say, ""
    self._watch = _Watch()

  def look(self) -> Lease | None:
    """The lease; None where it cannot be told yet, after a short sleep.

    Raises:
      HeldError: somebody else holds it; says who, and what to do.
      OSError: the directory cannot be written.
    """
    directory = self._path.parent
    directory.mkdir(parents=True, exist_ok=True)
    me = _me(directory)
    text, found = _read(self._path)
    lives = self._watch.look(text, found, me)
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
    if news != self._said:
      self._say(news)
    self._said = news


class _Watch:
  """Liveness of a holder, from the looks at its file so far."""

  def __init__(self) -> None:
    self._text: bytes | None = None
    self._since = 0.0
    self._moved: bool | None = None  # True once it has.

  def look(
      self, text: bytes | None, found: Holder | None, me: Holder,
  ) -> bool | None:
    """True or False; None: nobody knows yet.

    Args:
      text: of the file; None: there is none.
      found: what it says; None: it cannot be read.
    """
    if text is None:
      return False
    if found is not None and _is_here(found, me):
      if not _runs(found.pid, found.started):
        return False
      if found.directory == me.directory:
        return True
    now = time.monotonic()
    if text != self._text:
      self._moved = None if self._text is None else True
      self._text, self._since = text, now
    return False if now - self._since >= LENGTH else self._moved


def _is_here(found: Holder, me: Holder) -> bool:
  """Tests if its process ids can be looked up here."""
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


def _runs(pid: int, started: int) -> bool:
  """Tests if that very process runs; a zombie does not."""
  return _started(pid) == started


def is_running(pid: int) -> bool:
  """Tests if this machine has a process of that number."""
  return _started(pid) is not None


def _started(pid: int) -> int | None:
  """When a process started, in ticks since boot; None: there is none."""
  try:
    stat = (PROC / str(pid) / "stat").read_text()
  except OSError:
    return None
  fields = stat.rpartition(")")[2].split()  # A name may hold anything.
  return None if fields[0] in "ZX" else int(fields[19])


def _read(path: pathlib.Path) -> tuple[bytes | None, Holder | None]:
  """The file's bytes, None without one; and what they say, if anything."""
  try:
    text = path.read_bytes()
  except FileNotFoundError:
    return None, None
  try:
    return text, _holder(json.loads(text)["holder"])
  except (ValueError, TypeError, KeyError, RecursionError):
    return text, None


def _holder(data: dict[str, Any]) -> Holder:
  """Raises TypeError or ValueError where it is none."""
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
  """The first write; False where another start was first.

  Args:
    over: what the file held when it was found to be nobody's.
  """
  with _lock(path.parent) as alone:
    if not alone or _read(path)[0] != over:
      return False
    if over is not None:
      _replace(path, holder, 0)
      return True
    try:
      with path.open("xb") as file:
        file.write(_text(holder, 0))
    except FileExistsError:
      return False
    return True


def _replace(path: pathlib.Path, holder: Holder, beats: int) -> None:
  partial = path.with_name(f"{NAME}.{holder.token}.partial")
  partial.write_bytes(_text(holder, beats))
  partial.replace(path)


@contextlib.contextmanager
def _lock(directory: pathlib.Path) -> Iterator[bool]:
  """Locks out other starts, as far as the file system can.

  The lock is on the directory: it needs no file, and its end is the kernel's.
  Nobody waits for it, since who has it may stand still.
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
