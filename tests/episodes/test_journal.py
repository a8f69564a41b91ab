"""What was written is told again at the same moments, and nothing else."""

import math
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from posttrain import workdir
from posttrain.episodes import journal
from posttrain.episodes.call import Call, Result

MADE_WITH = {"seed": 3, "section": {"rewards": ["a:b"], "rate": 1e-6}}
CALLS = [Call("tasks:judge", ({"id": n}, "text")) for n in range(6)]
# By moment; at the others nothing had ended.
ENDED = {
    2: [(1, Result("ok", 0.1 + 0.2, seconds=0.5)),
        (0, Result("ok", {"x": [1, None, "ä\n\r"]}, output="a\r\nb"))],
    3: [(3, Result("timeout", reason="no answer in 1 s"))],
    7: [(2, Result("error", reason="killed by signal 9", output="\x00")),
        (4, Result("ok", -math.inf))]}


def written(path, moments=8, calls=CALLS):
  book = journal.Journal(path, MADE_WITH)
  for number, call in enumerate(calls):
    assert not book.knows(number, call)
  for moment in range(moments):
    assert not book.replays
    book.write(ENDED.get(moment, []))
  book.close()
  return book


def replayed(book):
  """By moment, what is told again."""
  found, moment = {}, 0
  while book.replays:
    events = book.replay()
    if events:
      found[moment] = events
    moment += 1
  return found


def test_results_are_told_at_their_moments(tmp_path):
  path = tmp_path / "journal" / "step_000004"
  written(path)
  book = journal.Journal(path, MADE_WITH)
  known = [book.knows(number, call) for number, call in enumerate(CALLS)]
  assert known == [True, True, True, True, True, False]
  assert replayed(book) == ENDED
  book.write([])
  book.write([(5, Result("ok", 1))])  # It goes on behind.
  book.close()
  last = {9: [(5, Result("ok", 1))]}
  book = journal.Journal(path, MADE_WITH)
  assert all(book.knows(number, call) for number, call in enumerate(CALLS))
  assert replayed(book) == ENDED | last


def test_a_nan_is_told_too(tmp_path):
  path = tmp_path / "journal"
  book = journal.Journal(path, {})
  book.knows(0, CALLS[0])
  book.write([(0, Result("ok", math.nan))])
  book.close()
  book = journal.Journal(path, {})
  book.knows(0, CALLS[0])
  [(_, result)] = book.replay()
  assert math.isnan(result.value)


def test_a_batch_without_results_leaves_no_file(tmp_path):
  path = tmp_path / "journal" / "step_000004"
  written(path, moments=2)
  assert not path.parent.exists()


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
  """Wherever it was cut: the lines before it are told, and it goes on there."""
  path = tmp_path / "journal"
  written(path)
  whole = path.read_bytes()
  ends = [0, *(n + 1 for n, byte in enumerate(whole) if byte == 10)]
  lines = list(ENDED.items())
  for cut in range(len(whole)):
    path.write_bytes(whole[:cut])
    count = max(sum(end <= cut for end in ends) - 2, 0)
    book = journal.Journal(path, MADE_WITH)
    for number, call in enumerate(CALLS):
      book.knows(number, call)
    assert replayed(book) == dict(lines[:count])
    if cut % 37 == 0:
      book.write([(5, Result("ok", cut))])
      book.close()
      assert len(path.read_bytes().splitlines()) == count + 2
      assert journal.Journal(path, MADE_WITH).knows(5, CALLS[5])


def test_a_damaged_line_ends_what_is_told(tmp_path):
  path = tmp_path / "journal"
  written(path)
  lines = path.read_bytes().splitlines(keepends=True)
  lines[2] = lines[2].replace(b"no answer", b"an answer")
  path.write_bytes(b"".join(lines))
  book = journal.Journal(path, MADE_WITH)
  for number, call in enumerate(CALLS):
    book.knows(number, call)
  assert replayed(book) == {2: ENDED[2]}


@pytest.mark.parametrize("change", [
    {"seed": 4}, {"section": {}}, {"code": "of another version"}])
def test_a_journal_of_other_settings_is_begun_anew(tmp_path, change):
  path, said = tmp_path / "journal", []
  written(path)
  book = journal.Journal(path, MADE_WITH | change, say=said.append)
  assert not book.replays and "other settings" in said[0]
  assert not book.knows(0, CALLS[0])
  book.write([(0, Result("ok", 1))])
  book.close()
  book = journal.Journal(path, MADE_WITH | change)
  book.knows(0, CALLS[0])
  assert replayed(book) == {0: [(0, Result("ok", 1))]}


