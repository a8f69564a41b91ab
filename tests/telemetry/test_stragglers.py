"""Limits: who is named, and who is not. Two real processes are in
tests/stages/test_hosts_run.py."""

import numpy as np
import pytest

from posttrain import host_connections
from posttrain.telemetry import stragglers


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
  found = stragglers.slow_hosts(np.array(own), wall)
  assert [process for process, _, _ in found] == named


@pytest.mark.parametrize("waits, named", [
    ([70.0, 0.0, 65.0], [1]),
    ([0.0, 70.0, 0.0], [0, 2]),
    ([70.0, 0.0, 5.0], []),  # One has just begun to wait.
    ([70.0, 70.0, 70.0], []),  # All wait for their devices.
    ([0.0, 0.0, 0.0], []),
])
def test_a_host_that_all_others_wait_for_is_named(waits, named):
  assert stragglers.stuck_hosts(dict(enumerate(waits))) == named


def test_silence_is_told_once_and_so_is_a_return():
  told = []
  watched = stragglers.Stragglers(told.append)

  def look(*silences, waits=()):
    told.clear()
    watched.check(dict(enumerate(silences, 1)), dict(enumerate(waits)),
                 "process {}".format)
    return [(text.split()[1], "heard" in text) for text in told]

  limit = host_connections.SILENT
  assert look(0.0, 0.9 * limit) == []
  assert look(0.0, limit) == [("2", True)]
  assert look(0.0, 2 * limit) == []
  assert look(limit, 0.0) == [("1", True), ("2", False)]
  assert look(0.0, 0.0) == [("1", False)]
  assert "is back" in told[0]


def test_one_that_is_silent_does_not_count_as_hanging():
  told = []
  watched = stragglers.Stragglers(told.append)
  waits = {0: 70.0, 1: 0.0, 2: 70.0}
  watched.check({1: 100.0}, waits, str)
  assert len(told) == 1 and "has not been heard of" in told[0]
  watched.check({1: 0.0}, waits, str)
  assert len(told) == 3 and "all others have waited for 1" in told[2]
  watched.check({1: 0.0}, waits, str)
  assert len(told) == 3


def test_alone_nothing_is_compared():
  warnings = []
  alone = stragglers.Stragglers(warnings.append)
  alone.begin()
  assert alone.compare() == {}
  alone.end()
  assert not warnings
