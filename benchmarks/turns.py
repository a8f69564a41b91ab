"""Turns: systems take turns at one work, each in a process of its own.

In turn, so that whatever else the machine does meets all of them; in its own
process, so that the peak of memory is of that system and that work. While one
runs the others wait for their input and use no core.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from benchmarks.shapes import Shape

ROOT = pathlib.Path(__file__).parents[1]
# For all alike. Torch's threads sleep when they wait: spinning, they take the
# cores from each other. Large arrays are of huge pages, where Linux lets them:
# of small ones a step touches hundreds of thousands for the first time. Nothing
# is looked up on a network.
SETTINGS = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0",
    "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
    # Of XLA, ours and Tunix's: LLVM takes half of a 512-bit vector by default.
    "XLA_FLAGS": "--xla_cpu_prefer_vector_width=512"}


class Worker:
  """A process that runs `serve`."""

  def __init__(self, name: str, command: Sequence[str]):
    """Starts the process; `turn` waits until it is ready."""
    self.name = name
    self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - see close.
    self._process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=self._log, text=True,
        env=os.environ | SETTINGS)

  def turn(self, *, ask: bool = True) -> dict:
    """Asks for a run, and returns its report (or the first one, when warm).

    Raises:
      RuntimeError: the process has ended; its last lines are in the message.
    """
    assert self._process.stdin and self._process.stdout
    answer = ""
    with contextlib.suppress(BrokenPipeError):
      if ask:
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
      answer = self._process.stdout.readline()
    if not answer:
      self._process.wait()
      self._log.seek(0)
      raise RuntimeError(
          f"{self.name} ended with {self._process.returncode}:\n"
          f"{self._log.read()[-3000:]}")
    return json.loads(answer)

  def close(self) -> None:
    """Ends the process, gently if it listens."""
    assert self._process.stdin
    self._process.stdin.close()
    try:
      self._process.wait(30)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._log.close()


@dataclasses.dataclass(frozen=True)
class Taken:
  """Reports of a system, one for each round."""

  rounds: tuple[dict, ...]

  def median(self, name: str) -> float:
    return statistics.median(found[name] for found in self.rounds)

  @property
  def peak_rss_mb(self) -> float:
    return max(found["peak_rss_mb"] for found in self.rounds)


def take(
    commands: dict[str, Sequence[str]], machine: Sequence[str], *,
    repeats: int, locks: Sequence[str] = (),
) -> tuple[dict[str, Taken], dict]:
  """Runs all systems `repeats` times, and measures the machine in each round.

  Args:
    commands: the command of each system's process.
    machine: the command of `benchmarks.machine`.
    locks: files to lock while they take turns; see `locked`.

  Returns:
    Reports by system, and the machine's round whose limit is the median.
  """
  workers: dict[str, Worker] = {}
  rounds: dict[str, list[dict]] = {name: [] for name in commands}
  rates = []
  with contextlib.ExitStack() as stack:
    def start(name: str, command: Sequence[str]) -> Worker:
      worker = Worker(name, command)
      stack.callback(worker.close)
      return worker

    for name, command in commands.items():
      workers[name] = start(name, command)
      workers[name].turn(ask=False)  # Compiles and warms up, one by one.
    bench = start("machine", machine)
    bench.turn()
    stack.enter_context(locked(locks))
    for number in range(repeats):
      # The order alternates, so that no system always follows the same other.
      order = list(commands) if number % 2 else list(commands)[::-1]
      for name in order:
        rounds[name].append(workers[name].turn())
      rates.append(bench.turn())
  rates.sort(key=lambda found: found["seconds"])
  return ({name: Taken(tuple(found)) for name, found in rounds.items()},
          rates[len(rates) // 2])


@contextlib.contextmanager
def locked(paths: Sequence[str]) -> Iterator[None]:
  """Locks files that the other programs of a shared machine lock, too.

  Compilation and warm-up come before it, as they do not need a quiet machine.
  """
  if not paths:
    yield
    return
  import fcntl  # Unix only.

  with contextlib.ExitStack() as stack:
    for path in paths:
      fcntl.flock(stack.enter_context(open(path, "a")), fcntl.LOCK_EX)
    yield


def command_of(
    python: str, module: str, size: str, work: str, shape: Shape,
) -> list[str]:
  rows = [f"--rows={shape.rows}"] if shape.rows else []
  return [python, "-m", module, f"--size={size}", f"--work={work}", *rows]


OURS = sys.executable
