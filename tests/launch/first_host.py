"""Prints the results of `distributed.on_first_host` on each process."""

import os
import sys
import time

import jax
import numpy as np

from posttrain import distributed, workdir


class Odd(Exception):
  """Not known to other hosts, and made from other arguments than its text."""

  def __init__(self, a, b):
    super().__init__(f"{a}{b}")


def scores():
  """More than one message of the store."""
  return [
      str(jax.process_index()), np.full((3, 2), os.getpid()), "x" * 5_000_000]


def fail(error):
  raise error


def main():
  distributed.initialize()
  me = jax.process_index()
  time.sleep(float(os.environ.get("SLEEP", "0")) * (me == 0))
  index, array, text = distributed.on_first_host(scores)
  print(f"process {me}: {index} {array.shape} {(array == array[0, 0]).all()} "
        f"{len(text)} own {bool(array[0, 0] == os.getpid())}", flush=True)
  called = []
  for error in (ValueError("no gold"), workdir.WorkdirError("in use"),
                Odd("a", "b"), OSError(28, "No space left")):
    try:
      distributed.on_first_host(lambda e=error: called.append(1) or fail(e))
    except Exception as raised:
      print(f"process {me}: {type(raised).__name__}: {raised}", flush=True)
  print(f"process {me}: called {len(called)} times", flush=True)
  print(f"process {me}: {distributed.on_first_host(lambda: me)} goes on",
        flush=True)


if __name__ == "__main__":
  sys.exit(main())
