"""Limits: who is named, and who is not. Two real processes are in
tests/stages/test_hosts_run.py."""

import numpy as np
import pytest

from posttrain.train import hosts


@pytest.mark.parametrize("own, wall, named", [
    ([5.0, 1.0], 20.0, [0]),
    ([1.0, 5.0, 1.1, 0.9], 20.0, [1]),
    ([1.0, 5.0, 9.0, 0.9], 20.0, [2, 1]),
    ([1.0, 2.0, 1.1, 0.9], 20.0, []),  # Not more than twice the median.
    ([1.0, 2.9, 1.1, 0.9], 20.0, []),  # Less than a tenth of the time.
    ([0.1, 0.9, 0.1, 0.1], 2.0, []),  # Less than a second.
    ([8.0, 8.0, 8.0, 8.0], 20.0, []),
])
def test_a_host_that_holds_others_up_is_named(own, wall, named):
  found = hosts.slow_hosts(np.array(own), wall)
  assert [process for process, _, _ in found] == named


@pytest.mark.parametrize("waits, named", [
    ([70.0, 0.0, 65.0], [1]),
    ([0.0, 70.0, 0.0], [0, 2]),
    ([70.0, 0.0, 5.0], []),  # One has just begun to wait.
    ([70.0, 70.0, 70.0], []),  # All wait for their devices.
    ([0.0, 0.0, 0.0], []),
])
def test_a_host_that_all_others_wait_for_is_named(waits, named):
  assert hosts.stuck_hosts(dict(enumerate(waits))) == named


def test_silence_is_told_once_and_so_is_a_return():
  now = [0.0]
  silence = hosts.Silence(clock=lambda: now[0])
  beats = {0: 0, 1: 0, 2: 0}

  def after(seconds, *alive):
    now[0] += seconds
    for host in alive:
      beats[host] += 1
    return silence.update({host: str(n) for host, n in beats.items()})

  half = hosts.SILENT / 2
  assert after(0, 0, 1, 2) == ([], [])
  assert after(half, 0, 2) == ([], [])
  assert after(half, 0, 2) == ([1], [])
  assert after(half, 0) == ([], [])
  assert after(half, 0, 1) == ([2], [1])
  assert after(half, 0, 1, 2) == ([], [2])


def test_alone_nothing_is_compared():
  warnings = []
  alone = hosts.Hosts(warnings.append)
  alone.begin()
  assert alone.compare() == {}
  alone.end()
  assert not warnings
