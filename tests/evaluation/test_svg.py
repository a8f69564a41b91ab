"""Axes are exact maps, ticks are round, thinning keeps means."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from posttrain.evaluation import svg

# Above the smallest range that 12 digits of a tick can tell apart.
FLOATS = st.floats(-1e6, 1e6, allow_nan=False)


def test_an_axis_maps_its_ends_and_is_linear():
  axis = svg.Axis(10.0, 20.0, first=100, last=0)
  assert [axis(v) for v in (10, 15, 20)] == [100, 50, 0]


def test_doublings_are_equally_far_apart():
  axis = svg.Axis(1.0, 64.0, first=0, last=600, kind="log2")
  assert [axis(2.0**i) for i in range(7)] == [100 * i for i in range(7)]
  assert axis.ticks() == [2.0**i for i in range(7)]


def test_zero_thinking_tokens_have_a_place():
  axis = svg.value_axis([0.0, 64.0], 0, 700, kind="log2")
  assert axis(0.0) < axis(1.0) < axis(2.0)
  assert axis.ticks()[:2] == [0.0, 1.0]


def test_decades_are_equally_far_apart():
  axis = svg.Axis(1e-6, 1e-2, first=0, last=400, kind="log")
  assert [axis(10.0**e) for e in range(-6, -1)] == [0, 100, 200, 300, 400]
  np.testing.assert_allclose(axis.ticks(), [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])


@pytest.mark.parametrize("low, high, ticks", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 7, [-2, 0, 2, 4, 6]),
    (0, 128, [0, 50, 100]), (0.31, 0.33, [0.31, 0.315, 0.32, 0.325, 0.33])])
def test_worked_ticks(low, high, ticks):
  np.testing.assert_allclose(svg.nice_ticks(low, high), ticks)


@hypothesis.settings(deadline=None)  # A busy machine is not a failure.
@hypothesis.given(FLOATS, st.floats(1e-3, 1e6))
def test_ticks_lie_within_and_are_multiples_of_a_round_step(low, span):
  high = low + span
  ticks = svg.nice_ticks(low, high)
  assert 2 <= len(ticks) <= 7
  assert low - 1e-6 * span <= ticks[0] and ticks[-1] <= high + 1e-6 * span
  step = ticks[1] - ticks[0]
  lead = round(step / 10.0 ** math.floor(math.log10(step) + 1e-6), 3)
  assert lead in (1.0, 2.0, 5.0)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.lists(FLOATS, min_size=1, max_size=20), st.booleans())
def test_an_axis_holds_its_values(values, with_zero):
  axis = svg.value_axis(values, 200, 0, with_zero=with_zero)
  assert axis.low <= min(values) and max(values) <= axis.high
  assert all(-0.01 <= axis(v) <= 200.01 for v in values)
  if with_zero and min(values) >= 0:
    assert axis.low == 0


def test_thinning_averages_groups_and_keeps_gaps():
  line = svg.Line("x", xs=[1, 2, 3, 4, 5], ys=[1.0, 3.0, None, None, 7.0])
  thin = svg.thinned(line, 2)
  assert list(thin.xs) == [1.5, 3.5, 5]
  assert list(thin.ys) == [2.0, None, 7.0]
  assert svg.group_size(line) == 1
  long = svg.Line("y", xs=range(1000), ys=[0.0] * 1000)
  assert svg.group_size(long) == 4


def test_a_path_lifts_the_pen_at_a_gap():
  assert svg.path([(0, 1), (2, 3), None, (4, 5)]) == "M0 1L2 3M4 5"
