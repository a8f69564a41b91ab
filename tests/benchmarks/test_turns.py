"""Processes that take turns, the lines that come of it, and their table."""

import json
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks import systems, table, turns

SLOW = """
import time
from benchmarks import serve
for run in serve.runs(100):
  print("noise that is no answer")
  time.sleep(0.05)
"""
LAZY = """
from benchmarks import serve
turns = serve.Turns(100)
turns.begin()
turns.end(99)
"""
MACHINE = """
import json, sys
for number, line in enumerate(sys.stdin):
  print(json.dumps({"seconds": [9, 3, 2, 4][number], "flops_per_sec": 1e9,
                    "bytes_per_sec": 1e9}), flush=True)
"""
KEYS = {"system", "work", "size", "tokens_per_cpu_s", "tokens_per_s",
        "share_of_limit", "peak_rss_mb", "shape"}


def python(code):
  return [sys.executable, "-c", code]


def test_systems_take_turns_and_their_noise_is_no_answer(tmp_path):
  taken, machine = turns.take(
      {"one": python(SLOW), "other": python(SLOW)}, python(MACHINE),
      repeats=3, locks=[str(tmp_path / "lock")])
  for found in taken.values():
    assert len(found.rounds) == 3  # The one that warms up is not among them.
    assert found.median("wall") >= 0.05 > found.median("cpu")
    assert found.peak_rss_mb > 1
  assert machine["seconds"] == 3  # Of 3, 2 and 4; 9 was the warm-up.


def test_a_system_that_does_less_than_the_work_is_an_error():
  with pytest.raises(RuntimeError, match="100 tokens, and 99 were made"):
    turns.take({"lazy": python(LAZY)}, python(MACHINE), repeats=1)


def test_a_line_has_the_keys_that_are_promised(monkeypatch, tmp_path, capsys):
  found = turns.Taken(tuple(
      {"wall": wall, "cpu": 2 * wall, "peak_rss_mb": 100 * wall}
      for wall in (4.0, 2.0, 9.0)))
  monkeypatch.setattr(
      turns, "take", lambda commands, machine, **unused: (
          dict.fromkeys(commands, found),
          {"seconds": 1.0, "flops_per_sec": 1e9, "bytes_per_sec": 1e9}))
  path = tmp_path / "lines"
  command.main(["--size=10m", f"--json={path}", "--work=sft"])
  line, = map(json.loads, path.read_text().splitlines())
  assert line == {
      "system": "posttrain", "work": "sft", "size": "10m",
      "tokens_per_cpu_s": 4096 / 8, "tokens_per_s": 4096 / 4,
      "share_of_limit": 0.25, "peak_rss_mb": 900, "shape": "8 x 512"}
  assert set(line) == KEYS
  assert "| sft 10m | 8 x 512 | posttrain | 1,024 |" in capsys.readouterr().out


def line(system, speed, peak):
  return {"system": system, "work": "grpo", "size": "10m", "shape": "s",
          "tokens_per_s": speed, "tokens_per_cpu_s": speed / 2,
          "share_of_limit": 0.5, "peak_rss_mb": peak}


def test_the_table_compares_ours_and_says_what_is_missed():
  rows = table.of([line("posttrain", 300, 10), line("trl", 100, 30),
                   line("tunix", 200, 15)]).splitlines()
  assert rows[3].endswith("| 3.00 | 3.00 | 3.00 / 2.5 met | 0.33 / 0.5 met |")
  assert rows[4].endswith(
      "| 1.50 | 1.50 | 1.50 / 2.5 missed | 0.67 / 0.5 missed |")


def test_every_target_is_of_a_peer_that_does_the_work():
  for size, work, peer in systems.TARGETS:
    assert work in systems.PEERS[peer].works
    assert peer in systems.peers_of(size, work)
  assert set(systems.MEMORY) <= set(systems.TARGETS)
