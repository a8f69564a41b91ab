"""The TPU script against a `gcloud` that runs on this machine.

The stand-in treats two folders as the home folders of two workers, so that
what the script sends is really run: unpacked, installed (by a stand-in for
pip) and started, with the log, the process id and the restarts.
"""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "tpu_vm.sh"
RESTART = ROOT / "launch" / "restart.sh"

GCLOUD = r"""#!/usr/bin/env bash
set -eu
echo "$*" >> "$FAKE_HOME/calls"
[[ "$1 $2 $3" == "compute tpus tpu-vm" ]]
verb="$4"; shift 4
positional=() worker="" command=""
for word in "$@"; do
  case "$word" in
    --worker=*) worker="${word#*=}" ;;
    --command=*) command="${word#*=}" ;;
    --zone=* | --project=*) ;;
    *) positional+=("$word") ;;
  esac
done
if [[ "$worker" == all ]]; then workers=(0 1); else workers=("$worker"); fi
for i in "${workers[@]}"; do
  cd "$FAKE_HOME/worker$i"
  if [[ "$verb" == ssh ]]; then bash -c "$command"
  else cp "${positional[0]}" "${positional[1]#*:}"; fi
done
"""

# "Installed" in each worker; runs, is preempted once, and then finishes.
PYTHON = r"""#!/usr/bin/env bash
printf '%s\n' "$POSTTRAIN_COORDINATOR" "$@" >> ../arguments
[[ -f ../preempted ]] && { echo finished; exit 0; }
touch ../preempted
exit 75
"""


def executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


def dry_run(*args):
  return subprocess.run(
      [SCRIPT, "--dry-run", *args], cwd="/", capture_output=True, text=True)


def wait_for(path, text, seconds=30):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if path.exists() and text in path.read_text():
      return
    time.sleep(0.05)
  raise AssertionError(f"no {text!r} in {path}")


def test_dry_run_prints_every_command_and_runs_none():
  result = dry_run(
      "--name=slice", "--zone=zone-b", "--project=mine", "--", "train",
      "--config=configs/grpo math.py", "--workdir=/mnt/it's")
  assert result.returncode == 0, result.stderr
  lines = [shlex.split(line) for line in result.stdout.splitlines()]
  assert [line[:5] for line in lines if line[0] == "gcloud"] == [
      ["gcloud", "compute", "tpus", "tpu-vm", verb]
      for verb in ("ssh", "scp", "ssh", "ssh")]
  for line in (line for line in lines if line[0] == "gcloud"):
    assert "--zone=zone-b" in line and "--project=mine" in line
    assert "--worker=all" in line
  start = lines[-1][-1]
  assert "POSTTRAIN_COORDINATOR=auto" in start
  sent = start.split("-m posttrain ")[1].split(" > ../run.log")[0]
  assert shlex.split(sent) == [
      "train", "--config=configs/grpo math.py", "--workdir=/mnt/it's"]
  assert "checkout[tpu]" in lines[-2][-1]


@pytest.mark.parametrize("args, message", [
    (["--zone=z", "--", "train"], "--name is missing"),
    (["--name=n", "--", "train"], "--zone is missing"),
    (["--name=n", "--zone=z"], "nothing to run"),
    (["--name=n", "--zone=z", "train"], "unknown argument 'train'"),
    (["--name=n", "--zone=z", "--directory=a b", "--", "x"], "'a b': letters"),
])
def test_usage_errors(args, message):
  result = dry_run(*args)
  assert result.returncode == 2
  assert message in result.stderr


@pytest.mark.parametrize("action, worker, text", [
    ("--logs", "--worker=0", "tail -n 200 -F posttrain/run.log"),
    ("--stop", "--worker=all", "kill -TERM"),
    ("--status", "--worker=all", "echo running"),
])
def test_actions(action, worker, text):
  result = dry_run("--name=n", "--zone=z", action)
  assert result.returncode == 0
  (line,) = result.stdout.splitlines()
  assert worker in line and text in line


def test_runs_on_every_worker_and_goes_on_after_preemption(tmp_path):
  executable(tmp_path / "bin" / "gcloud", GCLOUD)
  repository = tmp_path / "checkout"
  (repository / "launch").mkdir(parents=True)
  for script in (SCRIPT, RESTART):
    shutil.copy(script, repository / "launch")
  (repository / "a file.txt").write_text("tracked")
  (repository / "gone.txt").write_text("deleted below, but in the index")
  (repository / ".gitignore").write_text("ignored.txt\n")
  (repository / "ignored.txt").write_text("ignored")
  git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-C",
         str(repository)]
  subprocess.run([*git, "init", "-q"], check=True)
  subprocess.run([*git, "add", "."], check=True)
  subprocess.run([*git, "commit", "-qm", "first"], check=True)
  (repository / "gone.txt").unlink()
  for i in range(2):
    worker = tmp_path / f"worker{i}" / "posttrain"
    executable(worker / "venv" / "bin" / "python", PYTHON)
    executable(
        worker / "venv" / "bin" / "pip", '#!/bin/sh\necho "$@" >> pip.log\n')
  environment = os.environ | {
      "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
      "FAKE_HOME": str(tmp_path), "POSTTRAIN_RESTART_SECONDS": "0"}
  script = str(repository / "launch" / "tpu_vm.sh")
  command = [script, "--name=slice", "--zone=zone-b", "--", "train",
             "--config=a b.py", "--config.x=it's"]
  result = subprocess.run(
      command, env=environment, capture_output=True, text=True, timeout=60)
  assert result.returncode == 0, result.stderr
  for i in range(2):
    worker = tmp_path / f"worker{i}" / "posttrain"
    wait_for(worker / "run.log", "finished")
    assert "preempted, state saved" in (worker / "run.log").read_text()
    assert (worker / "arguments").read_text().splitlines() == 2 * [
        "auto", "-m", "posttrain", "train", "--config=a b.py",
        "--config.x=it's"]
    assert (worker / "checkout" / "a file.txt").read_text() == "tracked"
    assert not (worker / "checkout" / "ignored.txt").exists()
    assert not (worker / "checkout" / "gone.txt").exists()
    status = subprocess.run(
        ["git", "-C", worker / "checkout", "status", "--porcelain"],
        capture_output=True, text=True, check=True).stdout
    assert status == " D gone.txt\n"  # On the same commit, with its changes.
    assert "checkout[tpu]" in (worker / "pip.log").read_text()
    assert (worker / "run.pid").read_text().strip().isdecimal()


def restart(tmp_path, source, **kwargs):
  executable(tmp_path / "program", source)
  return subprocess.Popen(
      [RESTART, tmp_path / "program"], cwd=tmp_path, stderr=subprocess.PIPE,
      text=True, env=os.environ | {"POSTTRAIN_RESTART_SECONDS": "0"}, **kwargs)


def test_restart_passes_on_a_failure(tmp_path):
  process = restart(
      tmp_path, "#!/bin/sh\necho x >> runs; test -s second && exit 3\n"
      "echo 1 > second; exit 75\n")
  process.communicate(timeout=30)
  assert process.returncode == 3
  assert (tmp_path / "runs").read_text() == "x\nx\n"


def test_restart_waits_for_a_command_that_saves_on_sigterm(tmp_path):
  process = restart(tmp_path, """#!/usr/bin/env bash
trap 'sleep 0.5; touch saved; exit 75' TERM
touch ready
while true; do sleep 0.05; done
""")
  deadline = time.monotonic() + 30
  while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 75
  assert (tmp_path / "saved").exists()


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
  result = subprocess.run(
      ["shellcheck", SCRIPT, RESTART], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout
