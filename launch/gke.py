"""Runs posttrain on GKE as a JobSet, with kubectl.

  python -m launch.gke --name=r1 --topology=v5p:4x4x4 --num_slices=2 \\
      --image=us-docker.pkg.dev/mine/posttrain:1 \\
      -- train --config=configs/mine.py --workdir=/mnt/runs/mine

Each slice is a job of the set and each host a pod. A run that was preempted
(status 75, and 143 of SIGTERM before Python ran), or whose pod the cluster
disrupted, is started again as often as needed; one that failed or lost a host
(69), up to --max-restarts times. Secrets are a Secret of the job's name. Status
0: completed; 1: failed.

Needs kubectl with a context, JobSet in the cluster, node pools of these slices,
and an image with posttrain[tpu] that has this config. --volume mounts an
existing claim, such as a bucket's, for the workdir.
"""

import contextlib
import json
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from launch import accelerators
from launch import job as job_lib

GRACE_SECONDS = 120  # From SIGTERM, which saves, to SIGKILL.
HIDDEN = "(not shown)"


def parser() -> job_lib.Parser:
  found = job_lib.Parser(__doc__)
  found.add_argument("--namespace", default="default")
  found.add_argument("--volume", default="", metavar="CLAIM:PATH",
                     help="mount this persistent volume claim at PATH")
  found.add_argument("--max-restarts", type=int, default=3, metavar="N",
                     help="after failures; preemptions are not counted (3)")
  found.add_argument("--poll-seconds", type=float, default=30.0,
                     help="between two queries of the state (30)")
  actions = found.add_mutually_exclusive_group()
  for action, text in (
      ("logs", "follow the log of the first host"),
      ("status", "say how it stands"),
      ("delete", "end it; the state is saved, and its Secret removed")):
    actions.add_argument(
        f"--{action}", dest="action", action="store_const", const=action,
        help=f"{text}, and nothing else")
  return found


def secret(job: job_lib.Job, values: dict[str, str]) -> dict[str, Any]:
  return {"apiVersion": "v1", "kind": "Secret", "type": "Opaque",
          "metadata": {"name": job.name}, "stringData": values}


def job_set(
    job: job_lib.Job, *, volume: str = "", max_restarts: int = 3,
) -> dict[str, Any]:
  """Makes the manifest: one job per slice, one pod per host."""
  hosts = accelerators.hosts_per_slice(job.topology)
  pod_failures = {"rules": [
      {"action": "FailJob", "onExitCodes": {
          "containerName": "posttrain", "operator": "In",
          "values": [job_lib.PREEMPTED, job_lib.TERMINATED]}},
      {"action": "FailJob", "onPodConditions": [
          {"type": "DisruptionTarget", "status": "True"}]}]}
  return {
      "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet",
      "metadata": {"name": job.name, "annotations": {
          # A slice is a node pool, which no other job shares.
          "alpha.jobset.sigs.k8s.io/exclusive-topology":
          "cloud.google.com/gke-nodepool"}},
      "spec": {
          # Preemptions fail a job by its pod failure policy, and are not
          # counted. Other failures are: hosts that lose another one fail too.
          "failurePolicy": {"maxRestarts": max_restarts, "rules": [{
              "action": "RestartJobSetAndIgnoreMaxRestarts",
              "onJobFailureReasons": ["PodFailurePolicy"]}]},
          "replicatedJobs": [{
              "name": "slice", "replicas": job.topology.num_slices,
              "template": {"spec": {
                  "parallelism": hosts, "completions": hosts,
                  "completionMode": "Indexed", "backoffLimit": 0,
                  "podFailurePolicy": pod_failures,
                  "template": {"spec": _pod(job, volume)}}}}]}}


def _pod(job: job_lib.Job, volume: str) -> dict[str, Any]:
  chips = {"google.com/tpu": accelerators.chips_per_host(job.topology)}
  container: dict[str, Any] = {
      "name": "posttrain", "image": job.image,
      "command": ["bash", "-c", script(job), "posttrain", *job.command],
      "env": [
          {"name": "POSTTRAIN_COORDINATOR", "value": "auto"},
          {"name": "POSTTRAIN_SLICES", "value": ",".join(  # As pods are named.
              f"{job.name}-slice-{i}" for i in range(job.topology.num_slices))},
      ],
      "resources": {"requests": chips, "limits": chips}}
  pod: dict[str, Any] = {
      "restartPolicy": "Never",
      "terminationGracePeriodSeconds": GRACE_SECONDS,
      "nodeSelector": {
          "cloud.google.com/gke-tpu-accelerator":
          accelerators.names(job.topology).gke,
          "cloud.google.com/gke-tpu-topology": job.topology.size,
          **({"cloud.google.com/gke-spot": "true"} if job.spot else {})},
      "containers": [container]}
  if job.secrets:
    container["envFrom"] = [{"secretRef": {"name": job.name}}]
  if volume:
    claim, _, path = volume.partition(":")
    container["volumeMounts"] = [{"name": "runs", "mountPath": path}]
    pod["volumes"] = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": claim}}]
  return pod


