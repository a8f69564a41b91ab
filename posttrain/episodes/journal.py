"""Journal: the calls of a batch of episodes that have ended, in a file.

What a call gave cannot be made again: a judge may say something else, a test
may time out. So process 0 writes each result down before any host acts on it.
A run that is killed within a batch begins the batch again, and is told the same
results at the same moments as before. Everything else follows from them: the
engine is given the same requests in the same order, and draws the same tokens
to the last bit of their logprobs. Turns are therefore not in the file. With a
part of them at hand the others would decode on another schedule, and a matrix
product then rounds differently.

A moment is the number of the exchange at which process 0 told the others what
had ended. A result has the number of its call, and a digest of what was called:
on another machine a token may differ, and the calls behind it are then others.

Each line is the CRC-32 of the rest and JSON; the first says what the batch was
made with. A line that a kill has cut off is the last, and is dropped.
"""

import hashlib
import io
import json
import pathlib
import re
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from posttrain.episodes.call import Call, Result
from posttrain.workdir import StorageError

Event = tuple[int, Result]  # Number of a call, and its result.


class Entry(NamedTuple):
  """Line of the file: what had ended at one moment.

  Attributes:
    moment: number of the exchange.
    events: in their order.
    digests: of the calls.
    end: size of the file up to here, bytes.
  """

  moment: int
  events: list[Event]
  digests: list[str]
  end: int


class Journal:
  """Journal of one batch on process 0; made anew or read and gone on with."""

  def __init__(
      self, path: pathlib.Path, made_with: Mapping[str, Any], *,
      say: Callable[[str], None] = lambda line: None,
      check: Callable[[], None] = lambda: None,
  ):
    """Reads the file, if there is one of the same settings.

    Args:
      path: the file; its folder is made with the first result.
      made_with: JSON; what the results depend on besides their calls.
      say: takes a line for people.
      check: is called before the file is written. It raises if another run
        writes here now.
    """
    self.path = path
    self._made_with = json.loads(json.dumps(made_with))
    self._say, self._check = say, check
    self._file: io.FileIO | None = None
    self._size, self._entries = self._read()
    self._answers = {
        number: digest for entry in self._entries
        for (number, _), digest in zip(
            entry.events, entry.digests, strict=True)}
    self._digests: dict[int, str] = {}  # Of the calls that have not ended.
    self._moment = 0
    self._at = 0  # The next of the entries.
    if self._entries:
      say(f"{path}: {len(self._answers)} calls of the batch had ended, and are "
          "not made again")

  @property
  def replays(self) -> bool:
    """Tests if there are results that have not been told again."""
    return self._at < len(self._entries)

  def knows(self, number: int, call: Call) -> bool:
    """Tests if the result of a call will be replayed; it need not be made.

    Args:
      number: the call's, from 0 in each batch.
      call: it is compared with the one that was made before. If they differ,
        nothing is replayed any more.
    """
    self._digests[number] = digest = digest_of(call)
    known = self._answers.get(number)
    if known is None:
      return False
    if known != digest:
      self._differs(number, f"({call.function}) is not the one it was before")
    return known == digest

  def replay(self) -> list[Event]:
    """Returns what had ended at this moment, and goes on to the next."""
    moment, self._moment = self._moment, self._moment + 1
    if not self.replays or self._entries[self._at].moment != moment:
      return []
    events = self._entries[self._at].events
    if not all(number in self._digests for number, _ in events):
      self._differs(events[0][0], "had been made by now, and now it has not")
      return []
    self._at += 1
    for number, _ in events:
      del self._digests[number], self._answers[number]
    return events

  def write(self, events: list[Event]) -> None:
    """Writes down what has ended at this moment, and goes on to the next.

    Raises:
      StorageError: the file cannot be written; the disk may be full.
    """
    moment, self._moment = self._moment, self._moment + 1
    if events:
      self._append({"moment": moment, "events": [
          [number, self._digests.pop(number), *result]
          for number, result in events]})

  def close(self) -> None:
    """Closes the file, which stays."""
    if self._file:
      self._file.close()
    self._file = None

  def remove(self) -> None:
    """Closes and removes the file: what was made of it is in another one."""
    self.close()
    self.path.unlink(missing_ok=True)

  def _differs(self, number: int, how: str) -> None:
    """Drops what has not been replayed, in the file too."""
    self._say(
        f"{self.path}: call {number} of the batch {how}. Was the run on other "
        "devices? The calls from here on are made again.")
    self._size = self._entries[self._at - 1].end if self._at else 0
    del self._entries[self._at:]
    self._answers = {}
    if not self._size:
      self.path.unlink(missing_ok=True)

  def _read(self) -> tuple[int, list[Entry]]:
    """Reads the whole lines; returns their size and what they say.

    A file of other settings is as good as none.
    """
    content = self.path.read_bytes() if self.path.exists() else b""
    lines = list(_whole_lines(content))
    if not lines:
      return 0, []
    if lines[0][1] != self._made_with:
      self._say(f"{self.path} was made with other settings; the calls of the "
                "batch are made again")
      return 0, []
    return lines[-1][0], [_entry(end, line) for end, line in lines[1:]]

  def _append(self, line: Mapping[str, Any]) -> None:
    self._check()
    try:
      if self._file is None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not buffered: what the kernel has is kept when the process is killed.
        # After a power cut it may be missing, and the calls are made again:
        # nothing that was made of them is on the disk either.
        self._file = self.path.open("ab", buffering=0)
        # Behind the whole lines; a file of other settings is begun anew.
        self._file.truncate(self._size)
        if not self._size:
          _write(self._file, _line(self._made_with))
      _write(self._file, _line(line))
    except OSError as error:
      raise StorageError(
          f"{self.path} could not be written: {error.strerror}. Is the disk "
          "full? Checkpoints are untouched, and the same command goes on."
      ) from error


def digest_of(call: Call) -> str:
  """Computes a digest of what is called, and with which arguments."""
  # Arrays are shown whole; an object's address differs from start to start.
  with np.printoptions(threshold=sys.maxsize, floatmode="unique"):
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(
        (call.function, call.args, dict(call.kwargs))))
  return hashlib.blake2b(
      text.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


def _write(file: io.FileIO, content: bytes) -> None:
  while content:  # A disk that is nearly full takes a part.
    content = content[file.write(content):]


def _line(content: Any) -> bytes:
  text = json.dumps(content).encode()
  return b"%08x %s\n" % (zlib.crc32(text), text)


def _whole_lines(content: bytes):
  """Yields the lines that are whole, each with the size up to its end."""
  end = 0
  for line in content.splitlines(keepends=True):
    crc, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text[:-1]):
      return
    end += len(line)
    yield end, json.loads(text)


def _entry(end: int, line: Mapping[str, Any]) -> Entry:
  return Entry(
      line["moment"], [(number, Result(*result))
                       for number, _, *result in line["events"]],
      [digest for _, digest, *_ in line["events"]], end)
