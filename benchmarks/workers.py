"""`python -m benchmarks.workers`: seconds that calls in worker processes cost.

A trivial reward, called in this process and in the pool: batches of
`--calls`, a line of JSON with medians of `--repeats`. CPU seconds of this
process are what a run pays beside its own work.
"""

import argparse
import json
import resource
import statistics
import time

from benchmarks.__main__ import machine
from posttrain.episodes.call import Call
from posttrain.episodes.workers import Settings, WorkerPool
from posttrain.tasks import sums

REWARD = "posttrain.tasks.sums:reward"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      prog="python -m benchmarks.workers", description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--calls", type=int, default=256)
  parser.add_argument("--repeats", type=int, default=21)
  return parser.parse_args(argv)


def problem(number: int) -> dict[str, str]:
  return dict(prompt=f"{number} + 2", answer=str(number + 2), id=str(number),
              completion=f"The sum of {number} and 2 is {number + 2}.")


def drain(pool: WorkerPool) -> list:
  found = []
  while pool.pending:
    found += pool.poll(1.0)
  return found


def in_process(num_calls: int) -> float:
  """Measures a batch of calls in this process, in seconds."""
  start = time.perf_counter()
  for number in range(num_calls):
    sums.reward(**problem(number))
  return time.perf_counter() - start


def in_pool(pool: WorkerPool, num_calls: int) -> tuple[float, float]:
  """Measures a batch of calls in workers: seconds, and CPU seconds here."""
  start, cpu = time.perf_counter(), time.process_time()
  for number in range(num_calls):
    pool.submit(Call(REWARD, kwargs=problem(number)))
  found = drain(pool)
  assert all(result.value == 1 for _, result in found), found[0]
  return time.perf_counter() - start, time.process_time() - cpu


def start(num_workers: int) -> tuple[float, float]:
  """Measures a pool's start, to the first result, and its end, in seconds."""
  begin = time.perf_counter()
  with WorkerPool(Settings(num_workers=num_workers)) as pool:
    pool.submit(Call(REWARD, kwargs=problem(0)))
    drain(pool)
    begun = time.perf_counter()
  return begun - begin, time.perf_counter() - begun


def replace(pool: WorkerPool) -> float:
  """Measures from a call that ends its worker to the new one's first result."""
  begin = time.perf_counter()
  pool.submit(Call("os:_exit", (0,)))
  pool.submit(Call(REWARD, kwargs=problem(0)))
  drain(pool)
  return time.perf_counter() - begin


def batches(
    num_workers: int, num_calls: int, repeats: int,
) -> tuple[list[tuple[float, float]], float]:
  """Measures batches in a new pool, and the CPU seconds of its processes."""
  spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
  before = spent()
  with WorkerPool(Settings(num_workers=num_workers)) as pool:
    in_pool(pool, num_calls)
    found = [in_pool(pool, num_calls) for _ in range(repeats)]
  return found, spent() - before


def measure(arguments: argparse.Namespace) -> dict:
  repeats, calls = arguments.repeats, arguments.calls
  starts = [start(arguments.workers) for _ in range(5)]
  here = statistics.median(in_process(calls) for _ in range(repeats))
  _, started = batches(arguments.workers, calls, 0)
  there, spent = batches(arguments.workers, calls, repeats)
  with WorkerPool(Settings(num_workers=1)) as pool:
    replaced = [replace(pool) for _ in range(repeats)][1:]
  micro = lambda seconds: round(1e6 * seconds / calls, 1)
  return dict(
      workers=arguments.workers, calls=calls,
      start_s=round(statistics.median(s for s, _ in starts), 3),
      close_s=round(statistics.median(s for _, s in starts), 3),
      in_process_us=micro(here),
      pool_us=micro(statistics.median(s for s, _ in there)),
      pool_us_least=micro(min(s for s, _ in there)),
      pool_cpu_here_us=micro(statistics.median(s for _, s in there)),
      pool_cpu_elsewhere_us=micro((spent - started) / repeats),
      replace_ms=round(1e3 * statistics.median(replaced), 1),
      machine=machine())


if __name__ == "__main__":
  print(json.dumps(measure(parse())))
