"""Equivalences by hand; the worker is killed, late and reused."""

import json
import subprocess
import sys
import threading
import time

import pytest

from posttrain.tasks import math500, symbolic


@pytest.mark.parametrize("gold, answer, status", [
    (r"\frac{1}{2}", "0.5", "ok"),
    (r"\frac{1}{2}", r"\dfrac12", "ok"),
    (r"\frac{1}{2}", "2", "wrong"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", "ok"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(\pi/2, 3)", "wrong"),
    ("x^2 - 1", "(x-1)(x+1)", "ok"),
    (r"\{1, 2\}", r"\{2, 1\}", "ok"),
    (r"\text{Evelyn}", r"\text{Evelyn}", "ok"),
    (r"\text{Evelyn}", r"\text{Briana}", "wrong"),
    ("7", "", "unparseable"),
    ("7", r"\frac{", "unparseable"),
    ("7", "}{", "unparseable")])
def test_equivalence(gold, answer, status):
  assert symbolic.compare(gold, answer, seconds=60).status == status


CLOCK = r"4:30 \text{ p.m.}"


@pytest.mark.parametrize("answer, status", [
    (CLOCK, "ok"), ("4:30 p.m.", "ok"), ("4:30 PM", "ok"), ("04:30pm", "ok"),
    (r"4\!:\!30\,\text{p.m.}", "ok"), (r"\text{4:30 p.m.}", "ok"),
    (r"$4:30~\mathrm{p.m.}$", "ok"), (r"4:30 \textrm{ p.m}", "ok"),
    ("4:30", "ok"),  # As math-verify has it.
    ("3:30 p.m.", "wrong"), (r"4:30 \text{ a.m.}", "wrong"),
    ("4:03 p.m.", "wrong"), ("16:30", "wrong"), ("4:30 p.m. or so", "wrong")])
def test_times_of_day_have_many_spellings(answer, status):
  for gold in (CLOCK, "4:30 p.m."):
    found = symbolic.compare(gold, answer, seconds=60).status
    # What math-verify cannot parse scores 0 as well.
    assert found == status or (found, status) == ("unparseable", "wrong")
  assert symbolic.compare("4:30 p.m.", "7", seconds=60).status == "wrong"


@pytest.mark.parametrize("gold, answer, status", [
    (r"\frac{4}{30}", "4:30 p.m.", "unparseable"), ("4:30", "4:30", "ok"),
    ("1:2", "0.5", "ok"), ("pm", "mp", "ok"), ("4:30am", "30", "wrong")])
def test_what_is_no_time_of_day_is_compared_as_before(gold, answer, status):
  assert symbolic.compare(gold, answer, seconds=60).status == status


@pytest.mark.parametrize("gold", ["", " ", r"\frac{", "}{"])
def test_an_unreadable_gold_is_an_error(gold):
  with pytest.raises(ValueError, match="cannot parse the gold answer"):
    symbolic.compare(gold, "7", seconds=60)


def test_a_late_worker_is_killed_and_the_next_question_answered():
  symbolic.compare("7", "7", seconds=60)
  late = symbolic._worker.process
  start = time.monotonic()
  assert symbolic.compare("7", "9^{9^{9^{9}}}", seconds=0.5).status == "timeout"
  assert time.monotonic() - start < 10
  assert late.poll() is not None
  assert math500.grade(r"\boxed{7}", "7", seconds=60) == (1.0, "ok", "7")


def test_the_worker_is_reused_and_a_dead_one_replaced():
  symbolic.compare("7", "7", seconds=60)
  worker = symbolic._worker
  symbolic.compare("7", "8", seconds=60)
  assert symbolic._worker is worker
  worker.process.kill()
  worker.process.wait()
  assert symbolic.compare("7", "7", seconds=60).status == "ok"


def test_a_worker_without_a_parent_ends_itself():
  """Nobody kills it, and its question never ends."""
  question = dict(gold="7", answer="9^{9^{9^{9}}}", seconds=0.5)
  done = subprocess.run(
      [sys.executable, "-m", "posttrain.tasks.symbolic"],
      input=json.dumps(question).encode() + b"\n", capture_output=True,
      timeout=60)
  assert json.loads(done.stdout)["status"] == "ready"
  assert b"Timeout" in done.stderr


def test_threads_get_their_own_answers():
  found = {}
  def ask(n):
    found[n] = [symbolic.compare(str(n), str(m), seconds=60).status
                for m in range(4)]
  threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == {n: ["ok" if m == n else "wrong" for m in range(4)]
                   for n in range(4)}
