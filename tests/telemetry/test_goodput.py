"""Oracles: times that a test sets itself, and a run that is really killed."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import workdir
from posttrain.telemetry import goodput


@dataclasses.dataclass
class Clock:
  """One time for all; `compiled` of it went to compiling."""

  now: float = 1000.0
  compiled: float = 0.0

  def run(self, seconds: float, compiling: float = 0.0) -> None:
    self.now += seconds + compiling
    self.compiled += compiling

  def open(self, path) -> goodput.Ledger:
    return goodput.Ledger(
        path, wall=lambda: self.now, clock=lambda: self.now,
        compiled=lambda: self.compiled)


@pytest.mark.parametrize("content", [
    b"", b'{"written": 1', b"\xff", b"[]", b"{}",
    b'{"written": 1, "starts": 1, "seconds": {}, "marks": []}',
    b'{"written": 1, "starts": "1", "seconds": {}, "marks": [[1]]}'])
def test_a_damaged_record_is_begun_anew(tmp_path, content):
  """It is accounting: the run goes on, and says so."""
  path, said = tmp_path / "goodput.json", []
  path.write_bytes(content)
  ledger = goodput.Ledger(path, warn=said.append)
  ledger.begin(0)
  [line] = said
  assert line.startswith(f"{path} is damaged: ")
  assert (tmp_path / "goodput.json.damaged").read_bytes() == content
  assert goodput.read(path)["starts"] == 1
  assert goodput.Ledger(path, warn=said.append).line()
  assert len(said) == 1


def test_a_stage_that_is_killed_twice(tmp_path):
  clock, path = Clock(), tmp_path / "goodput.json"
  ledger = clock.open(path)
  clock.run(5, compiling=2)
  ledger.begin(0)
  with ledger.span("input_wait"):
    clock.run(1)
  with ledger.span("dispatch"):  # A part of training, but for compiling.
    clock.run(20, compiling=4)
  with ledger.span("checkpoint"):
    clock.run(3, compiling=1)
  ledger.mark(10)
  clock.run(7)
  assert ledger.seconds() == {
      "train": 27, "compile": 7, "input_wait": 1, "checkpoint": 3,
      "evaluation": 0, "profile": 0, "setup": 5, "restart": 0}
  assert ledger.goodput() == 27 / 43
  ledger.tick()  # Seven seconds are not old yet.
  clock.run(4)
  ledger.tick()
  clock.run(6)  # Then it is killed: these six are not on record.

  clock.run(30)
  ledger = clock.open(path)
  clock.run(8, compiling=1)
  ledger.begin(10)
  # 11 s after the checkpoint, 36 s without a record, 8 s of setting up.
  assert ledger.seconds() == {
      "train": 20, "compile": 8, "input_wait": 1, "checkpoint": 3,
      "evaluation": 0, "profile": 0, "setup": 5, "restart": 55}
  clock.run(9)

  # Killed before another checkpoint: all of that is made again.
  ledger = clock.open(path)
  ledger.begin(10)
  assert ledger.seconds()["train"] == 20
  assert ledger.seconds()["restart"] == 55 + 9
  assert sum(ledger.seconds().values()) == clock.now - 1000
  assert "in 3 starts" in ledger.line()


@pytest.fixture(scope="module")
def no_disk():
  """Without waiting for the disk at every write."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(workdir, "replace_file", pathlib.Path.write_bytes)
    yield


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(
    st.sampled_from(["span", "train", "mark", "kill", "write"]),
    st.sampled_from(goodput.NAMES[2:5]), st.integers(0, 50),
    st.integers(0, 5))))
def test_the_parts_are_all_of_the_time(
    no_disk, tmp_path_factory, events):
  clock = Clock()
  path = tmp_path_factory.mktemp("ledger") / "goodput.json"
  saved, trained, kept = 0, 0.0, 0.0
  ledger = clock.open(path)
  ledger.begin(0)
  for step, (event, name, seconds, compiling_for) in enumerate(events, 1):
    if event == "span":
      with ledger.span(name):
        clock.run(seconds, compiling_for)
    elif event == "mark":
      ledger.mark(step)
      saved, kept = step, trained
    elif event == "kill":
      ledger.write()
      clock.run(seconds)
      ledger = clock.open(path)
      ledger.begin(saved)
      trained = kept
    elif event == "write":
      ledger.write()
    else:
      clock.run(seconds, compiling_for)
      trained += seconds
    assert ledger.seconds()["train"] == pytest.approx(trained)
    assert sum(ledger.seconds().values()) == pytest.approx(clock.now - 1000)


def test_other_hosts_write_nothing(tmp_path):
  ledger = goodput.Ledger(tmp_path / "goodput.json", write=False)
  ledger.begin(0)
  ledger.mark(1)
  assert not list(tmp_path.iterdir())


KILLED = textwrap.dedent("""
    import sys, time
    from posttrain.telemetry import goodput
    ledger = goodput.Ledger(__import__("pathlib").Path(sys.argv[1]))
    first = int(sys.argv[2])
    ledger.begin(first)
    for step in range(first + 1, 1000):
      time.sleep(0.05)
      if step % 4 == 0:
        ledger.mark(step)
        print(step, flush=True)
""")


def test_a_process_that_is_killed_and_started_again(tmp_path):
  """Lost steps are no training any more; the time down is counted."""
  path, first, begun = tmp_path / "goodput.json", 0, time.time()
  for _ in range(2):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), str(first)],
        stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
      first = int(process.stdout.readline())
    time.sleep(0.1)  # Within the next four steps.
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
  time.sleep(1)
  ledger = goodput.Ledger(path)
  ledger.begin(first)
  seconds, record = ledger.seconds(), json.loads(path.read_text())
  wall = time.time() - begun
  assert record["starts"] == 3
  assert first == 24
  # 24 steps count, of at least 0.05 s each. The rest is down time and steps
  # made again, but for what came before the first record.
  assert 24 * 0.05 <= seconds["train"] < wall - 1
  assert seconds["restart"] >= 1
  assert seconds["train"] + seconds["restart"] == pytest.approx(
      sum(seconds.values()), abs=0.1)
  assert sum(seconds.values()) <= wall


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))))
def test_the_union_of_intervals(pairs):
  """Told in the order of their ends, as compilations are."""
  intervals = sorted((sorted(pair) for pair in pairs), key=lambda p: p[1])
  union = goodput.Union()
  for start, end in intervals:
    union.add(start, end)
  covered = {n for start, end in intervals for n in range(start, end)}
  assert union.seconds == len(covered)


def test_compiling_is_measured():
  """A new program compiles; a call of one that exists does not."""
  before = goodput.compile_seconds()
  program = jax.jit(lambda x: jnp.sort(x * 3.25 + 1)[::-1])
  start = time.monotonic()
  jax.block_until_ready(program(jnp.arange(7.0)))
  wall = time.monotonic() - start
  took = goodput.compile_seconds() - before
  assert 0 < took <= wall
  jax.block_until_ready(program(jnp.arange(7.0)))
  assert goodput.compile_seconds() - before == took
