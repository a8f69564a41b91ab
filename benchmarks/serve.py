"""Worker protocol: a process does one work when asked, and reports the time.

A line on its standard input asks for one run; the answer is a line of JSON:
`tokens`, `wall` and `cpu` seconds (all threads of the process), and
`peak_rss_mb` so far. The first run warms up, and its line says "ready". The
end of the input ends it.

  for run in serve.runs(shape.tokens):
    step(run)  # Complete when it returns.

Where a trainer owns the loop, `Turns` is called from its hooks instead.
Standard library only: peers read it in environments of their own.
"""

import argparse
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator

from benchmarks import shapes


class Turns:
  """Both ends of a run, over standard input and output.

  Standard output is the driver's from then on.
  """

  def __init__(self, tokens: int):
    self._tokens = tokens
    # What libraries print would be in the way of the answers.
    self._answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    self._warm = False
    self._begun = (0.0, 0.0)

  def begin(self) -> bool:
    """Waits for a request; returns False if there is nothing more to do."""
    if self._warm and not sys.stdin.readline():
      return False
    self._begun = (time.perf_counter(), time.process_time())
    return True

  def end(self, tokens: int | None = None) -> None:
    """Reports a run; `tokens`, if they were counted, must be all.

    Raises:
      RuntimeError: the run made another number of tokens than the work has.
    """
    wall = time.perf_counter() - self._begun[0]
    cpu = time.process_time() - self._begun[1]
    if tokens not in (None, self._tokens):
      raise RuntimeError(
          f"The work is {self._tokens} tokens, and {tokens} were made.")
    answer = {
        "ready": not self._warm, "tokens": self._tokens, "wall": wall,
        "cpu": cpu, "peak_rss_mb": peak_rss_mb()}
    self._warm = True
    print(json.dumps(answer), file=self._answers, flush=True)


def peak_rss_mb() -> float:
  """Peak memory of this process, compilation and warm-up included."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / (2**20 if sys.platform == "darwin" else 2**10)


def runs(tokens: int) -> Iterator[int]:
  """Yields the number of each run that is asked for."""
  turns = Turns(tokens)
  for number in itertools.count():
    if not turns.begin():
      return
    yield number
    turns.end()


def arguments(description: str, works: tuple[str, ...]) -> tuple[
    shapes.Size, str, shapes.Shape]:
  """Parses the command line: the model, the work and its shape."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument("--size", choices=sorted(shapes.SIZES), required=True)
  parser.add_argument("--work", choices=works, required=True)
  parser.add_argument("--rows", type=int, default=8, help="of an SFT step")
  given = parser.parse_args()
  return (shapes.SIZES[given.size], given.work,
          shapes.shape_of(given.work, rows=given.rows))
