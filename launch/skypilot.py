"""Runs posttrain on TPU VMs as a managed job of SkyPilot.

  python -m launch.skypilot --name=r1 --topology=v6e:4x4 --spot \\
      --setup='gcsfuse my-bucket /mnt/runs' \\
      -- train --config=configs/mine.py --workdir=/mnt/runs/mine

Writes the task as YAML and submits it: SkyPilot finds a zone, copies this
checkout, runs the command on every host, and recovers it on other slices when
they are preempted or the status asks for it (75, 143 of SIGTERM before Python
ran, and 69 of a host that has lost another one); after other failures up to
--max-restarts times. SkyPilot accepts any name of an accelerator and fails
later if there is none; the names here are those of `posttrain plan`. It cannot
run one job on several slices.

Needs the command `sky`, set up for Google Cloud.
"""

import json
import pathlib
import shlex
import tempfile
import textwrap
from collections.abc import Sequence

from launch import accelerators
from launch import job as job_lib

# Every value is JSON, which YAML contains; scripts are blocks, to be read.
TEMPLATE = """\
name: {name}
workdir: {workdir}
resources:
  infra: {infra}
  accelerators: {accelerator}
  accelerator_args:
    tpu_vm: true
    runtime_version: {runtime}
  use_spot: {spot}
  job_recovery:
    max_restarts_on_errors: {max_restarts}
    recover_on_exit_codes: [{preempted}, {terminated}, {lost}]
envs:
  POSTTRAIN_COORDINATOR: auto
setup: |
{setup}
run: |
{run}
"""
INSTALL = """\
set -e
test -d ~/venv || python3 -m venv ~/venv
~/venv/bin/pip install --quiet --upgrade pip
~/venv/bin/pip install --quiet --editable '.[tpu]'
"""


def parser() -> job_lib.Parser:
  found = job_lib.Parser(__doc__)
  found.add_argument("--max-restarts", type=int, default=0, metavar="N",
                     help="after failures; preemptions are not counted (0)")
  actions = found.add_mutually_exclusive_group()
  for action, text in (
      ("logs", "follow the log"), ("status", "list the managed jobs"),
      ("delete", "cancel the job")):
    actions.add_argument(
        f"--{action}", dest="action", action="store_const", const=action,
        help=f"{text}, and nothing else")
  return found


def task(job: job_lib.Job, *, max_restarts: int = 0) -> str:
  """Makes the YAML of a task.

  Raises:
    JobError: there are several slices, or the chip has no TPU VMs.
  """
  if job.topology.num_slices > 1:
    raise job_lib.JobError(
        f"--num_slices={job.topology.num_slices}: SkyPilot runs one slice. "
        "Use `python -m launch.tpu_vm` or `python -m launch.gke`.")
  runtime = accelerators.runtime_version(job.topology)
  indented = lambda text: textwrap.indent(text.rstrip("\n"), "  ")
  return TEMPLATE.format(
      name=json.dumps(job.name), workdir=json.dumps(str(job_lib.ROOT)),
      infra=json.dumps(f"gcp/*/{job.zone}" if job.zone else "gcp"),
      accelerator=f"tpu-{accelerators.accelerator_type(job.topology)}",
      runtime=runtime, spot=json.dumps(job.spot), max_restarts=max_restarts,
      preempted=job_lib.PREEMPTED, terminated=job_lib.TERMINATED,
      lost=job_lib.LOST, setup=indented(INSTALL),
      # A recovered job is on other hosts, so its setup comes with each run.
      run=indented(f"set -e\n{job.setup}\n" if job.setup else "set -e")
      + "\n" + indented("exec ~/venv/bin/python -m posttrain "
                        + shlex.join(job.command)))


def run(argv: Sequence[str]) -> int:
  job, options = parser().read(argv, starts=lambda options: not options.action)
  shell = job_lib.Shell(options.dry_run)
  sky = ["sky", "jobs"]
  if options.action == "logs":
    return shell.run([*sky, "logs", f"--name={job.name}"], check=False)
  if options.action == "status":
    return shell.run([*sky, "queue"], check=False)
  if options.action == "delete":
    return shell.run(
        [*sky, "cancel", f"--name={job.name}", "--yes"], check=False)
  text = task(job, max_restarts=options.max_restarts)
  with tempfile.TemporaryDirectory(prefix="posttrain.") as scratch:
    file = pathlib.Path(scratch, f"{job.name}.yaml")
    file.write_text(text)
    if options.dry_run:
      shell.say(f"{file}:")
      print(text, end="")
    # A name alone: sky reads the value from the environment.
    return shell.run(
        [*sky, "launch", *(f"--secret={name}" for name in job.secrets),
         "--yes", str(file)], check=False)


if __name__ == "__main__":
  job_lib.main(run)
