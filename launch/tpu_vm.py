"""Runs posttrain on TPU VMs, from requesting the slices to deleting them.

  python -m launch.tpu_vm --name=r1 --topology=v5p:4x4x4 --zone=us-east5-a \\
      --spot -- train --config=configs/mine.py --workdir=/mnt/runs/mine

Requests the slices as a queued resource, waits, installs this checkout on
every worker, starts the same command on all of them and follows the log of the
first. A worker whose run was preempted (status 75, and 143 of SIGTERM before
Python ran) or has lost another one (69) starts it again; slices that were taken
away are requested anew, and the run goes on from its workdir. When all workers
have finished, the slices are deleted and the status is 0; when one has failed,
its last lines are shown and its status is returned. The same command follows a
run that is under way; ^C leaves it running.

The workdir must be a directory that every worker sees under the same name, such
as a bucket that --setup mounts. Needs gcloud, signed in.
"""

import contextlib
import os
import pathlib
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence

from launch import accelerators
from launch import job as job_lib

PLACE = "posttrain"  # Under the workers' home folder.
WORKER = f"bash {PLACE}/checkout/launch/worker.sh"
STATE = re.compile(r"^worker (\S+): (?:(running|none)|exit (\d+))$", re.M)
TAKEN = ("SUSPENDING", "SUSPENDED")  # Preempted by the cloud.
ATTEMPTS = 10  # Tries to reach workers or a request that should exist.


def parser() -> job_lib.Parser:
  found = job_lib.Parser(__doc__, needs=["zone"])
  found.add_argument(
      "--create-flag", action="append", default=[], metavar="FLAG",
      help="for `queued-resources create`, such as --reserved")
  found.add_argument(
      "--keep", action="store_true", help="do not delete the slices at the end")
  found.add_argument(
      "--poll-seconds", type=float, default=30.0,
      help="between two queries of the state (30)")
  actions = found.add_mutually_exclusive_group()
  for action, text in (
      ("logs", "follow the log of the first worker"),
      ("status", "say what runs on each worker"),
      ("stop", "send SIGTERM, which saves the state"),
      ("delete", "give the slices back")):
    actions.add_argument(
        f"--{action}", dest="action", action="store_const", const=action,
        help=f"{text}, and nothing else")
  return found


class Slices:
  """Slices of a job as a queued resource, through gcloud."""

  def __init__(self, job: job_lib.Job, shell: job_lib.Shell, create_flags):
    self.job, self.shell = job, shell
    self._create_flags = list(create_flags)
    self._where = [f"--zone={job.zone}"]
    if job.project:
      self._where.append(f"--project={job.project}")

  def _gcloud(self, verb: str, *more: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *more,
            *self._where]

  def create(self) -> None:
    job = self.job
    many = job.topology.num_slices > 1
    self.shell.run(self._gcloud(
        "create", job.name,
        *([f"--node-count={job.topology.num_slices}",
           f"--node-prefix={job.name}"] if many else [f"--node-id={job.name}"]),
        f"--accelerator-type={accelerators.accelerator_type(job.topology)}",
        f"--runtime-version={accelerators.runtime_version(job.topology)}",
        *(["--spot"] if job.spot else []), *self._create_flags))

  def state(self) -> str:
    """Returns the state, such as ACTIVE; "" if there is no such resource."""
    status, text = self.shell.output(self._gcloud(
        "describe", self.job.name, "--format=value(state.state)"))
    return text if status == 0 else ""

  def delete(self) -> None:
    self.shell.run(self._gcloud("delete", self.job.name, "--force", "--quiet"))

  def copy(self, files: Sequence[pathlib.Path]) -> None:
    """Copies files to every worker, into PLACE."""
    self.shell.run(self._gcloud(
        "scp", *map(str, files), f"{self.job.name}:{PLACE}/",
        "--node=all", "--worker=all"))

  def on(self, workers: str, command: str) -> list[str]:
    return self._gcloud(
        "ssh", self.job.name, f"--node={workers}", f"--worker={workers}",
        f"--command={command}")

  def ready(self, poll_seconds: float) -> None:
    """Requests the slices unless they exist, and waits for them.

    Raises:
      JobError: the request has failed, or is gone.
    """
    state = self.state()
    while state == "SUSPENDING":
      time.sleep(poll_seconds)
      state = self.state()
    if state == "SUSPENDED":
      self.delete()
      state = ""
    if not state:
      self.create()
    if self.shell.dry_run:
      return self.shell.say("and so on until the state is ACTIVE")
    shown, unseen = "", 0
    while (state := self.state()) != "ACTIVE":
      if state and state != shown:
        self.shell.say(f"{self.job.name}: {state}")
        shown = state
      unseen = 0 if state else unseen + 1
      if state == "FAILED" or unseen == ATTEMPTS:
        raise job_lib.JobError(
            f"{self.job.name}: the request for {self.job.topology} "
            f"{'failed' if state else 'is gone'}. Look at `gcloud compute tpus "
            "queued-resources describe`, and --delete it.")
      if state in TAKEN:
        return self.ready(poll_seconds)
      time.sleep(poll_seconds)
    return None

  def workers(self) -> dict[str, int | None]:
    """Returns the status by worker, None while it runs.

    Workers on which nothing has been started are left out. Empty if some
    workers are out of reach.
    """
    status, text = self.shell.output(self.on("all", f"{WORKER} status"))
    if status:
      return {}
    return {host: job_lib.exit_status(int(code)) if code else None
            for host, word, code in STATE.findall(text) if word != "none"}


