"""Calls of episodes: numbered on every host, made on process 0 alone.

Every host submits the same calls in the same order, and counts them alike. Only
process 0 has workers. `events` gives the calls that have ended, in one order
for all hosts: process 0's list is broadcast.

Calls with a `Gather` wait for each other and are then made as one.

With a journal process 0 writes down what has ended before it tells it. A batch
that is begun again is told it again, and those calls are not made.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from posttrain import distributed
from posttrain.episodes.journal import Event, Journal
from posttrain.episodes.protocol import Call, Gather, Result

Member = tuple[int, Call]  # With its number.
Share = Callable[[Callable[[], list[Event]]], list[Event]]


class Pool(Protocol):
  """Worker processes, see `workers.WorkerPool`."""

  def submit(self, call: Call) -> int: ...

  def poll(self, timeout: float = 0.0) -> list[Event]: ...

  def cancel(self) -> None: ...


def on_first_host(find: Callable[[], list[Event]]) -> list[Event]:
  """Calls a function on process 0, and gives its result to all hosts.

  It is after each chunk: process 0 does not wait until the others have it.
  """
  return distributed.on_first_host(find, wait=False)


class Calls:
  """Calls of all episodes of a stage, and what has become of them."""

  def __init__(
      self, pool: Pool | None, *, seconds: float = 10.0,
      share: Share = on_first_host,
  ):
    """Takes the workers.

    Args:
      pool: on process 0. Without one each call ends as an error.
      seconds: deadline of a call that has none.
      share: calls a function on process 0, and gives its result to all hosts.
    """
    self._pool, self._seconds, self._share = pool, seconds, share
    self._journal: Journal | None = None
    self._next = 0
    # What is with the workers, by the number of its first call.
    self._sent: dict[int, list[Member]] = {}
    self._numbers: dict[int, int] = {}  # The same, by the pool's numbers.
    self._gathers: dict[Gather, list[Member]] = {}
    self._refused: dict[int, Result] = {}  # Calls that cannot be made.
    # Calls whose results are in the journal, and what has ended before its
    # moment: while it is replayed nothing else is told.
    self._known: dict[int, Call] = {}
    self._early: list[Event] = []

  @contextlib.contextmanager
  def recorded(self, journal: Journal | None) -> Iterator[None]:
    """Writes down what ends, and tells what is written already.

    Every host enters it for the same batch, before the batch's first call.

    Args:
      journal: of the batch, on process 0; it is closed. None elsewhere.
    """
    assert not self.pending
    # The numbers are those in the journal, whichever batch is the first here.
    self._next, self._journal = 0, journal
    try:
      yield
    finally:
      self._journal = None
      if journal:
        journal.close()

  def submit(self, call: Call) -> int:
    """Queues a call and returns its number, the same on every host.

    A call that cannot be made is not raised: it ends as an error.
    """
    number = self._next
    self._next += 1
    if call.gather is None:
      self._send([(number, call)])
      return number
    try:
      members = self._gathers.setdefault(call.gather, [])
      wrong = _contradiction(call, members)
    except TypeError as error:  # The key has no hash.
      wrong = f"The key of a gather: {error}."
    if wrong:
      self._sent[number] = [(number, call)]
      self._refused[number] = Result("error", reason=wrong)
      return number
    members.append((number, call))
    if len(members) == call.gather.size:
      self._send(self._gathers.pop(call.gather))
    return number

  def events(self, seconds: float = 0.0, *, alone: bool = False) -> list[Event]:
    """Returns the calls that have ended, in the same order on every host.

    Every host has to call it equally often.

    Args:
      seconds: to wait for the first, if there is none yet.
      alone: nothing but a call that ends can lead to another call. Gathers
        whose members do not all come are then made with those that did.
    """
    for gather in [*self._gathers]:
      if gather.size < 1 or (alone and not self._sent):
        self._send(self._gathers.pop(gather))
    if not self._sent:  # On no host: they submit alike.
      return []
    events: list[Event] = []
    for first, result in self._share(lambda: self._poll(seconds)):
      events += _split(self._sent.pop(first), result)
      self._refused.pop(first, None)  # Of other hosts.
    return events

  @property
  def pending(self) -> int:
    """Number of calls that have not ended."""
    return sum(map(len, (*self._sent.values(), *self._gathers.values())))

  def cancel(self) -> None:
    """Forgets all calls, and ends those that run."""
    self._sent, self._numbers = {}, {}
    self._gathers, self._refused = {}, {}
    self._known, self._early = {}, []
    if self._pool:
      self._pool.cancel()

  def _send(self, members: list[Member]) -> None:
    """Gives one call, or several that are made as one, to the workers."""
    first, _ = members[0]
    self._sent[first] = members
    if not self._pool:
      return
    call = self._joined([call for _, call in members])
    if self._journal and self._journal.knows(first, call):
      self._known[first] = call
    else:
      self._make(first, call)

  def _make(self, first: int, call: Call) -> None:
    assert self._pool
    self._numbers[self._pool.submit(call)] = first

  def _joined(self, calls: Sequence[Call]) -> Call:
    """Makes one call of several; its deadline is the sum of theirs."""
    call = calls[0]
    if call.gather is None:
      return dataclasses.replace(call, seconds=call.seconds or self._seconds)
    return dataclasses.replace(
        call, args=([each.args for each in calls],), gather=None,
        seconds=sum(each.seconds or self._seconds for each in calls))

  def _poll(self, seconds: float) -> list[Event]:
    """Finds what has ended, on process 0."""
    if self._pool is None:
      return [(first, Result("error", reason="There are no workers."))
              for first in self._sent]
    # The same each time that a batch is begun: no journal is needed.
    refused, self._refused = [*self._refused.items()], {}
    if self._journal is None:
      return refused + self._ended(0.0 if refused else seconds)
    if self._journal.replays:
      self._early += self._ended(0.0)
      replayed = self._journal.replay()
      for first, _ in replayed:
        del self._known[first]
      return refused + replayed

    # Left over where the journal turned out to be of other calls.
    for first, call in self._known.items():
      self._make(first, call)
    early, self._known, self._early = self._early, {}, []
    events = early + self._ended(0.0 if refused or early else seconds)
    self._journal.write(events)
    return refused + events

  def _ended(self, seconds: float) -> list[Event]:
    """Asks the workers."""
    assert self._pool
    return [(self._numbers.pop(number), result)
            for number, result in self._pool.poll(seconds)]


def _contradiction(call: Call, members: Sequence[Member]) -> str:
  """Says why a call cannot be made as one with the others, or ""."""
  for _, other in members[:1]:
    for name in ("function", "kwargs"):
      found, needed = getattr(call, name), getattr(other, name)
      if found != needed:
        return (
            f"Calls of one gather have the {name} {needed!r} and {found!r}. "
            "They may differ in args and seconds only. Use another key.")
  return ""


def _split(members: Sequence[Member], result: Result) -> list[Event]:
  """Gives each member of a call its own result."""
  numbers = [number for number, _ in members]
  _, call = members[0]
  if call.gather is None:
    return [(numbers[0], result)]
  values, seconds = result.value, result.seconds / len(members)
  if result.status != "ok":
    values = [None] * len(members)
  elif not isinstance(values, list) or len(values) != len(members):
    found = (f"a list of {len(values)}" if isinstance(values, list)
             else f"a {type(values).__name__}")
    values = [None] * len(members)
    result = result._replace(status="error", reason=(
        f"{call.function} was given the arguments of {len(members)} calls and "
        f"returned {found}, not one value for each."))
  return [(number, result._replace(value=value, seconds=seconds))
          for number, value in zip(numbers, values, strict=True)]
