"""Oracles: worked values, and a loop in NumPy."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from posttrain.objectives import importance_sampling

ROWS = {  # Differences of logprobs, trainer less sampler, and their ratios.
    "near": ([.1, -.2, .3], [1.105171, .818731, 1.349859]),
    "likelier": ([.6, .5, .4], [1.822119, 1.648721, 1.491825]),
    "less likely": ([-1, -1, -1], [.367879, .367879, .367879])}


def run(differences, mask=None, **options):
  difference = np.array([differences], np.float32)
  mask = np.ones(difference.shape, bool) if mask is None else np.array([mask])
  factors, sums = importance_sampling.correction(
      difference - 3, np.full_like(difference, -3), mask, **options)
  return np.asarray(factors)[0], {k: float(x) for k, x in sums.items()}


@pytest.mark.parametrize("name", ROWS)
def test_worked_values(name):
  """TIS with a cap of 2 keeps all; IcePop within .5 and 5 leaves out e^-1."""
  differences, ratios = ROWS[name]
  factors, sums = run(differences, kind="truncate", cap=2.0)
  np.testing.assert_allclose(factors, ratios, rtol=1e-5)
  assert sums["importance/clipped"] == 0
  factors, sums = run(differences, kind="mask", cap=5.0, floor=0.5)
  left = 0 if name == "less likely" else 1
  np.testing.assert_allclose(factors, np.array(ratios) * left, rtol=1e-5)
  assert sums["importance/clipped"] == 3 * (1 - left)
  assert run([math.log(4.481689)], kind="truncate", cap=2.0)[0] == 2


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    st.lists(st.tuples(st.floats(-4, 4, width=32), st.booleans()),
             min_size=5, max_size=5),
    st.sampled_from(["truncate", "mask"]))
def test_it_is_the_loop(tokens, kind):
  differences, mask = zip(*tokens, strict=True)
  factors, sums = run(differences, mask, kind=kind, cap=2.0, floor=0.5)
  ratios, clipped = [], 0
  for factor, difference, counted in zip(
      factors, differences, mask, strict=True):
    ratio = math.exp(difference) if counted else 1.0
    if abs(ratio - 2) < 1e-4 or abs(ratio - 0.5) < 1e-4:
      hypothesis.reject()
    out = ratio > 2 or (kind == "mask" and ratio < 0.5)
    wanted = (0.0 if kind == "mask" else 2.0) if out else ratio
    assert factor == pytest.approx(wanted, rel=1e-4)
    if counted:
      ratios.append(ratio)
      clipped += out
  assert sums["importance/clipped"] == clipped
  assert sums["importance/ratio"] == pytest.approx(sum(ratios), rel=1e-4)
  assert sums["importance_max"] == pytest.approx(
      max(ratios, default=0), rel=1e-4)
  assert sums["importance_inverse_max"] == pytest.approx(
      max((1 / ratio for ratio in ratios), default=0), rel=1e-4)
