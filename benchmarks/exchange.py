"""Measures what it costs to tell the other processes of a run something.

  python launch/local.py --processes=2 --devices-per-process=1 \
      --module=benchmarks.exchange
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from posttrain import distributed

COUNT = 512


def main() -> None:
  distributed.initialize()
  results = [(number, "x" * 4096) for number in range(64)]
  for name, told, wait in (
      ("nothing", None, False), ("nothing, all wait", None, True),
      ("64 results of 4 KiB", results, False)):
    measure(name, lambda told=told, wait=wait: distributed.on_first_host(
        lambda: told, wait=wait))


def measure(name: str, exchange: Callable[[], Any]) -> None:
  """Prints the time of one exchange on this process."""
  distributed.on_first_host(lambda: None)  # All begin together.
  started, used = time.perf_counter(), time.process_time()
  for _ in range(COUNT):
    exchange()
  took = (time.perf_counter() - started) / COUNT
  used = (time.process_time() - used) / COUNT
  print(f"process {jax.process_index()}, {name}: {1e6 * took:.0f} us, of which "
        f"{1e6 * used:.0f} us CPU time", flush=True)


if __name__ == "__main__":
  sys.exit(main())
