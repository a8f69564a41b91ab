"""JobSets, xpk and SkyPilot, with recorders in place of their tools.

The real SkyPilot reads the tasks in `make test-skypilot`.
"""

import json
import os
import pathlib
import shlex
import subprocess

import pytest

from launch import gke, skypilot, xpk
from posttrain.plan import topology as topology_lib

COMMAND = ["--", "train", "--config=configs/tiny.py:debug",
           "--workdir=/mnt/it's here"]
FLAGS = ["--name=r1", "--topology=v5p:4x4x4", "--image=registry/mine:1"]
QUICK = ["--poll-seconds=0.1"]


def applied(cloud):
  """The manifests that kubectl was given, in order."""
  text, found = (cloud.path / "input").read_text(), []
  while text.strip():
    manifest, end = json.JSONDecoder().raw_decode(text.lstrip())
    found.append(manifest)
    text = text.lstrip()[end:]
  return found


def test_a_job_set_to_its_end(cloud, capfd, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "s3cret")
  cloud.answer("", "Completed")
  assert gke.run([
      *FLAGS, *QUICK, "--num_slices=2", "--secret=HF_TOKEN", "--spot",
      "--volume=runs:/mnt", "--setup=true", *COMMAND]) == 0
  secret, jobs = applied(cloud)
  assert secret["stringData"] == {"HF_TOKEN": "s3cret"}
  (replicated,) = jobs["spec"]["replicatedJobs"]
  assert replicated["replicas"] == 2
  job = replicated["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 16  # Hosts of four.
  pod = job["template"]["spec"]
  assert pod["nodeSelector"] == {
      "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
      "cloud.google.com/gke-tpu-topology": "4x4x4",
      "cloud.google.com/gke-spot": "true"}
  (container,) = pod["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert container["envFrom"] == [{"secretRef": {"name": "r1"}}]
  assert container["command"][4:] == COMMAND[1:]
  assert container["volumeMounts"][0]["mountPath"] == "/mnt"
  for text in (json.dumps(jobs), *cloud.calls(), *capfd.readouterr()):
    assert "s3cret" not in text


def test_the_container_hands_on_status_signal_and_arguments(tmp_path, cloud):
  """Its own script, with a stand-in for Python."""
  job, _ = gke.parser().read([*FLAGS, "--setup=touch set-up", *COMMAND])
  container = gke.job_set(job)["spec"]["replicatedJobs"][0]["template"][
      "spec"]["template"]["spec"]["containers"][0]
  python = cloud.path / "bin" / "python"
  python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > arguments; exit 75\n')
  python.chmod(0o755)
  assert subprocess.run(container["command"], cwd=tmp_path).returncode == 75
  assert (tmp_path / "set-up").exists()
  assert (tmp_path / "arguments").read_text().splitlines() == [
      "-m", "posttrain", *COMMAND[1:]]


def test_a_preempted_pod_restarts_the_set_for_free(cloud):
  """The rules meet: what a pod's rule fails a job with, the set restarts on."""
  job, _ = gke.parser().read([*FLAGS, *COMMAND])
  spec = gke.job_set(job, max_restarts=2)["spec"]
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  assert spec["failurePolicy"]["maxRestarts"] == 2
  template = spec["replicatedJobs"][0]["template"]["spec"]
  preempted, disrupted = template["podFailurePolicy"]["rules"]
  assert preempted["action"] == disrupted["action"] == "FailJob"
  assert preempted["onExitCodes"] == {
      "containerName": "posttrain", "operator": "In", "values": [75, 143]}
  assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
  assert template["backoffLimit"] == 0
  # Kubernetes takes such rules only where pods do not restart themselves.
  assert template["template"]["spec"]["restartPolicy"] == "Never"


def test_a_failed_job_set_is_status_1(cloud, capfd):
  cloud.answer("", "Failed")
  assert gke.run([*FLAGS, *QUICK, *COMMAND]) == 1
  assert "r1: Failed" in capfd.readouterr().out


def test_gke_prints_everything_and_runs_nothing(cloud, capsys, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "s3cret")
  assert gke.run([*FLAGS, "--secret=HF_TOKEN", "--dry-run", *COMMAND]) == 0
  out = capsys.readouterr().out
  assert not cloud.calls() and "s3cret" not in out
  assert out.count("kubectl --namespace=default apply") == 2
  assert '"HF_TOKEN": "(not shown)"' in out and '"kind": "JobSet"' in out
  for action, words in (("--delete", "delete jobset r1"),
                        ("--status", "jobset-name=r1"), ("--logs", "--follow")):
    gke.run([*FLAGS[:2], "--dry-run", action])
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("launcher, flags, message", [
    (gke, FLAGS[:2], "--image is missing"),
    (gke, [*FLAGS, "--volume=claim"], "--volume=claim: needed CLAIM:/PATH"),
    (xpk, FLAGS, "--cluster is missing"),
    (xpk, [*FLAGS[:2], "--cluster=c"], "--image is missing"),
    (xpk, [*FLAGS, "--cluster=c", "--secret=HOME"], "`python -m launch.gke`"),
    (xpk, [FLAGS[0], FLAGS[2], "--cluster=c", "--topology=v5e:2x2"],
     "no v5e below"),
    (skypilot, [*FLAGS, "--num_slices=2"], "SkyPilot runs one slice"),
    (skypilot, [FLAGS[0], "--topology=tpu7x:4x4x4"], "on GKE only"),
])
def test_what_a_launcher_cannot_do(cloud, launcher, flags, message):
  with pytest.raises(ValueError, match=message):
    launcher.run([*flags, *COMMAND])
  assert not cloud.calls()


def test_xpk(cloud, capsys):
  argv = [*FLAGS, "--cluster=c", "--num_slices=2", "--zone=z", "--storage=runs"]
  assert xpk.run([*argv, "--dry-run", *COMMAND]) == 0
  words = shlex.split(capsys.readouterr().out)
  assert words[:3] == ["xpk", "workload", "create"]
  assert {"--workload=r1", "--cluster=c", "--tpu-type=v5p-128", "--zone=z",
          "--num-slices=2", "--docker-image=registry/mine:1", "--storage=runs",
          "--restart-on-exit-codes=75,69"} < set(words)
  (command,) = (word for word in words if word.startswith("--command="))
  assert shlex.split(command)[-3:] == COMMAND[1:]
  assert not cloud.calls()
  assert xpk.run([*argv, *COMMAND]) == xpk.run([*argv, "--delete"]) == 0
  assert [call.split()[:3] for call in cloud.calls()] == [
      ["xpk", "workload", verb] for verb in ("create", "delete")]


def task(*flags):
  job, _ = skypilot.parser().read([*flags, *COMMAND])
  return skypilot.task(job)


def test_skypilot_recovers_what_goes_on_from_its_state(cloud):
  assert "    recover_on_exit_codes: [75, 143, 69]\n" in task(*FLAGS)


def test_skypilot_gets_names_of_secrets_alone(cloud, capfd, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "s3cret")
  assert skypilot.run(
      [*FLAGS, "--secret=HF_TOKEN", "--dry-run", *COMMAND]) == 0
  out = capfd.readouterr().out
  assert "accelerators: tpu-v5p-128" in out and not cloud.calls()
  assert skypilot.run([*FLAGS, "--secret=HF_TOKEN", *COMMAND]) == 0
  (call,) = cloud.calls()
  assert call.startswith("sky jobs launch --secret=HF_TOKEN --yes /")
  assert "s3cret" not in call + out + "".join(capfd.readouterr())


READ = """
import json, sys, sky
found = {}
for name in sys.argv[1:]:
  task = sky.Task.from_yaml(name)
  (resources,) = task.resources
  found[name] = [
      task.name, task.run, resources.accelerators, resources.accelerator_args,
      resources.use_spot, resources.zone, resources.job_recovery]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    "POSTTRAIN_SKYPILOT_PYTHON" not in os.environ,
    reason="make test-skypilot runs it")
def test_the_real_skypilot_reads_every_slice(tmp_path, cloud):
  """It takes any name of an accelerator; the table says which are right."""
  wanted = {}
  for chip in ("v5e", "v5p", "v6e"):
    for size in topology_lib.CHIPS[chip].sizes:
      file = tmp_path / f"{chip}-{size}.yaml"
      file.write_text(task(
          FLAGS[0], f"--topology={chip}:{size}", "--zone=us-east5-a", "--spot",
          "--setup=mountpoint -q /mnt || gcsfuse 'a: b' /mnt"))
      wanted[str(file)] = topology_lib.parse(f"{chip}:{size}")
  output = subprocess.run(
      [os.environ["POSTTRAIN_SKYPILOT_PYTHON"], "-c", READ, *wanted],
      env=os.environ | {"HOME": str(tmp_path), "PYTHONPATH": "",
                        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
      check=True, stdout=subprocess.PIPE, text=True).stdout
  found = json.loads(output.splitlines()[-1])
  for name, topology in wanted.items():
    units = topology.num_chips * (2 if topology.chip.name == "v5p" else 1)
    prefix = {"v5e": "v5litepod"}.get(topology.chip.name, topology.chip.name)
    called, script, accelerators, args, spot, zone, recovery = found[name]
    assert accelerators == {f"tpu-{prefix}-{units}": 1}
    assert (called, spot, zone) == ("r1", True, "us-east5-a")
    assert args["tpu_vm"] and args["runtime_version"].startswith("v2-alpha-")
    assert recovery["recover_on_exit_codes"] == [75, 143, 69]
    assert shlex.split(script)[-3:] == COMMAND[1:]
    assert "|| gcsfuse 'a: b' /mnt" in script
  assert pathlib.Path(name).exists()
