"""Splits: training, validation and test, by a hash of a problem's numbers.

The split of a multiset of numbers never changes: it does not depend on the
range that problems are drawn from, their number, a seed or the machine.
"""

import functools
import hashlib
from collections.abc import Iterable

# Shares of all multisets, in hundredths.
SPLITS = {"train": range(70), "validation": range(70, 85),
          "test": range(85, 100)}


def split_of(numbers: Iterable[int]) -> str:
  """Returns the split that every ordering of these numbers is in."""
  return _split_of(tuple(sorted(numbers)))


def require_split(split: str, task: str) -> None:
  if split not in SPLITS:
    raise ValueError(
        f"{task} has no split {split!r}. Use one of {', '.join(SPLITS)}.")


@functools.lru_cache(maxsize=100_000)
def _split_of(multiset: tuple[int, ...]) -> str:
  digest = hashlib.sha256(" ".join(map(str, multiset)).encode()).digest()
  hundredth = int.from_bytes(digest[:8], "big") % 100
  return next(name for name, part in SPLITS.items() if hundredth in part)