def test_another_call_is_not_given_its_result(tmp_path):
  """Nor is any call behind it; those before it are told as they were."""
  path, said = tmp_path / "journal", []
  written(path)
  book = journal.Journal(path, MADE_WITH, say=said.append)
  assert all(book.knows(number, CALLS[number]) for number in (0, 1, 3))
  told = [book.replay() for _ in range(4)]
  assert told == [[], [], ENDED[2], ENDED[3]]
  assert book.replays
  assert not book.knows(2, Call("tasks:judge", ({"id": 2}, "other text")))
  assert not book.replays and not book.knows(4, CALLS[4])
  assert "call 2" in said[-1] and "tasks:judge" in said[-1]
  book.write([(4, Result("ok", 7))])
  book.close()
  book = journal.Journal(path, MADE_WITH)
  for number in (0, 1, 3, 4):
    assert book.knows(number, CALLS[number])
  assert replayed(book) == {
      2: ENDED[2], 3: ENDED[3], 4: [(4, Result("ok", 7))]}


def test_calls_that_come_later_than_before_are_made_again(tmp_path):
  path, said = tmp_path / "journal", []
  written(path)
  book = journal.Journal(path, MADE_WITH, say=said.append)
  for number in (0, 1):
    book.knows(number, CALLS[number])
  assert [book.replay() for _ in range(4)] == [[], [], ENDED[2], []]
  assert not book.replays and "call 3" in said[-1]
  assert not book.knows(3, CALLS[3])


def test_a_digest_is_of_values(tmp_path):
  digest = journal.digest_of
  class Thing:
    pass
  assert digest(Call("a:b", (Thing(),))) == digest(Call("a:b", (Thing(),)))
  different = [Call("a:b"), Call("a:c"), Call("a:b", (1,)), Call("a:b", ("1",)),
               Call("a:b", kwargs={"x": 1}), Call("a:b", ("\ud800",)),
               # NumPy shows neither the middle of these nor their last digits.
               *(Call("a:b", (np.eye(1, 2000, n),)) for n in (900, 901)),
               *(Call("a:b", (np.array([x]),)) for x in (1 / 3, 1 / 3 + 1e-15))]
  assert len(set(map(digest, different))) == len(different)
  # The deadline is the stage's; a result does not depend on it.
  assert digest(Call("a:b", seconds=1.0)) == digest(Call("a:b"))


def test_the_writer_is_asked_first(tmp_path):
  """Another run may have taken the workdir."""
  def lost():
    raise RuntimeError("another run")
  path = tmp_path / "journal"
  book = journal.Journal(path, {}, check=lost)
  book.knows(0, CALLS[0])
  book.write([])
  with pytest.raises(RuntimeError, match="another run"):
    book.write([(0, Result("ok", 1))])
  assert not path.exists()


def test_a_full_disk_is_told_with_the_file(tmp_path):
  """And what was written before is there."""
  path = tmp_path / "journal"
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  book = journal.Journal(path, {})
  for number in range(3):
    book.knows(number, CALLS[number])
  book.write([(0, Result("ok", 1))])
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    with pytest.raises(workdir.StorageError, match="journal could not be wr"):
      book.write([(1, Result("ok", "x" * 1000))])
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  book.close()
  assert path.stat().st_size == 500
  book = journal.Journal(path, {})
  assert [book.knows(n, CALLS[n]) for n in range(3)] == [True, False, False]


WRITER = """
import itertools, pathlib, sys
from posttrain.episodes import journal
from posttrain.episodes.call import Call, Result
book = journal.Journal(pathlib.Path(sys.argv[1]), {})
for number in itertools.count():
  book.knows(number, Call("a:b", (number,)))
  book.write([(number, Result("ok", number, output="x" * 20_000))])
"""


def test_sigkill_within_a_write(tmp_path):
  path = tmp_path / "journal"
  process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
  while not path.exists() or path.stat().st_size < 3_000_000:
    assert process.poll() is None
    time.sleep(0.001)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  book = journal.Journal(path, {})
  count = len(path.read_bytes().splitlines()) - 2  # Headed; the last is torn.
  assert count > 100
  known = [book.knows(number, Call("a:b", (number,)))
           for number in range(count + 2)]
  told = replayed(book)
  assert len(told) == sum(known) in (count, count + 1)
  assert all(told[n] == [(n, Result("ok", n, output="x" * 20_000))]
             for n in range(count))
