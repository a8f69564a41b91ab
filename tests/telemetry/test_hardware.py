"""Worked values; peaks by the names that libtpu gives its devices."""

import mmap
import types

import jax
import pytest

from posttrain.plan import topology
from posttrain.telemetry import chips, hardware


def devices(monkeypatch, kind, count, stats=None):
  one = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)
  for name in ("devices", "local_devices"):
    monkeypatch.setattr(jax, name, lambda: [one] * count)
  monkeypatch.setattr(jax, "device_count", lambda: count)


@pytest.mark.parametrize("kind, count, num_chips, peak", [
    ("TPU v5 lite", 8, 8, 8 * 197e12),
    ("TPU v5p", 4, 4, 4 * 459e12),
    ("TPU7x", 8, 4, 4 * 2307e12),  # Two devices to a chip.
    ("NVIDIA H100 80GB HBM3", 2, 2, 2 * 989e12),
])
def test_the_peak_of_all_devices(monkeypatch, kind, count, num_chips, peak):
  devices(monkeypatch, kind, count)
  found = hardware.find()
  assert (found.chips, found.peak) == (num_chips, pytest.approx(peak))
  assert found.mfu("perf/mfu", peak, 4.0) == {
      "perf/mfu": pytest.approx(0.25)}


def test_without_a_known_peak_there_is_no_mfu():
  found = hardware.find()
  assert found.kind == "cpu" and found.chips == jax.device_count()
  assert found.mfu("perf/mfu", 1e12, 1.0) == {}


def test_every_chip_that_is_planned_for_has_its_kinds():
  kinds = [kind for chip in chips.CHIPS.values() for kind in chip.kinds]
  assert len(set(kinds)) == len(kinds)
  for name, chip in topology.CHIPS.items():
    assert [chips.find(kind) for kind in chip.kinds] == [chip] * len(
        chip.kinds), name


def test_memory_is_that_of_the_fullest_device(monkeypatch):
  devices(monkeypatch, "TPU v5p", 2, dict(
      bytes_in_use=3, peak_bytes_in_use=5, bytes_limit=9))
  assert hardware.memory_in_use() == {
      "perf/device_bytes": 3, "perf/device_bytes_peak": 5}


@pytest.mark.skipif(
    not hardware.PAGES.exists(), reason="the process's size is Linux's")
def test_without_device_statistics_it_is_the_processs():
  before = hardware.memory_in_use()
  assert set(before) == {"perf/host_bytes"}
  # Pages of its own: an array could lie in memory that was freed before.
  with mmap.mmap(-1, 2**25) as more:
    for page in range(0, len(more), mmap.PAGESIZE):
      more[page] = 1
    grown = hardware.memory_in_use()["perf/host_bytes"]
  assert grown - before["perf/host_bytes"] == pytest.approx(2**25, rel=.5)
