r"""A campaign of mistakes: every command ends clearly, or runs to its end.

  python -m tests.campaigns.fuzz --seed=0 --mutations=5000 --starts=40

In process, up to where JAX would be imported: thousands of commands, each of
which is either accepted, its config surviving JSON, or refused with status 2
and a message that names the key, flag or file. Of those trainings that were
accepted, all are set up as far as the first stage: tokenizer, templates,
functions, shape, memory. As real processes: dozens of what is right so far and
small, each of which finishes, is refused so, or stops with the advice of a
health rule. Never a traceback, never a hang, never status 0 without having
finished.

`--case=N` runs one case of the seed again and shows all that it said.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from unittest import mock

from ml_collections import config_dict

from posttrain import config as config_lib
from posttrain.cli import main
from posttrain.plan import environment
from tests.campaigns import mutations

SECONDS = 30  # For a command in process.
START_SECONDS = 300  # For one that runs.
LONGEST = 20_000  # Characters of a message.
# One talks, one needs a compiler for TPUs, one a package of weights.
NOT_STARTED = ("chat", "plan", "import")
ADVICE = 1  # Status of a run that a health rule stopped.


class Accepted(BaseException):
  """The command was right so far; what follows would import JAX."""

  def __init__(self, config: config_dict.ConfigDict | None):
    super().__init__()
    self.config = config


class TooLong(BaseException):
  """A command has hung."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """End of a command; `fault` says what is wrong with it; "": nothing."""

  kind: str
  fault: str = ""
  said: str = ""
  config: config_dict.ConfigDict | None = None


def in_process(
    case: mutations.Case, folder: pathlib.Path, run: pathlib.Path) -> Outcome:
  """The outcome of a command up to where JAX is imported."""
  with (mock.patch.object(main, "_start", _accept),
        mock.patch.dict(main.VERBS, report=_accept),
        mock.patch.object(environment, "prepare", _accept)):
    return _called(case, folder, run)


def set_up(
    case: mutations.Case, folder: pathlib.Path, run: pathlib.Path) -> Outcome:
  """The outcome of a command up to its first stage; of an export, whole."""
  from posttrain import pipeline  # And JAX.
  with (mock.patch.object(main, "_start"),
        mock.patch.object(pipeline, "run_stage", _accept)):
    return _called(case, folder, run)


def _called(
    case: mutations.Case, folder: pathlib.Path, run: pathlib.Path) -> Outcome:
  folder.mkdir()
  _write(case, folder)
  said = io.StringIO()
  signal.signal(signal.SIGALRM, _too_long)
  signal.alarm(SECONDS)
  try:
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
      status = main.main(case.argv(folder, run))
  except Accepted as accepted:
    return _accepted(accepted.config)
  except TooLong:
    return Outcome("hang", f"no answer in {SECONDS} s")
  except SystemExit as leave:  # --help.
    return Outcome("help", "" if leave.code == 0 else f"exit {leave.code}")
  except BaseException as error:
    return Outcome("traceback", "".join(
        traceback.format_exception(error))[-1500:])
  finally:
    signal.alarm(0)
  return _judged(case, status, said.getvalue())


def _accept(config: object = None, *_: object, **__: object) -> int:
  raise Accepted(
      config if isinstance(config, config_dict.ConfigDict) else None)


def _too_long(*_: object) -> None:
  raise TooLong


def _accepted(config: config_dict.ConfigDict | None) -> Outcome:
  if config is None:
    return Outcome("accepted")
  again = config_lib.assign(
      config_lib.jsonable(config), [], "config.json", saved=True)
  changed = config_lib.diff(config, again)
  return Outcome(
      "accepted", f"JSON changes {changed}" if changed else "", config=config)


def _judged(case: mutations.Case, status: int, said: str) -> Outcome:
  """Judges a command that has ended by itself."""
  lines = [line for line in said.splitlines() if line]
  message = said[said.find("posttrain: "):]
  if "Traceback (most recent" in said:
    return Outcome("traceback", said[-1500:], said)
  if status == 0:
    return Outcome("finished", said=said)
  if status not in (main.USAGE_ERROR, ADVICE):
    return Outcome("status", f"status {status}: {said[-500:]}", said)
  if not any(line.startswith("posttrain: ") for line in lines):
    return Outcome("silent", f"status {status} without a message", said)
  if len(message) > LONGEST:
    return Outcome("long", f"a message of {len(message)} characters", said)
  if status == ADVICE:
    return Outcome("stopped with advice", said=said)
  if not any(name and name in message for name in case.names):
    return Outcome("unclear", f"names none of {case.names}: {message[:500]}",
                   said)
  return Outcome("refused", said=said)


def _write(case: mutations.Case, folder: pathlib.Path) -> None:
  if case.file is not None:
    (folder / "config.py").write_bytes(
        case.file.encode("utf-8", "surrogatepass"))


# Real processes.


def small(config: config_dict.ConfigDict | None) -> bool:
  """Tests if a request takes seconds only: large amounts are no mistakes."""
  if config is None:
    return True
  most = dict(
      num_steps=4, rows=16, sequence_length=512, num_groups=8, group_size=8,
      rows_per_microbatch=32, max_tokens=128, max_num_seqs=256, count=64,
      samples_per_problem=4, max_samples=4, max_prompt_tokens=256, chunk=256,
      num_epochs=4, num_waits=64, layers=4, embed=128, mlp=256, heads=8,
      kv_heads=8, head_dim=64, cpu_devices=8, unroll=4, rank=64)
  for path, value in config_lib.reader.leaves(
      config_lib.reader.plain(config)):
    limit = most.get(path.rpartition(".")[2])
    values = value if isinstance(value, tuple) else (value,)
    if limit and "data.sources" not in path and "reason.problems" not in (
        path) and any(isinstance(v, int) and v > limit for v in values):
      return False
  return sum(len(config[name].get("max_thinking_tokens", ()))
             for name in config.stages
             if config[name].kind == "evaluate") < 8


def started(
    case: mutations.Case, folder: pathlib.Path, run: pathlib.Path) -> Outcome:
  """The outcome of a command as its own process."""
  folder.mkdir()
  _write(case, folder)
  argv = [os.fsencode(word) for word in case.argv(folder, run)]
  env = os.environ | dict(
      JAX_PLATFORMS="cpu", PYTHONPATH=str(mutations.ROOT),
      PYTHONIOENCODING="utf-8:surrogateescape")
  try:
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", *argv], cwd=folder, env=env,
        capture_output=True, timeout=START_SECONDS, stdin=subprocess.DEVNULL)
  except subprocess.TimeoutExpired:
    return Outcome("hang", f"not at its end after {START_SECONDS} s")
  outcome = _judged(case, done.returncode, done.stderr.decode(
      "utf-8", "surrogateescape"))
  if outcome.kind == "finished" and case.verb == "train":
    return _finished(folder / "run", outcome)
  return outcome


def _finished(workdir: pathlib.Path, outcome: Outcome) -> Outcome:
  """Status 0 of a training means that every stage has its mark."""
  if not workdir.exists():
    return outcome  # It was another run's, which had finished.
  stages = main.workdir_lib.read_config(workdir).stages
  missing = [name for name in stages
             if not (workdir / name / "done.json").exists()]
  return dataclasses.replace(
      outcome, fault=f"status 0 without {missing}" if missing else "")


def base_run(folder: pathlib.Path) -> pathlib.Path:
  """A finished run of the config that is mutated."""
  subprocess.run(
      [sys.executable, "-m", "posttrain", "train",
       f"--config={mutations.TINY}:debug", f"--workdir={folder}/base"],
      env=os.environ | dict(JAX_PLATFORMS="cpu"), cwd=mutations.ROOT,
      check=True, capture_output=True)
  return folder / "base"


def campaign(
    seed: int, cases: int, starts: int, folder: pathlib.Path,
) -> Iterator[tuple[int, mutations.Case, str, Outcome]]:
  """Number, case, how it was run, and outcome of each command."""
  run = base_run(folder) if starts else folder / "none"
  if not starts:  # Enough of one for what comes before JAX.
    run.mkdir()
    main.workdir_lib.Workdir(run).write_json(
        "config.json", config_lib.jsonable(
            config_lib.load(f"{mutations.TINY}:debug")))
  accepted, smalls, jax_was_here = [], set(), "jax" in sys.modules
  for number in range(cases):
    case = mutations.draw(seed, number)
    outcome = in_process(case, folder / f"case{number}", run)
    if "jax" in sys.modules and not jax_was_here:
      outcome = Outcome("jax", "imported JAX before the command was right")
    yield number, case, "in process", outcome
    if outcome.kind == "accepted" and not outcome.fault and (
        case.verb not in NOT_STARTED):
      accepted.append((number, case))
      if small(outcome.config):
        smalls.add(number)
  right = []
  for number, case in accepted:
    outcome = Outcome("accepted")
    if case.verb == "train" or (starts and case.verb in ("eval", "export")):
      outcome = set_up(case, folder / f"set_up{number}", run)
      yield number, case, "set up", outcome
    if outcome.kind == "accepted" and number in smalls:
      right.append((number, case))
  # Evenly, so that cases of all parts of the seed are started.
  every = max(1, len(right) // starts) if starts else 1
  for number, case in right[::every][:starts]:
    yield number, case, "started", started(
        case, folder / f"start{number}", run)


def show(number: int, case: mutations.Case, how: str, outcome: Outcome) -> str:
  words = " ".join(word[:200] for word in (case.verb, *case.words))
  return (f"case {number} ({how}): {outcome.kind}: {outcome.fault}\n"
          f"  posttrain {words}").encode("utf-8", "backslashreplace").decode()


def main_() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=(
      argparse.RawDescriptionHelpFormatter))
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--mutations", type=int, default=5000)
  parser.add_argument("--starts", type=int, default=40)
  parser.add_argument("--case", type=int)
  options = parser.parse_args()
  counts: collections.Counter[tuple[str, str]] = collections.Counter()
  faults, begin = 0, time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    place = pathlib.Path(folder)
    if options.case is not None:
      run = base_run(place)
      case = mutations.draw(options.seed, options.case)
      for how, function in (("in process", in_process), ("set up", set_up),
                            ("started", started)):
        outcome = function(case, place / how, run)
        print(show(options.case, case, how, outcome), outcome.said, sep="\n")
      return 0
    for number, case, how, outcome in campaign(
        options.seed, options.mutations, options.starts, place):
      counts[how, outcome.kind] += 1
      if outcome.fault:
        faults += 1
        print(show(number, case, how, outcome), flush=True)
  for (how, kind), count in sorted(counts.items()):
    print(f"{how:>10} {kind:>20} {count:>6}")
  print(f"seed {options.seed}: {faults} faults, "
        f"{time.monotonic() - begin:.0f} s")
  return int(bool(faults))


if __name__ == "__main__":
  sys.exit(main_())