def install_and_start(slices: Slices) -> None:
  """Copies checkout and secrets to every worker, and starts the command."""
  job, shell = slices.job, slices.shell
  with tempfile.TemporaryDirectory(prefix="posttrain.") as scratch:
    archive = pathlib.Path(scratch, "checkout.tar")
    shell.run(["bash", str(job_lib.ROOT / "launch/pack.sh"), str(archive)])
    files = [archive]
    if job.setup:
      files.append(pathlib.Path(scratch, "setup.sh"))
      files[-1].write_text(f"{job.setup}\n")
    if job.secrets:
      files.append(pathlib.Path(scratch, "secrets.sh"))
      shell.say(f"secrets.sh, mode 600, exports {', '.join(job.secrets)}")
      files[-1].touch(mode=0o600)
      if not shell.dry_run:
        files[-1].write_text(job_lib.shell_variables(job.secret_values()))
    shell.run(slices.on(
        "all", f"mkdir -p -m 700 {PLACE}; cd {PLACE}; rm -rf checkout "
        "setup.sh secrets.sh; mkdir checkout"))
    slices.copy(files)
  shell.run(slices.on(
      "all", f"set -e; tar -xf {PLACE}/checkout.tar -C {PLACE}/checkout; "
      f"git -C {PLACE}/checkout reset --quiet; {WORKER} install"))
  # Names for the message of a start for which some hosts are missing.
  names = shlex.quote(",".join(job.slice_names()))
  shell.run(slices.on(
      "all", f"POSTTRAIN_SLICES={names} {WORKER} start "
      f"{shlex.join(job.command)}"))


def follow(slices: Slices, poll_seconds: float) -> int | None:
  """Shows the log until every worker has ended.

  Returns:
    0 if all workers succeeded, else the status of the one that failed; None if
    slices were taken away.
  """
  shell = slices.shell
  log = slices.on("0", f"{WORKER} log")
  if shell.dry_run:
    shell.run(log)
    shell.say("meanwhile, until every worker has ended:")
    slices.workers()
    slices.state()
    return 0
  following = subprocess.Popen(log, stdin=subprocess.DEVNULL)
  failures, known = 0, set[str]()
  try:
    while failures < ATTEMPTS:
      time.sleep(poll_seconds)
      found = slices.workers()
      known |= found.keys()
      if len(found) < len(known):
        found = {}  # A worker that did not answer may be running.
      if found and None in found.values():
        failures = 0
        continue
      if found and not any(found.values()):
        show_rest(following)
        return 0
      # The workers have ended or are out of reach. Slices that were taken away
      # may be the reason, which the cloud shows a little later.
      time.sleep(poll_seconds)
      state = slices.state()
      if state in TAKEN:
        return None
      if found and state == "ACTIVE":
        show_rest(following)
        return failed(slices, found)
      failures += 1
    raise job_lib.JobError(
        f"{slices.job.name} was out of reach {ATTEMPTS} times. Unless it was "
        "deleted, the run may be going on; the same command follows it again.")
  finally:
    following.terminate()
    following.wait()


def show_rest(following: subprocess.Popen) -> None:
  """Waits until the log of an ended run has been shown."""
  with contextlib.suppress(subprocess.TimeoutExpired):
    following.wait(timeout=30)


def failed(slices: Slices, found: dict[str, int | None]) -> int:
  """Shows the last lines of the workers; returns the status that counts."""
  bad = {host: status for host, status in found.items() if status}
  slices.shell.run(slices.on("all", f"{WORKER} tail"), check=False)
  slices.shell.say(f"{slices.job.name}: " + ", ".join(
      f"{host} ended with status {status}" for host, status in bad.items()))
  # Hosts that saved their state, or lost another one, are not the cause.
  return min(bad.values(), key=lambda status: (
      status in (job_lib.PREEMPTED, job_lib.LOST), status > 128, status))


def supervise(slices: Slices, poll_seconds: float) -> int:
  """Follows the run to its end, over as many slices as it needs."""
  while True:
    slices.ready(poll_seconds)
    running = not slices.shell.dry_run and None in slices.workers().values()
    if running:
      slices.shell.say(f"{slices.job.name}: under way")
    try:
      if not running:
        install_and_start(slices)
      status = follow(slices, poll_seconds)
    except job_lib.JobError:  # A command fails if its slices are taken away.
      if slices.state() not in TAKEN:
        raise
      status = None
    if status is not None:
      return status
    slices.shell.say(
        f"{slices.job.name}: the slices were taken away; requesting others")


def run(argv: Sequence[str]) -> int:
  job, options = parser().read(argv, starts=lambda options: not options.action)
  accelerators.runtime_version(job.topology)  # Raises without such TPU VMs.
  shell = job_lib.Shell(options.dry_run)
  slices = Slices(job, shell, options.create_flag)
  if options.action == "delete":
    slices.delete()
    return 0
  if options.action:
    verb = {"logs": "log"}.get(options.action, options.action)
    workers = "0" if options.action == "logs" else "all"
    return shell.run(slices.on(workers, f"{WORKER} {verb}"), check=False)
  try:
    status = supervise(slices, options.poll_seconds)
  except KeyboardInterrupt:
    shell.say(f"\n{job.name} goes on. The same command follows it again; "
              "--stop saves its state, --delete gives the slices back.")
    return 128 + 2
  if not options.keep:
    slices.delete()
  return status


if __name__ == "__main__":
  os.umask(0o077)
  job_lib.main(run)
