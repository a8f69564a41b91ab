r"""Ring cache: the share that the decode kernel fetches, modelled, not run.

  python -m benchmarks.ring --mean=1024 --prompt=128

Requests of lognormal lengths go through an engine's rows; the ring grows and
shrinks by the engine's rule. For every step it counts the blocks of slots in
which a live row has tokens, and all blocks, which plain attention reads.
"""

import argparse
from collections import deque

import numpy as np

from benchmarks.batching import lognormal_lengths
from posttrain.model.decode_kernel import MOST_SLOTS
from posttrain.sampler import requests


def fetched(
    lengths: np.ndarray, *, rows: int, prompt: int, block: int, chunk: int = 32,
) -> tuple[float, float]:
  """Returns shares of the ring, over all steps: blocks fetched, slots in use.

  Args:
    lengths: new tokens of each request, in the order of the queue.
  """
  sizes = requests.Settings(
      rows, prompt + int(lengths.max()) + chunk, chunk=chunk).sizes
  queue, size, index = deque(lengths.tolist()), sizes[0], 0
  held, left = np.zeros(rows, int), np.zeros(rows, int)
  total = np.zeros(3)  # Slots fetched, in use, of the ring.
  while queue or left.any():
    for row in np.flatnonzero(left == 0)[:len(queue)]:
      held[row], left[row] = prompt, queue.popleft()
    needed = held[left > 0].max() + chunk
    for resized in requests.fitting(sizes, size, needed):
      size = resized
    for _ in range(chunk):
      live = left > 0
      if not live.any():
        break
      index, held, left = index + 1, held + live, left - live
      part = min(block, size)
      # The row's slots are those up to `index`, in a line without end.
      blocks = index // part - (index - held + 1) // part + 1
      blocks = np.minimum(blocks, size // part)[live].sum()
      total += blocks * part, held[live].sum(), rows * size
  return total[0] / total[2], total[1] / total[2]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--requests", type=int, default=512)
  parser.add_argument("--rows", type=int, default=32)
  parser.add_argument("--mean", type=int, default=1024)
  parser.add_argument("--prompt", type=int, default=128)
  parser.add_argument("--tail", type=float, default=8)
  parser.add_argument("--block", type=int, default=MOST_SLOTS)
  args = parser.parse_args()
  lengths = lognormal_lengths(args.requests, args.mean, args.tail)
  share, used = fetched(
      lengths, rows=args.rows, prompt=args.prompt, block=args.block)
  print(f"lengths {lengths.mean():.0f} in the mean, {lengths.max()} at most; "
        f"blocks of {args.block}: {share:.1%} of the ring fetched, "
        f"{used:.1%} in use")


if __name__ == "__main__":
  main()
