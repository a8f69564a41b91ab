"""Sweeps, with a stand-in that writes what a run leaves behind."""

import json
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from launch import sweep
from posttrain import config as config_lib

ROOT = pathlib.Path(__file__).parents[2]
TINY = "configs/tiny.py:debug"

# Fails with group_size=8 and learning_rate=2e-4; counts its starts.
FAKE = '''
import json, pathlib, signal, sys, time
given = dict(word.split("=", 1) for word in sys.argv[3:])
place = pathlib.Path(given["--workdir"])
place.mkdir(parents=True, exist_ok=True)
with (place / "starts").open("a") as file:
  file.write(given["--config.reason.group_size"])
if (pathlib.Path(__file__).parent / "slow").exists():
  if not (pathlib.Path(__file__).parent / "early").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  (place / "ready").touch()
  time.sleep(600)
if given["--config.reason.group_size"] == "8" and not (
    pathlib.Path(__file__).parent / "fixed").exists():
  sys.exit(1)
with (place / "metrics.jsonl").open("w") as file:
  for row in (dict(stage="cold_start", step=1, loss=3.5, reward=None),
              dict(stage="reason", step=1, loss=0.1, reward=0.25),
              dict(stage="reason", step=2, loss=0.0, reward=0.5)):
    print(json.dumps(row), file=file)
(place / "measure" / "eval").mkdir(parents=True)
(place / "measure" / "eval" / "reason.json").write_text(json.dumps(
    dict(cells=[dict(accuracy=0.75, standard_error=0.125)])))
for stage in ("cold_start", "reason", "measure"):
  (place / stage).mkdir(exist_ok=True)
  (place / stage / "done.json").write_text("{}")
'''


@pytest.fixture
def flags(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  (tmp_path / "fake.py").write_text(FAKE)
  launcher = shlex.join([sys.executable, str(tmp_path / "fake.py")])
  return [f"--config={TINY}", f"--workdir={tmp_path / 'runs'}",
          f"--launcher={launcher}"]


@pytest.fixture(autouse=True)
def same_handler():
  before = signal.getsignal(signal.SIGTERM)
  yield
  signal.signal(signal.SIGTERM, before)


def starts(tmp_path):
  return {path.parent.name: len(path.read_text())
          for path in (tmp_path / "runs").glob("*/starts")}


def test_a_sweep_goes_on_where_it_has_not_finished(flags, tmp_path, capsys):
  assert sweep.run(flags) == 1
  names = [sweep.name(run) for run in config_lib.read_sweep(TINY)]
  assert starts(tmp_path) == dict.fromkeys(names, 1)
  (tmp_path / "fixed").touch()
  capsys.readouterr()
  assert sweep.run(flags) == 0
  assert starts(tmp_path) == {
      name: 1 + name.endswith("group_size=8") for name in names}
  rows = capsys.readouterr().out.splitlines()[-5:]
  cells = [[cell.strip() for cell in row.split("  ") if cell] for row in rows]
  assert cells[0] == [
      "run", "state", "cold_start loss", "reason loss", "reason reward",
      "measure reason"]
  assert cells[1] == [
      "reason.learning_rate=5e-05 reason.group_size=4", "finished before",
      "3.5", "0", "0.5", "0.750 ± 0.125"]
  assert cells[2][1] == "finished"


def test_dry_run_prints_a_line_per_run_and_runs_none(flags, tmp_path, capsys):
  flags[2] = "--launcher=python -m launch.gke --name=s{number}"
  assert sweep.run([*flags, "--dry-run", "--config.seed=7"]) == 0
  lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
  assert [line[3] for line in lines] == [
      f"--name=s{number}" for number in range(4)]
  for line in lines:
    assert line[4:7] == ["--", "train", f"--config={TINY}"]
    assert line[8] == "--config.seed=7"
    config_lib.load(TINY, [word.removeprefix("--config.")
                           for word in line[8:]])
  assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("when", ["slow", "early"])
def test_sigterm_saves_the_run_and_starts_no_other(flags, tmp_path, when):
  """Before a run handles it too."""
  (tmp_path / "slow").touch()
  (tmp_path / when).touch()
  process = subprocess.Popen(
      [sys.executable, "-m", "launch.sweep", *flags], cwd=ROOT,
      stdout=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 300
  while not list((tmp_path / "runs").glob("*/ready")):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 75
  assert out.count("preempted") == 1 and out.count("not started") == 3


def test_every_run_is_checked_before_the_first_starts(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  def written(body):
    file = tmp_path / "mine.py"
    text = (ROOT / "configs/tiny.py").read_text()
    file.write_text(text[:text.index("def get_sweep")] + body)
    return str(file)
  def problem(body):
    with pytest.raises(config_lib.ConfigError) as error:
      sweep.run([f"--config={written(body)}",
                 f"--workdir={tmp_path / 'runs'}"])
    assert not (tmp_path / "runs").exists()
    return str(error.value)
  several = "def get_sweep(arg=''):\n  return "
  assert "reason.lerning_rate: no such key" in problem(
      several + "[{'seed': 1}, {'reason.lerning_rate': 1}]")
  assert "defines no get_sweep()" in problem("")
  assert "has no runs" in problem(several + "[]")
  assert "has {'seed': 1} twice" in problem(several + "2 * [{'seed': 1}]")
  assert "gives ['seed'] as its run 0" in problem(several + "[['seed']]")
  # Every kind of value is read back as it was.
  file = written(
      several + "[{'stages': ('measure',), 'compute.dtype': 'bfloat16', "
      "'measure.num_waits': (), 'measure.problems.args': {'count': 9}}]")
  (run,) = config_lib.read_sweep(f"{file}:debug")
  config = config_lib.load(file, run)
  assert config.stages == ("measure",) and config.compute.dtype == "bfloat16"
  assert config.measure.num_waits == ()
  assert config.measure.problems.args.to_dict() == {"count": 9}


def test_names_are_folders_and_differ():
  runs = [["a=1", "b=x y"], ["a=1", "b=x/y"], ["a=1", "b=" + 300 * "x"],
          ["a=1", "b=" + 301 * "x"], ["a=1"], []]
  names = [sweep.name(run) for run in runs]
  assert len(set(names)) == len(runs)
  for name in names:
    assert "/" not in name and 0 < len(name) < 140
  assert names[4] == "a=1"


@pytest.mark.slow
def test_the_shipped_sweep_runs(tmp_path):
  """Its runs are real ones; two stages are left out for speed."""
  done = subprocess.run(
      [sys.executable, "-m", "launch.sweep", f"--config={TINY}",
       f"--workdir={tmp_path}", "--config.stages=reason"],
      cwd=ROOT, check=True, capture_output=True, text=True).stdout
  rows = done.splitlines()[-4:]
  assert all("finished" in row for row in rows)
  assert len({row.split("finished")[1] for row in rows}) > 1
  for path in tmp_path.iterdir():
    config = json.loads((path / "config.json").read_text())
    changes = dict(item.split("=") for item in path.name.split(","))
    assert config["reason"]["learning_rate"] == float(
        changes["reason.learning_rate"])
    assert config["reason"]["group_size"] == int(changes["reason.group_size"])
