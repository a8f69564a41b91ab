"""Calls of host work and their results; imports nothing of JAX."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple


class Gather(NamedTuple):
  """Says which calls of several episodes are made as one.

  Attributes:
    key: equal for the calls that go together.
    size: number of calls to wait for; 0: those that are there when the host
      looks for calls to send, however many.
  """

  key: Hashable
  size: int = 0


@dataclasses.dataclass(frozen=True)
class Call:
  """Request for host work, in a worker process with a deadline.

  Attributes:
    function: "module:function" or "file.py:function". With `gather` it is
      given one list, of the `args` of each call, and returns a list as long.
    args, kwargs: pickled. The result must be JSON.
    seconds: deadline; None: the stage's `workers.seconds`.
    gather: makes it one call together with others.
  """

  function: str
  args: tuple = ()
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seconds: float | None = None
  gather: Gather | None = None


class Result(NamedTuple):
  """Result of a call.

  Attributes:
    status: "ok", "timeout" or "error".
    value: what the function returned; None if the status is not "ok".
    reason: why there is no value, for people.
    output: the beginning of what the call printed.
    seconds: that it took in the worker.
  """

  status: str
  value: Any = None
  reason: str = ""
  output: str = ""
  seconds: float = 0.0
