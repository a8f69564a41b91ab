"""Slices through a `gcloud` that runs on this machine: see `clouds`."""

import json
import shlex
import shutil
import subprocess
import threading
import time

import pytest

from launch import job as job_lib
from launch import tpu_vm

COMMAND = ["--", "train", "--config=configs/tiny.py:debug",
           "--workdir=/mnt/it's here"]
FLAGS = ["--name=r1", "--topology=v5p:2x2x2", "--zone=zone-b"]
QUICK = ["--poll-seconds=0.1"]

# By its number among the starts of this worker, which /tmp/.../count has.
PROGRAM = r"""
number=$(( $(cat "$CLOUD/count-$WORKER_NAME" 2>/dev/null || echo 0) + 1 ))
echo "$number" > "$CLOUD/count-$WORKER_NAME"
printf '%s\n' "$POSTTRAIN_COORDINATOR" "$POSTTRAIN_SLICES" "$@" \
  > "$CLOUD/arguments-$WORKER_NAME"
echo "run $number of $WORKER_NAME"
"""


def dry_run(capsys, *argv):
  assert tpu_vm.run([*FLAGS, "--dry-run", *argv]) == 0
  return [line for line in capsys.readouterr().out.splitlines()
          if not line.startswith("#")]


def test_dry_run_prints_every_command_and_runs_none(cloud, capsys):
  lines = [shlex.split(line) for line in dry_run(
      capsys, "--num_slices=2", "--project=mine", "--spot",
      "--create-flag=--reserved", *COMMAND)]
  assert not cloud.calls()
  gcloud = [line for line in lines if line[0] == "gcloud"]
  assert [line[4] for line in gcloud] == [
      "describe", "create", "ssh", "scp", "ssh", "ssh", "ssh", "ssh",
      "describe", "delete"]
  for line in gcloud:
    assert "--zone=zone-b" in line and "--project=mine" in line
  assert {"r1", "--node-count=2", "--node-prefix=r1", "--spot", "--reserved",
          "--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5",
          } < set(gcloud[1])
  start, = (line for line in gcloud if "worker.sh start" in " ".join(line))
  assert "--node=all" in start and "--worker=all" in start
  sent, = (word for word in start if word.startswith("--command="))
  assert shlex.split(sent.split("worker.sh start ")[1]) == COMMAND[1:]


def test_one_slice_has_a_node_of_its_name(capsys, cloud):
  create, = (line for line in dry_run(capsys, *COMMAND) if " create " in line)
  assert "--node-id=r1" in create and "--node-count" not in create


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_the_real_gcloud_knows_every_flag(capsys, monkeypatch, tmp_path):
  """Its own check of a command's text, which calls nothing."""
  monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
  lines = dry_run(capsys, "--num_slices=2", "--spot", "--project=p", *COMMAND)
  lines += dry_run(capsys, *COMMAND)
  def lint(line):
    return subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={line}"],
        capture_output=True, text=True)
  commands = {line for line in lines if line.startswith("gcloud")}
  assert len(commands) > 8
  for line in commands:
    found = lint(line)
    assert found.returncode == 0, found.stderr
    assert all(item["success"] for item in json.loads(found.stdout)), line
  assert not all(item["success"] for item in json.loads(
      lint("gcloud compute tpus queued-resources create --no-such").stdout))


@pytest.mark.parametrize("action, where, text", [
    ("--logs", "--worker=0", "worker.sh log"),
    ("--stop", "--worker=all", "worker.sh stop"),
    ("--status", "--worker=all", "worker.sh status"),
    ("--delete", "--force", "delete r1"),
])
def test_actions(capsys, cloud, action, where, text):
  (line,) = dry_run(capsys, action)
  assert where in line and text in line


