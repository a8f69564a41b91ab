"""An engine under two processes does what it does under one.

A stop string is found on each host by itself, in tokens that were fetched and
are the same everywhere: nothing of it is sent, and no host waits for another.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.sampler import two_hosts

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
  path = tmp_path_factory.mktemp("hosts")
  done = subprocess.run(
      [sys.executable, "launch/local.py", "--processes=2",
       "--devices-per-process=2", "--module=tests.sampler.two_hosts", "--",
       str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-4000:]
  return [json.loads((path / f"{i}.json").read_text()) for i in range(2)]


def test_both_hosts_admit_and_return_the_same(hosts):
  """To the last bit of the logprobs."""
  assert hosts[0] == hosts[1]
  reasons = {done["finish_reason"] for done in hosts[0]["results"]}
  assert {"stop", "abort", "error", "eos"} <= reasons
  errors = [done["error"] for done in hosts[0]["results"]]
  assert sum("was released" in error for error in errors) == 3
  assert min(hosts[0]["counted"]) > 0  # Reused, and evicted too.
  assert sum(done["surplus"] for done in hosts[0]["results"]) > 0


def test_two_hosts_are_one(hosts):
  """The mesh is the same, so the schedule is, too; sums may round apart."""
  alone = two_hosts.serve()
  assert hosts[0]["admitted"] == alone["admitted"]
  for name in ("host_syncs", "counted"):
    assert hosts[0][name] == alone[name]
  assert hosts[0]["cached"] == [list(tokens) for tokens in alone["cached"]]
  assert hosts[0]["programs"] == alone["programs"]
  for a, b in zip(hosts[0]["results"], alone["results"], strict=True):
    np.testing.assert_allclose(
        a.pop("logprobs"), b.pop("logprobs"), rtol=0, atol=5e-5)
    assert a == b
