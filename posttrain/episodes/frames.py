"""Frames: messages between the pool, its supervisor and the workers.

A frame is a header, and two strings of bytes whose lengths it has. Nothing that
a worker wrote is unpickled: results are JSON.

  pool -> supervisor -> worker    JOB: the function's name, pickled arguments
  pool -> supervisor              CANCEL, PING
  worker -> supervisor            READY; IMPORT: names of functions; START;
                                  DONE or LAST: "", the result as JSON
  supervisor -> pool              DONE: output, the result as JSON; PONG
"""

import contextlib
import json
import socket
import struct
from typing import Any, NamedTuple

(JOB, CANCEL, PING, PONG, READY, IMPORT, START, DONE, LAST) = range(1, 10)
HEADER = struct.Struct("<BQdII")
MAX_RESULT = 2**20  # Bytes of JSON.
MAX_JOB = 2**28  # Bytes of pickled arguments.
MAX_DEPTH = 100  # Lists within lists; Python's own JSON fails far below 1000.
_PART = 2**18


class Frame(NamedTuple):
  """Message.

  Attributes:
    kind: one of the constants of this module.
    number: of the job.
    seconds: deadline of a job; time that a result took.
    head, body: see the module's text.
  """

  kind: int
  number: int = 0
  seconds: float = 0.0
  head: bytes = b""
  body: bytes = b""


def encode(frame: Frame) -> bytes:
  """Encodes a frame."""
  return HEADER.pack(
      frame.kind, frame.number, frame.seconds, len(frame.head),
      len(frame.body)) + frame.head + frame.body


def take(buffer: bytearray, limit: int) -> Frame | None:
  """Takes the first frame from a buffer; None if it is not whole yet.

  Raises:
    ValueError: this is no frame, or is larger than `limit` bytes.
  """
  if len(buffer) < HEADER.size:
    return None
  kind, number, seconds, first, second = HEADER.unpack_from(buffer)
  if not JOB <= kind <= LAST or first + second > limit:
    raise ValueError("no frame")
  end = HEADER.size + first + second
  if len(buffer) < end:
    return None
  head = bytes(buffer[HEADER.size:HEADER.size + first])
  body = bytes(buffer[HEADER.size + first:end])
  del buffer[:end]
  return Frame(kind, number, seconds, head, body)


def decode_result(body: bytes) -> tuple[str, Any, str]:
  """Decodes the status, value and reason of a result.

  Raises:
    ValueError, TypeError, RecursionError: this is no JSON, or has another form.
  """
  status, value, reason = json.loads(body, parse_constant=_refuse)
  if status not in ("ok", "timeout", "error") or not isinstance(reason, str):
    raise ValueError("it has no status or reason")
  level = [value] if body.count(b"[") + body.count(b"{") > MAX_DEPTH else []
  for _ in range(MAX_DEPTH if level else 0):
    level = [
        inner for each in level if isinstance(each, list | dict)
        for inner in (each.values() if isinstance(each, dict) else each)]
  if level:
    raise ValueError(f"it is nested more than {MAX_DEPTH} times")
  return status, value, reason


def _refuse(name: str) -> None:
  raise ValueError(f"JSON has no {name}")


class Channel:
  """End of a socket pair that never blocks.

  Attributes:
    closed: the other end is closed, or has sent what is no frame.
  """

  def __init__(self, sock: socket.socket, limit: int):
    """Wraps a socket; a frame of more than `limit` bytes is refused."""
    sock.setblocking(False)
    self.socket = sock
    self.closed = False
    self._limit = limit
    self._inbox = bytearray()
    self._outbox = bytearray()

  @property
  def unsent(self) -> bool:
    return bool(self._outbox) and not self.closed

  def send(self, data: bytes) -> None:
    """Sends bytes, or keeps what the socket does not take for `flush`."""
    self._outbox += data
    self.flush()

  def flush(self) -> None:
    while self.unsent:
      try:
        del self._outbox[:self.socket.send(self._outbox[:_PART])]
      except BlockingIOError:
        return
      except OSError:
        self.closed = True

  def receive(self) -> list[Frame]:
    """Receives the frames that are there; sets `closed` at the end."""
    found: list[Frame] = []
    with contextlib.suppress(BlockingIOError):
      while not self.closed:
        part = self._read()
        self._inbox += part
        self.closed = self.closed or not part
        try:
          while frame := take(self._inbox, self._limit):
            found.append(frame)
        except ValueError:
          self.closed = True
        if len(part) < _PART:
          break
    return found

  def close(self) -> None:
    self.closed = True
    self.socket.close()

  def shutdown(self) -> None:
    """Closes the connection, also for other processes that have this end."""
    with contextlib.suppress(OSError):
      self.socket.shutdown(socket.SHUT_RDWR)
    self.close()

  def _read(self) -> bytes:
    try:
      return self.socket.recv(_PART)
    except BlockingIOError:
      raise
    except OSError:
      return b""
