"""Runs posttrain on a cluster that xpk made.

  python -m launch.xpk --name=r1 --topology=v5p:4x4x4 --cluster=mine \\
      --image=us-docker.pkg.dev/mine/posttrain:1 --zone=us-east5-a \\
      -- train --config=configs/mine.py --workdir=/mnt/runs/mine

Submits one workload; xpk and the cluster's queue do the rest. Status 75
(preempted) and 69 (a host is lost) restart it, and so do xpk's own codes (127
to 255, and so 143 of SIGTERM before Python ran), --max-restarts times in all.
xpk writes variables of the environment into its manifest, where they can be
read, so secrets are refused: launch.gke has them.
"""

import shlex
from collections.abc import Sequence

from launch import accelerators
from launch import job as job_lib


def parser() -> job_lib.Parser:
  found = job_lib.Parser(__doc__, needs=["cluster"])
  found.add_argument("--cluster")
  found.add_argument("--storage", action="append", default=[], metavar="NAME",
                     help="xpk's name of what to mount; may be repeated")
  found.add_argument("--max-restarts", type=int, default=100, metavar="N",
                     help="preemptions included (100)")
  actions = found.add_mutually_exclusive_group()
  for action, text in (
      ("status", "list the workload"),
      ("delete", "end it; the state is saved")):
    actions.add_argument(
        f"--{action}", dest="action", action="store_const", const=action,
        help=f"{text}, and nothing else")
  return found


def workload(
    job: job_lib.Job, *, cluster: str, storage: Sequence[str],
    max_restarts: int,
) -> list[str]:
  """Makes the command that submits the job.

  Raises:
    JobError: xpk does not know the slice, or would show a secret.
  """
  if job.topology.chip.name == "v5e" and job.topology.num_devices < 8:
    raise job_lib.JobError(
        f"--topology={job.topology.name}: xpk has no v5e below v5e:2x4.")
  if job.secrets:
    raise job_lib.JobError(
        f"--secret={job.secrets[0]}: xpk would write its value into the "
        "manifest. Use `python -m launch.gke`, which makes a Secret.")
  if not job.image:
    raise job_lib.JobError("--image is missing: a container with posttrain.")
  setup = f"{job.setup} && " if job.setup else ""
  return [
      "xpk", "workload", "create", f"--workload={job.name}",
      f"--cluster={cluster}",
      f"--tpu-type={accelerators.accelerator_type(job.topology)}",
      f"--num-slices={job.topology.num_slices}",
      f"--docker-image={job.image}",
      *(f"--storage={name}" for name in storage),
      f"--max-restarts={max_restarts}",
      f"--restart-on-exit-codes={job_lib.PREEMPTED},{job_lib.LOST}",
      f"--command={setup}POSTTRAIN_COORDINATOR=auto exec python -m posttrain "
      f"{shlex.join(job.command)}",
      *(["--spot"] if job.spot else [])]


def run(argv: Sequence[str]) -> int:
  job, options = parser().read(argv, starts=lambda options: not options.action)
  shell = job_lib.Shell(options.dry_run)
  where = [f"--{name}={value}" for name, value in (
      ("zone", job.zone), ("project", job.project)) if value]
  if options.action == "status":
    command = ["xpk", "workload", "list", f"--cluster={options.cluster}",
               f"--filter-by-job=^{job.name}$"]
  elif options.action == "delete":
    command = ["xpk", "workload", "delete", f"--cluster={options.cluster}",
               f"--workload={job.name}", "--force"]
  else:
    command = workload(
        job, cluster=options.cluster, storage=options.storage,
        max_restarts=options.max_restarts)
  return shell.run([*command, *where], check=False)


if __name__ == "__main__":
  job_lib.main(run)
