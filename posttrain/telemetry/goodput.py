"""Goodput: the parts of a stage's wall time, over all of its starts.

  train       steps that count: their results are in a checkpoint, or still may
              be
  compile     tracing, lowering and XLA
  input_wait  for the next batch of data
  checkpoint  copying and hashing the state, and waiting for a write that is not
              done when it must be
  evaluation  the held-out loss
  profile     writing a trace
  setup       before the first step of the first start
  restart     the cost of interruptions: the time down, the set-up of the
              starts after the first, and the steps that were made again

Goodput is the share of `train`. The record is a file in the stage's directory,
so that a start knows the times of earlier ones; one that is damaged is moved
aside and begun again. It is at most `EVERY` seconds old when a process dies:
that much may count as time down in place of steps made again, which changes no
other figure.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax.monitoring

from posttrain import workdir

NAMES = ("train", "compile", "input_wait", "checkpoint", "evaluation",
         "profile", "setup", "restart")
EVERY = 10.0  # Seconds between two writes of the record.
MARKS = 100  # Checkpoints whose time is remembered.
PREFIX = "/jax/core/compile/"  # Tracing, lowering, XLA or its cache.


class Union:
  """Length of the union of intervals, which come in the order of their ends.

  JAX reports when a trace, a lowering or a compilation has ended and how long
  it took. These intervals overlap where one jitted function calls another, so
  the compile time is the length of their union.
  """

  def __init__(self) -> None:
    self.seconds = 0.0
    self._intervals: list[tuple[float, float]] = []  # Disjoint, in order.

  def add(self, start: float, end: float) -> None:
    """Adds an interval whose end is not before that of any earlier one."""
    while self._intervals and self._intervals[-1][1] > start:
      before = self._intervals.pop()
      self.seconds -= before[1] - before[0]
      start = min(start, before[0])
    self._intervals.append((start, end))
    self.seconds += end - start


_union = Union()
_listening = False


def compile_seconds() -> float:
  """Returns the compile time since the first call of this function."""
  # JAX cannot remove a single listener, so it is registered once per process.
  global _listening
  if not _listening:
    _listening = True
    jax.monitoring.register_event_duration_secs_listener(_listen)
  return _union.seconds


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
  if event.startswith(PREFIX):
    now = time.monotonic()
    _union.add(now - duration_secs, now)


class Ledger:
  """Times of one stage, from the first line of the first start on.

  Time between `begin` and now that is in no other part counts as `train`.
  """

  def __init__(
      self, path: pathlib.Path, *, write: bool = True,
      wall: Callable[[], float] = time.time,
      clock: Callable[[], float] = time.monotonic,
      compiled: Callable[[], float] = compile_seconds,
      warn: Callable[[str], None] = lambda text: None,
  ):
    """Opens the record, or begins it.

    Args:
      path: `goodput.json`.
      write: false on all hosts but the first, whose figures go nowhere.
      wall: seconds since the epoch.
      clock: monotonic seconds.
      compiled: seconds spent compiling so far.
      warn: takes a line about a damaged record.
    """
    self._path, self._write = path, write
    # Two clocks: a process's own time must not jump when the machine's time is
    # set, and the time between two processes has no monotonic clock.
    self._wall, self._clock, self._compiled = wall, clock, compiled
    self._opened, self._compiled_before = clock(), compiled()
    self._written = clock()
    self._began = False
    self._record = (
        workdir.read_or_set_aside(path, lambda: read(path), warn)
        if write and path.exists() else None)
    self._starts = 1 + (self._record["starts"] if self._record else 0)
    self._marks: list[list[float]] = (
        self._record["marks"] if self._record else [])
    self.spans: dict[str, float] = {}
    self._before = dict.fromkeys(NAMES, 0.0) | (
        self._record["seconds"] if self._record else {})
    # From the last write of the earlier start to now nothing was computed.
    if self._record:
      self._before["restart"] += max(0.0, wall() - self._record["written"])

  @contextlib.contextmanager
  def span(self, name: str) -> Iterator[None]:
    """Adds the time within to `spans[name]`, without what was spent compiling.

    A name that is not in `NAMES` is a part of `train`.
    """
    start, compiled = self._clock(), self._compiled()
    try:
      yield
    finally:
      seconds = self._clock() - start - (self._compiled() - compiled)
      self.spans[name] = self.spans.get(name, 0.0) + seconds

  def begin(self, step: int) -> None:
    """Ends the set-up: the first step follows.

    Args:
      step: the restored checkpoint's step; 0 without one.
    """
    # Steps after that checkpoint are made again, so their time, which the
    # record has as `train`, was lost to the restart.
    self._marks = [mark for mark in self._marks if mark[0] <= step]
    kept = self._marks[-1][1] if self._marks else 0.0
    lost = max(0.0, self._before["train"] - kept)
    self._before["train"] -= lost
    self._before["restart"] += lost
    self.spans[self._setting_up()] = self._unaccounted()
    self._began = True
    self.write()

  def mark(self, step: int) -> None:
    """Notes that a checkpoint holds all steps made up to now."""
    self._marks.append([step, self.seconds()["train"]])
    self._marks = self._marks[-MARKS:]
    self.write()

  def seconds(self) -> dict[str, float]:
    """Returns the seconds by `NAMES`, which add up to the time since the start.
    """
    rest = "train" if self._began else self._setting_up()
    now = {"compile": self._compiled() - self._compiled_before,
           **self.spans}
    now[rest] = now.get(rest, 0.0) + self._unaccounted()
    return {name: self._before[name] + now.get(name, 0.0) for name in NAMES}

  def goodput(self) -> float:
    seconds = self.seconds()
    return seconds["train"] / max(sum(seconds.values()), 1e-9)

  def tick(self) -> None:
    """Writes the record if the last write is `EVERY` seconds ago."""
    if self._clock() - self._written >= EVERY:
      self.write()

  def write(self) -> None:
    self._written = self._clock()
    if self._write:
      workdir.replace_file(self._path, json.dumps({
          "written": self._wall(), "starts": self._starts,
          "seconds": self.seconds(), "marks": self._marks}).encode())

  def line(self) -> str:
    """Describes the times in one line, for the end of a stage."""
    return describe({"seconds": self.seconds(), "starts": self._starts})

  def _setting_up(self) -> str:
    return "restart" if self._record else "setup"

  def _unaccounted(self) -> float:
    parts = sum(seconds for name, seconds in self.spans.items()
                if name in NAMES)
    return (self._clock() - self._opened - parts
            - (self._compiled() - self._compiled_before))


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads the record of a file; raises WorkdirError if it is damaged."""
  record = workdir.read_object(path, "written", "starts", "seconds", "marks")
  is_number = lambda value: type(value) in (int, float)
  seconds, marks = record["seconds"], record["marks"]
  if not (is_number(record["written"]) and type(record["starts"]) is int
          and isinstance(seconds, dict) and set(seconds) == set(NAMES)
          and all(map(is_number, seconds.values()))
          and isinstance(marks, list) and all(
              isinstance(mark, list) and len(mark) == 2
              and all(map(is_number, mark)) for mark in marks)):
    raise workdir.damaged(path, "not the record of a wall time")
  return record


def describe(record: dict[str, Any]) -> str:
  """Describes a record in one line."""
  seconds, starts = record["seconds"], record["starts"]
  total = max(sum(seconds.values()), 1e-9)
  parts = ", ".join(
      f"{name} {seconds[name] / total:.1%}" for name in NAMES[1:])
  return (f"goodput {seconds['train'] / total:.1%} of {total:.1f} s in "
          f"{starts} start{'s' if starts > 1 else ''} ({parts})")