def script(job: job_lib.Job) -> str:
  """Makes the container's script.

  It ends in exec, so that SIGTERM goes to posttrain, and its status is the
  container's.
  """
  setup = f"{job.setup}\n" if job.setup else ""
  return f'set -e\n{setup}exec python -m posttrain "$@"'


class Cluster:
  """Calls kubectl in one namespace."""

  def __init__(self, job: job_lib.Job, shell: job_lib.Shell, namespace: str):
    self.job, self.shell = job, shell
    self._kubectl = ["kubectl", f"--namespace={namespace}"]

  def apply(self, manifest: dict, shown: dict | None = None) -> None:
    self.shell.run(
        [*self._kubectl, "apply", "--filename=-"], text=json.dumps(manifest),
        shown=json.dumps(shown or manifest, indent=1) + "\n")

  def delete(self) -> None:
    for kind in ("jobset", "secret"):
      self.shell.run([*self._kubectl, "delete", kind, self.job.name,
                      "--ignore-not-found"])

  def status(self) -> int:
    return self.shell.run(
        [*self._kubectl, "get", "jobset,pods",
         f"--selector=jobset.sigs.k8s.io/jobset-name={self.job.name}"],
        check=False)

  def terminal_state(self) -> str:
    """Returns Completed or Failed; "" while it runs.

    Raises:
      JobError: there is no such JobSet, or the cluster does not answer.
    """
    status, text = self.shell.output(
        [*self._kubectl, "get", "jobset", self.job.name,
         "--output=jsonpath={.status.terminalState}"])
    if status:
      raise job_lib.JobError(f"the cluster does not tell how {self.job.name} "
                             "stands. It may be going on: --status.")
    return text

  def logs(self) -> list[str]:
    """Makes the command that follows the first host's log."""
    return [*self._kubectl, "logs", "--follow", "--ignore-errors",
            "--selector=batch.kubernetes.io/job-completion-index=0,"
            f"jobset.sigs.k8s.io/jobset-name={self.job.name},"
            "jobset.sigs.k8s.io/job-index=0"]


def follow(cluster: Cluster, poll_seconds: float) -> int:
  """Shows the log until the set has ended; returns 0 if it completed."""
  if cluster.shell.dry_run:
    cluster.shell.run(cluster.logs())
    cluster.shell.say("until the terminal state is Completed or Failed:")
    cluster.terminal_state()
    return 0
  following = None
  try:
    while not (state := cluster.terminal_state()):
      if following is None or following.poll() is not None:
        # kubectl follows the pods that exist now; a restart makes others.
        following = subprocess.Popen(
            cluster.logs(), stdin=subprocess.DEVNULL)
      time.sleep(poll_seconds)
    if following is not None:  # It comes to its own end with the pods.
      with contextlib.suppress(subprocess.TimeoutExpired):
        following.wait(timeout=30)
  finally:
    if following is not None:
      following.terminate()
      following.wait()
  cluster.shell.say(f"{cluster.job.name}: {state}")
  return 0 if state == "Completed" else 1


def run(argv: Sequence[str]) -> int:
  job, options = parser().read(argv, starts=lambda options: not options.action)
  shell = job_lib.Shell(options.dry_run)
  cluster = Cluster(job, shell, options.namespace)
  if options.action == "delete":
    cluster.delete()
    return 0
  if options.action == "status":
    return cluster.status()
  if options.action == "logs":
    return shell.run(cluster.logs(), check=False)
  if not job.image:
    raise job_lib.JobError("--image is missing: a container with posttrain.")
  if options.volume and not options.volume.partition(":")[2].startswith("/"):
    raise job_lib.JobError(
        f"--volume={options.volume}: needed CLAIM:/PATH.")
  if job.secrets:
    shell.say(f"a Secret with {', '.join(job.secrets)}")
    cluster.apply(secret(job, job.secret_values()),
                  secret(job, dict.fromkeys(job.secrets, HIDDEN)))
  cluster.apply(job_set(
      job, volume=options.volume, max_restarts=options.max_restarts))
  return follow(cluster, options.poll_seconds)


if __name__ == "__main__":
  job_lib.main(run)