def test_a_run_over_two_pairs_of_slices(cloud, capfd, monkeypatch):
  """Preempted once in place, then taken away, then to its end; a secret."""
  monkeypatch.setenv("HF_TOKEN", "s3cret 'value'")
  repository = cloud.checkout()
  cloud.program(PROGRAM + r"""
[[ "$HF_TOKEN" == "s3cret 'value'" ]] || exit 9
case $number in
  1) exit 75 ;;
  2) [[ $WORKER_NAME != 0-0 ]] || touch "$CLOUD/taken"
     while [[ ! -e "$CLOUD/taken" ]]; do sleep 0.02; done
     exit 134 ;;
esac
[[ $WORKER_NAME == 0-0 ]] || exit 0
mkdir "$CLOUD/kept"
cp -r ../checkout ../pip.log ../secrets.sh ../mounted "$CLOUD/kept"
""")
  assert tpu_vm.run([
      *FLAGS, *QUICK, "--num_slices=2", "--secret=HF_TOKEN",
      "--setup=touch mounted", *COMMAND]) == 0
  out, err = capfd.readouterr()
  for name in ("0-0", "0-1", "1-0", "1-1"):
    assert (cloud.path / f"count-{name}").read_text() == "3\n"
    assert (cloud.path / f"arguments-{name}").read_text().splitlines() == [
        "auto", "r1-0,r1-1", "-m", "posttrain", *COMMAND[1:]]
  assert [line.split()[3] for line in cloud.calls()
          if " create " in line or " delete " in line] == [
              "create", "delete", "create", "delete"]
  assert "taken away" in out and "run 3 of 0-0" in out
  for text in (out, err, "\n".join(cloud.calls())):
    assert "s3cret" not in text
  kept = cloud.path / "kept"
  assert (kept / "secrets.sh").stat().st_mode & 0o777 == 0o600
  assert (kept / "checkout" / "a file.txt").read_text() == "tracked"
  assert not (kept / "checkout" / "ignored.txt").exists()
  status = subprocess.run(
      ["git", "-C", kept / "checkout", "status", "--porcelain"],
      capture_output=True, text=True, check=True).stdout
  assert status == " D gone.txt\n"  # On the same commit, with its changes.
  assert "checkout[tpu]" in (kept / "pip.log").read_text()
  assert not (cloud.path / "state").exists()
  assert repository.exists()


def test_a_failure_is_the_status_and_is_shown(cloud, capfd):
  """If several failed, it is not that of a host that a signal ended."""
  cloud.checkout()
  cloud.program(PROGRAM + r"""
case $WORKER_NAME in
  0-0) exit 134 ;;
  *) echo "posttrain: no such file"; exit 3 ;;
esac
""")
  assert tpu_vm.run([*FLAGS, *QUICK, *COMMAND]) == 3
  out, _ = capfd.readouterr()
  assert "[0-1] posttrain: no such file" in out
  assert "0-0 ended with status 134, 0-1 ended with status 3" in out
  assert cloud.calls(" delete ")


def wait_until(holds):
  deadline = time.monotonic() + 60
  while not holds():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_a_run_under_way_is_followed_and_stopped(cloud, capfd):
  """The same command finds it; --stop saves, and 75 is then the status."""
  cloud.checkout()
  cloud.program(PROGRAM + r"""
trap 'echo saved; exit 75' TERM
touch "$CLOUD/ready-$WORKER_NAME"
while true; do sleep 0.02; done
""")
  ready = [cloud.path / f"ready-0-{i}" for i in (0, 1)]
  argv = [*FLAGS, *QUICK, "--keep", *COMMAND]
  statuses = []
  both = []
  for _ in range(2):  # The second finds the run of the first.
    both.append(threading.Thread(
        target=lambda: statuses.append(tpu_vm.run(argv)), daemon=True))
    both[-1].start()
    wait_until(lambda: all(file.exists() for file in ready))
  wait_until(lambda: len(cloud.calls("worker.sh log")) >= 2)
  assert tpu_vm.run([*FLAGS, "--stop"]) == 0
  for thread in both:
    thread.join(120)
  assert statuses == [75, 75]
  assert "under way" in capfd.readouterr().out
  assert len(cloud.calls("worker.sh start")) == 1
  assert (cloud.path / "count-0-0").read_text() == "1\n"
  assert not cloud.calls(" delete ")


def test_a_refused_request_says_so(cloud, monkeypatch):
  monkeypatch.setenv("FIRST_STATE", "FAILED")
  with pytest.raises(job_lib.JobError, match="the request for v5p:2x2x2 fail"):
    tpu_vm.run([*FLAGS, *QUICK, *COMMAND])


def test_slices_that_somebody_deleted_are_not_requested_again(cloud):
  cloud.checkout()
  cloud.program(PROGRAM + """
[[ $WORKER_NAME != 0-0 ]] || rm "$CLOUD/state"
sleep 1
""")
  with pytest.raises(job_lib.JobError, match="was out of reach 10 times"):
    tpu_vm.run([*FLAGS, "--poll-seconds=0.02", *COMMAND])
  assert len(cloud.calls(" create ")) == 1
