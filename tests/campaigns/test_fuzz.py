"""The campaign of mistakes, its short form; and that it would see a fault."""

import pathlib
import subprocess
import sys

import pytest

from posttrain.cli import main
from tests.campaigns import fuzz, mutations

ROOT = pathlib.Path(__file__).parents[2]
CASE = mutations.Case(
    "train", (f"--config={mutations.TINY}:debug", "--workdir={dir}/run",
              "--config.seed=1"), ("seed",))


def campaign(*flags):
  done = subprocess.run(
      [sys.executable, "-m", "tests.campaigns.fuzz", *flags], cwd=ROOT,
      capture_output=True, text=True)
  assert not done.returncode, (done.stdout + done.stderr)[-5000:]
  return done.stdout


def test_hundreds_of_mistakes_end_clearly():
  said = campaign("--seed=11", "--mutations=200", "--starts=0")
  assert "seed 11: 0 faults" in said
  counts = {line.split()[2]: int(line.split()[3])
            for line in said.splitlines() if line.startswith("in process")}
  assert sum(counts.values()) == 200
  # Both ends are seen: what is right, and what is not.
  assert counts["accepted"] > 20 and counts["refused"] > 75


@pytest.mark.slow
def test_what_was_accepted_runs_or_is_refused_as_a_process():
  assert "seed 12: 0 faults" in campaign(
      "--seed=12", "--mutations=200", "--starts=3")


def test_a_case_is_the_same_in_every_run():
  assert [mutations.draw(3, i) for i in range(20)] == [
      mutations.draw(3, i) for i in range(20)]
  assert mutations.draw(3, 0) != mutations.draw(4, 0)


def outcome(tmp_path, monkeypatch, verb):
  monkeypatch.setitem(main.VERBS, "train", verb)
  return fuzz.in_process(CASE, tmp_path / "case", tmp_path)


def refuses(text):
  def verb(arguments):
    raise main.CommandError(text)
  return verb


def crashes(arguments):
  raise RuntimeError("a bug")


def hangs(arguments):
  while True:
    pass


@pytest.mark.parametrize("verb, kind", [
    (crashes, "traceback"), (hangs, "hang"),
    (lambda arguments: 3, "status"), (lambda arguments: 2, "silent"),
    (refuses("something is wrong"), "unclear"),
    (refuses("seed: " + "x" * 30_000), "long")])
def test_a_fault_is_seen(tmp_path, monkeypatch, verb, kind):
  monkeypatch.setattr(fuzz, "SECONDS", 1)
  found = outcome(tmp_path, monkeypatch, verb)
  assert found.kind == kind
  assert found.fault


def test_a_clear_refusal_is_none(tmp_path, monkeypatch):
  found = outcome(tmp_path, monkeypatch, refuses("seed: found 1."))
  assert (found.kind, found.fault) == ("refused", "")


def test_status_0_of_an_unfinished_run_is_a_fault(tmp_path):
  run = main.workdir_lib.Workdir(tmp_path / "run")
  run.write_json("config.json", fuzz.config_lib.jsonable(
      fuzz.config_lib.load(f"{mutations.TINY}:debug")))
  run.finish("cold_start", {})
  found = fuzz._finished(run.path, fuzz.Outcome("finished"))
  assert found.fault == "status 0 without ['reason', 'measure']"
