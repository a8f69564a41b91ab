"""Oracles: what packing must preserve, for any examples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import pack

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=40)


def make(sizes):
  """Examples whose every value is distinct and not the padding."""
  ends = np.cumsum(sizes)
  return [
      {"tokens": np.arange(end - size + 1, end + 1, dtype=np.int32),
       "advantages": np.arange(size, dtype=np.float32) - n - 0.5,
       "loss_mask": np.ones(size, bool)}
      for n, (size, end) in enumerate(zip(sizes, ends, strict=True))]


@given(sizes=SIZES, length=st.integers(12, 20))
def test_every_example_is_there_once_whole_and_apart(sizes, length):
  examples = make(sizes)
  arrays, placement = pack.pack_rows(examples, length=length)
  tokens = arrays["tokens"]
  np.testing.assert_array_equal(
      np.sort(tokens[tokens > 0]), np.arange(1, sum(sizes) + 1))
  seen = set()
  for row in range(len(tokens)):
    segment_ids = arrays["segment_ids"][row]
    # Segments are contiguous, counted from 1, and padding comes last.
    used = segment_ids[segment_ids > 0]
    assert (segment_ids[:used.size] > 0).all()
    assert (np.diff(used) >= 0).all()
    for segment in range(1, used.max() + 1):
      at = segment_ids == segment
      np.testing.assert_array_equal(
          arrays["positions"][row, at], np.arange(at.sum()))
      [n] = np.flatnonzero(
          (placement.row == row) & (placement.segment == segment))
      seen.add(n)
      for name, column in examples[n].items():
        np.testing.assert_array_equal(arrays[name][row, at], column)
      assert placement.start[n] == np.flatnonzero(at)[0]
  assert seen == set(range(len(sizes)))
  for column in arrays.values():
    assert not column[arrays["segment_ids"] == 0].any()


@given(sizes=SIZES, length=st.integers(12, 20))
def test_rows_are_within_the_bound_of_first_fit_decreasing(sizes, length):
  fewest = -(-sum(sizes) // length)  # No packing needs less.
  best = max(fewest, sum(size > length // 2 for size in sizes))
  rows = pack.first_fit(sizes, length=length).row.max() + 1
  # Against a lower bound of the optimum, the weaker factor of any first-fit.
  assert rows <= 1.7 * best + 1


def test_a_worked_packing():
  placement = pack.first_fit([3, 7, 2, 5, 3], length=10)
  np.testing.assert_array_equal(placement.row, [0, 0, 1, 1, 1])
  np.testing.assert_array_equal(placement.start, [7, 0, 8, 0, 5])
  np.testing.assert_array_equal(placement.segment, [2, 1, 3, 1, 2])


def test_dtypes_and_extra_rows():
  examples = make([2, 3])
  arrays = pack.assemble(
      examples, pack.first_fit([2, 3], length=4), rows=5, length=4)
  kinds = {name: (a.shape, str(a.dtype)) for name, a in arrays.items()}
  assert kinds == {
      "tokens": ((5, 4), "int32"), "advantages": ((5, 4), "float32"),
      "loss_mask": ((5, 4), "bool"), "positions": ((5, 4), "int32"),
      "segment_ids": ((5, 4), "int32")}


def test_nothing_is_lost_silently():
  with pytest.raises(ValueError, match="Raise sequence_length"):
    pack.pack_rows(make([3, 5]), length=4)
  with pytest.raises(ValueError, match="0 to 3 tokens"):
    pack.pack_rows([*make([3]), {
        name: column[:0] for name, column in make([3])[0].items()}], length=4)
  with pytest.raises(ValueError, match="different lengths"):
    pack.pack_rows([{"a": np.zeros(2), "b": np.zeros(3)}], length=4)
  with pytest.raises(ValueError, match="example 1 has the columns"):
    pack.pack_rows([{"a": np.zeros(2)}, {"b": np.zeros(2)}], length=4)
  with pytest.raises(ValueError, match="'positions'"):
    pack.pack_rows([{"positions": np.zeros(2)}], length=4)
  with pytest.raises(ValueError, match="no examples"):
    pack.pack_rows([], length=4)
