"""Devices that only sample, on two hosts that have two devices each."""

import numpy as np
import pytest

from tests.test_processes import completions, finish, gradient, rows_of, start

pytestmark = pytest.mark.slow

CHANGES = [
    "stages=reason", "reason.num_steps=4", "reason.num_minibatches=1",
    "reason.rollout.max_num_seqs=0", "reason.loss.kl_in=loss",
    "reason.loss.kl_estimator=k3",
    "reason.checkpoint.keep=4"]
SPLIT = [*CHANGES, "mesh.roles=split", "mesh.sampling.devices=1"]
STALE = [*SPLIT, "reason.staleness=1",
         "reason.loss.importance_sampling=truncate"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  base = tmp_path_factory.mktemp("split")
  one, hosts = base / "one", base / "hosts"
  finish(start(one, CHANGES, 1))
  finish(start(hosts, SPLIT, 2, processes=2))
  return one, hosts


def test_the_first_step_draws_the_same(paths):
  """None of these completions is broken at a near tie."""
  one, hosts = paths
  assert completions(hosts, 0) == completions(one, 0)


def test_its_gradient_is_the_same(paths):
  one, hosts = paths
  row = rows_of(one, "reason")[0]
  assert row["grad_norm"] > 1e-3
  wanted, found = gradient(one, 1), gradient(hosts, 1)
  assert wanted.keys() == found.keys() and len(wanted) > 5
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5)


def test_drawing_ahead_on_two_hosts_is_drawing_ahead_on_one(tmp_path):
  """The same parts of devices, by one process and by two."""
  one, hosts = tmp_path / "one", tmp_path / "hosts"
  finish(start(one, [*STALE, "mesh.sampling.devices=2"], 4))
  finish(start(hosts, STALE, 2, processes=2))
  a, b = rows_of(one, "reason"), rows_of(hosts, "reason")
  assert [row["staleness"] for row in b] == [0, 1, 1, 1]
  for step in range(2):  # Both by the policy before any update.
    assert completions(one, step) == completions(hosts, step)
  for name in ("loss", "grad_norm", "importance/ratio"):
    for x, y in zip(a[:2], b[:2], strict=True):
      assert x.get(name) == pytest.approx(y.get(name), rel=1e-4, abs=1e-6)
