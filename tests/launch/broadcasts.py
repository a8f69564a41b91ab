"""Prints what process 0 tells the other without waiting for it.

Process 1 is slow to begin with, so that process 0 comes to be ahead of it.
"""

import sys
import time

import jax
from jax._src import distributed as store

from posttrain import distributed


def keys() -> int:
  """Messages that are in the store now, of all parts."""
  return len(store.global_state.client.key_value_dir_get_bytes(
      distributed.STORE))


def tell(value):
  return distributed.on_first_host(lambda: value, wait=False)


def refuse():
  raise ValueError("no more")


def main():
  distributed.initialize()
  me = jax.process_index()
  distributed.on_first_host(lambda: None)  # Both are here.
  started = time.monotonic()
  time.sleep(1.5 * me)
  few = [tell((n, me)) for n in range(10)]
  took = time.monotonic() - started
  print(f"process {me}: {few == [(n, 0) for n in range(10)]}, "
        f"at once {took < 1}", flush=True)
  same, most = True, 0
  for n in range(200):
    size = 3_000_000 if n % 100 == 7 else n
    same &= tell((n, "x" * size)) == (n, "x" * size)
    if n % 50 == 0:
      same &= distributed.on_first_host(lambda n=n: n) == n
    if n % 10 == 0:
      most = max(most, keys())
  print(f"process {me}: {same}, few keys {most < 100}", flush=True)
  try:
    distributed.on_first_host(refuse, wait=False)
  except ValueError as error:
    print(f"process {me}: {error}", flush=True)
  print(f"process {me}: {keys()} keys are left", flush=True)
  distributed.on_first_host(lambda: None)


if __name__ == "__main__":
  sys.exit(main())
