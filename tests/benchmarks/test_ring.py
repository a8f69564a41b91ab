"""Oracle: rows alike, whose blocks can be counted by hand."""

import numpy as np
import pytest

from benchmarks import ring


def test_rows_of_one_length():
  """Blocks of one slot are what is in use; one block is the whole ring."""
  lengths = np.full(4, 100)
  one, used = ring.fetched(lengths, rows=4, prompt=28, block=1)
  assert one == used
  # A ring of 64, then 96 and 160 before what is held and a chunk are more.
  sizes = np.repeat([64, 96, 160, 160], 32)[:100]
  assert used == pytest.approx((28 + np.arange(1, 101)).sum() / sizes.sum())
  whole, _ = ring.fetched(lengths, rows=4, prompt=28, block=160)
  assert whole == 1
