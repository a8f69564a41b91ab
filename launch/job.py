"""Job description, with the same flags for every launcher.

  python -m launch.tpu_vm --name=r1 --topology=v5p:4x4x4 --zone=us-east5-a \
      -- train --config=configs/mine.py --workdir=/mnt/runs/mine

`--topology` and `--num_slices` are those of `posttrain plan`. The words after
`--` are the `posttrain` command of every host; it and its config are checked
here, before anything is paid for. Flags may stand in a file, one a line, named
as @FILE. Secrets are given by the names of variables: their values go from this
process's environment to the workers by a file or a pipe, never by a command
line, and are never printed.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from posttrain import config as config_lib
from posttrain.cli import arguments as arguments_lib
from posttrain.plan import environment
from posttrain.plan import topology as topology_lib

ROOT = pathlib.Path(__file__).parents[1]
# Exit statuses of `posttrain`.
PREEMPTED = os.EX_TEMPFAIL  # State is saved: start it again.
LOST = os.EX_UNAVAILABLE  # Another host is gone.
TERMINATED = 128 + signal.SIGTERM  # Before Python ran, or after its last line.
USAGE_ERROR = 2


class JobError(ValueError):
  """The job cannot be launched as described; the message says why."""


@dataclasses.dataclass(frozen=True)
class Job:
  """Describes a job: the command, the accelerators, the place.

  Attributes:
    name: name of the slice or the workload.
    topology: shape and number of slices.
    zone, project: "": as the cloud's own tool is configured.
    command: arguments of `posttrain`, the same on every host.
    image: the container's image, for launchers with containers.
    setup: shell commands for every worker before each start, such as a mount.
    secrets: names of variables of this process's environment.
    spot: take slices that may be preempted, and cost less.
  """

  name: str
  topology: topology_lib.Topology
  zone: str
  project: str
  command: tuple[str, ...]
  image: str
  setup: str
  secrets: tuple[str, ...]
  spot: bool

  def slice_names(self) -> list[str]:
    """Names the slices as the cloud numbers them; a single one as the job."""
    count = self.topology.num_slices
    return [f"{self.name}-{number}" for number in range(count)
            ] if count > 1 else [self.name]

  def secret_values(self) -> dict[str, str]:
    return {name: os.environ[name] for name in self.secrets}


class Parser(argparse.ArgumentParser):
  """Parses the flags of a job; a launcher adds its own, and those it needs."""

  def __init__(self, text: str, *, needs: Sequence[str] = ()):
    super().__init__(
        description=text, fromfile_prefix_chars="@", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    self.needs = ("name", "topology", *needs)
    add = self.add_argument
    add("--name", help="of the slice or workload")
    add("--topology", help="CHIP:SIZE in chips, as for `posttrain plan`")
    add("--num_slices", type=int, default=1, help="number of slices (1)")
    add("--zone", default="")
    add("--project", default="")
    add("--image", default="", help="container with posttrain installed")
    add("--setup", default="", help="shell for every worker before a start")
    add("--secret", action="append", default=[], metavar="VARIABLE",
        help="hand this variable of the environment on; may be repeated")
    add("--spot", action="store_true", help="preemptible, and cheaper")
    add("--dry-run", action="store_true", help="print every command and stop")
    add("command", nargs="*", help="of posttrain; put -- before it")

  def read(
      self, argv: Sequence[str], *, starts: Callable = lambda options: True,
  ) -> tuple[Job, argparse.Namespace]:
    """Parses a command line; returns the job and all flags.

    Args:
      argv: the command line.
      starts: tells if these flags start a run, which needs a command.

    Raises:
      JobError: a flag is missing or wrong.
    """
    options = self.parse_args(list(argv))
    for need in self.needs:
      if not getattr(options, need):
        raise JobError(f"--{need} is missing.")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,37}[a-z0-9])?", options.name):
      raise JobError(
          f"--name={options.name}: needed at most 39 lower-case letters, "
          "digits and -, a letter first.")
    try:
      topology = topology_lib.parse(options.topology, options.num_slices)
    except environment.PlanError as error:
      raise JobError(str(error)) from error
    if starts(options):
      check_command(options.command)
    given = [value for values in vars(options).values() for value in (
        values if isinstance(values, list) else [values])]
    check_secrets(options.secret, [v for v in given if isinstance(v, str)])
    return Job(
        name=options.name, topology=topology, zone=options.zone,
        project=options.project, command=tuple(options.command),
        image=options.image, setup=options.setup,
        secrets=tuple(options.secret), spot=options.spot), options


def check_command(command: Sequence[str]) -> None:
  """Reads the command and its config as `posttrain` will.

  Raises:
    JobError: it would end with a usage error on the hosts.
  """
  if not command:
    raise JobError(
        "nothing to run: put -- train --config=... --workdir=... at the end.")
  try:
    verb, arguments = arguments_lib.parse(command)
    if getattr(arguments, "config", None):
      config_lib.load(arguments.config, arguments.assignments)
  except (arguments_lib.CommandError, config_lib.ConfigError) as error:
    raise JobError(str(error)) from error
  if verb not in ("train", "eval"):
    raise JobError(f"{verb!r} runs on one machine; launch train or eval.")
  if not arguments.workdir.startswith("/"):
    raise JobError(
        f"--workdir={arguments.workdir}: needed an absolute path that every "
        "host sees, such as a mounted bucket. The run goes on from there.")


def check_secrets(names: Sequence[str], given: Sequence[str]) -> None:
  """Raises JobError for a secret without a value, or with it in a flag."""
  for name in names:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
      raise JobError("--secret takes the name of a variable, not its value.")
    if not os.environ.get(name):
      raise JobError(f"--secret={name}: the environment has no {name}.")
    if any(os.environ[name] in word for word in given):
      raise JobError(
          f"the value of {name} is in a flag or the command; --secret={name} "
          "alone hands it on.")


def shell_variables(values: Mapping[str, str]) -> str:
  """Writes lines that a shell reads, for a file of mode 600."""
  return "".join(
      f"export {name}={shlex.quote(value)}\n"
      for name, value in values.items())


def exit_status(status: int) -> int:
  """Converts a process's status; one that SIGTERM ended counts as preempted.

  Args:
    status: as `subprocess` or a shell reports it.
  """
  status = 128 - status if status < 0 else status
  return PREEMPTED if status == TERMINATED else status


class Shell:
  """Runs commands, or prints them."""

  def __init__(self, dry_run: bool):
    self.dry_run = dry_run

  def say(self, text: str) -> None:
    """Tells a person something; a comment among printed commands."""
    print(f"# {text}" if self.dry_run else text, flush=True)

  def run(
      self, command: Sequence[str], *, text: str = "", shown: str = "",
      check: bool = True,
  ) -> int:
    """Runs a command with our own output; returns its status.

    Args:
      command: the words of the command.
      text: its standard input.
      shown: the standard input that a dry run prints.
      check: raise JobError for a status other than 0.
    """
    if self.dry_run:
      print(shlex.join(command) + (f" <<'END'\n{shown}END" if shown else ""))
      return 0
    # Its input is never the terminal: nobody may be there to answer a question.
    status = subprocess.run(command, input=text, text=True).returncode
    if check and status:
      raise JobError(f"status {status} of: {shlex.join(command)}")
    return status

  def output(self, command: Sequence[str]) -> tuple[int, str]:
    """Runs a command; returns status and standard output (0 and "" if dry)."""
    if self.dry_run:
      print(shlex.join(command))
      return 0, ""
    found = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    return found.returncode, found.stdout.strip()


def main(run: Callable[[Sequence[str]], int]) -> None:
  """Ends the process with the status of `run` for the command line."""
  try:
    sys.exit(run(sys.argv[1:]))
  except (JobError, ValueError) as error:
    print(f"{pathlib.Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
    sys.exit(USAGE_ERROR)
