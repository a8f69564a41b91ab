r"""Symbolic equivalence of two answers: math-verify, in a process of its own.

Parsing and simplifying a model's text can take for ever, or all memory, and
math-verify's own time-out is a signal that works in a main thread only. So one
worker process is started at the first question, reused, and killed when it is
late; the next question starts another.

`python -m posttrain.tasks.symbolic` is the worker: JSON lines in and out.
"""

import atexit
import contextlib
import faulthandler
import json
import os
import re
import resource
import select
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

START_SECONDS = 120  # Importing sympy on a busy machine.
LAYOUT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\b|\\[,!;: ]|[\s{}$~]")
CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})([ap])\.?m\.?", re.IGNORECASE)
MEMORY = 4 * 1024**3  # Bytes of address space; sympy needs 0.3 GiB.


class Verdict(NamedTuple):
  """A status of `posttrain.tasks.grading`, and the reason of an "error"."""
  status: str
  reason: str


def compare(gold: str, answer: str, *, seconds: float = 5.0) -> Verdict:
  """Compares an answer with the gold one; safe in threads.

  Two times of day are compared here, everything else by math-verify.

  Args:
    gold, answer: LaTeX, as found inside a box.
    seconds: the time-out; starting the worker is not counted.

  Returns:
    "ok", "wrong", "timeout", "error", or "unparseable" (the answer).

  Raises:
    RuntimeError: the worker does not start.
    ValueError: the gold answer cannot be parsed.
  """
  wanted, found = time_of_day(gold), time_of_day(answer)
  if wanted and found:
    return Verdict("ok" if wanted == found else "wrong", "")
  verdict = _ask(dict(
      gold=_spelled(gold), answer=answer, seconds=seconds))
  if verdict.status == "gold":
    raise ValueError(
        f"math-verify cannot parse the gold answer {gold!r}, so nothing can be "
        "compared to it. Correct the answer column.")
  return verdict


def time_of_day(text: str) -> tuple[int, int, str] | None:
  r"""Reads hours, minutes and "a" or "p" of `4:30 \text{ p.m.}`.

  math-verify reads that as 4/30, whatever the half of the day, and does not
  read `4:30 p.m.`.
  """
  match = CLOCK.fullmatch(LAYOUT.sub("", text))
  return (int(match[1]), int(match[2]), match[3].lower()) if match else None


def _spelled(gold: str) -> str:
  """Spells a gold answer so that math-verify can parse it."""
  time_read = time_of_day(gold)
  if not time_read:
    return gold
  hours, minutes, half = time_read
  return rf"{hours}:{minutes:02d} \text{{ {half}.m.}}"


class _Worker:
  """The worker process and its pipes."""

  def __init__(self):
    # A session of its own: a signal that interrupts the run (Ctrl-C, or a
    # launcher's SIGTERM to the group) must not change a grade.
    self.process = subprocess.Popen(
        [sys.executable, "-m", "posttrain.tasks.symbolic"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, start_new_session=True)
    try:
      ready = self._read(START_SECONDS)
    except (EOFError, TimeoutError) as error:
      self.stop()
      raise RuntimeError(
          "The math-verify worker did not start. See what `python -m "
          "posttrain.tasks.symbolic` prints.") from error
    if ready["status"] != "ready":
      self.stop()
      raise RuntimeError(
          f"The math-verify worker did not start: {ready['reason']}. Install "
          "what it lacks, for example with `pip install math-verify`.")

  def ask(self, question: dict[str, Any]) -> Verdict:
    """Asks one question; EOFError if the worker dies, TimeoutError if late."""
    assert self.process.stdin is not None
    try:
      self.process.stdin.write(json.dumps(question).encode() + b"\n")
      self.process.stdin.flush()
    except OSError as error:
      raise EOFError from error
    return Verdict(**self._read(question["seconds"]))

  def stop(self):
    self.process.kill()
    self.process.wait()
    for pipe in (self.process.stdin, self.process.stdout):
      assert pipe is not None
      with contextlib.suppress(OSError):  # Unsent bytes.
        pipe.close()

  def _read(self, seconds: float) -> dict[str, str]:
    assert self.process.stdout is not None
    pipe, line = self.process.stdout.fileno(), b""
    deadline = time.monotonic() + seconds
    while not line.endswith(b"\n"):
      left = max(0.0, deadline - time.monotonic())
      if not select.select([pipe], [], [], left)[0]:
        raise TimeoutError
      part = os.read(pipe, 65536)
      if not part:
        raise EOFError
      line += part
    return json.loads(line)


_lock = threading.Lock()
_worker: _Worker | None = None


def _ask(question: dict[str, Any]) -> Verdict:
  global _worker
  with _lock:
    for _ in range(2):
      if _worker is None:
        _worker = _Worker()
      try:
        return _worker.ask(question)
      except TimeoutError:
        _discard()
        return Verdict("timeout", f"more than {question['seconds']:g} s")
      except EOFError:
        # It may have died of something else than this question: ask once more.
        _discard()
    return Verdict("error", "the worker died twice on this answer")


def _discard() -> None:
  global _worker
  if _worker is not None:
    _worker.stop()
    _worker = None


atexit.register(_discard)


def _serve() -> None:
  """Answers questions until the pipe closes."""
  replies = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # A library's prints must not be taken for replies.
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  reply = lambda status, reason="": print(
      json.dumps(dict(status=status, reason=reason)), file=replies)
  try:
    import math_verify  # noqa: F401
  except ImportError as error:
    reply("failed", str(error))
    return
  reply("ready")
  for line in sys.stdin:
    question = json.loads(line)
    # A worker whose parent was killed must not compute on for ever; this
    # watchdog works inside C code too.
    faulthandler.dump_traceback_later(
        2 * question["seconds"] + 1, exit=True, file=2)
    reply(*_judge(question["gold"], question["answer"]))
    faulthandler.cancel_dump_traceback_later()


def _judge(gold: str, answer: str) -> tuple[str, str]:
  """Judges one answer, in the worker; "gold": the gold answer has no parse."""
  import math_verify
  parse = lambda text: math_verify.parse(
      rf"\boxed{{{text}}}", parsing_timeout=None)
  try:
    wanted = parse(gold)
    if all(isinstance(form, str) for form in wanted):
      return "gold", ""
    found = parse(answer)
    if not found:
      return "unparseable", ""
    same = math_verify.verify(
        wanted, found, timeout_seconds=None, raise_on_error=True)
  except Exception as error:  # A model's text may make any library fail.
    return "error", f"{type(error).__name__}: {error}"[:500]
  if not same and all(isinstance(form, str) for form in found):
    return "unparseable", ""
  return ("ok" if same else "wrong"), ""


if __name__ == "__main__":
  _serve()
