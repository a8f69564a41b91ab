"""Workdir: the directory of one run, its files, and how they are replaced.

  config.json            the resolved config; another one is refused, once
                         something has been trained
  environment.json       one entry per start: versions, git commit, devices,
                         hashes of the tasks' and rewards' sources
  model.json             the model's shape
  tokenizer/             as it was trained or loaded
  metrics.jsonl          one row per stage and step
  tensorboard/           the same as events
  report.html            `posttrain report`
  frozen/<hash>/         weights that a stage does not train
  <stage>/checkpoints/   <stage>/data_report.json   <stage>/eval/
  <stage>/rollouts/      <stage>/goodput.json       <stage>/profile/
  <stage>/journal/       results of calls in batches that no checkpoint holds
  <stage>/damaged/       checkpoints that could not be read and were passed over
  <stage>/done.json      once the stage has finished
  .lease                 who writes here now, see `posttrain.lease`
  NAME.damaged           a record that could not be read, and was begun again

Every process of a run sees the same directory; process 0 alone writes. Files
are replaced in one piece, so that a reader never meets half of one.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

import posttrain
from posttrain import config as config_lib
from posttrain import lease as lease_lib
from posttrain import leftovers, provenance

OLDEST = "0.3.0"  # The first version whose runs this one resumes.

# Keys that may change between two starts of a run: numbers depend on them by
# rounding at most, or as they do on the machine (a call that is late there).
MAY_CHANGE = re.compile(r"mesh\.\w+: |\w+\.checkpoint\.on_damaged: "
                        r"|compute\.on_too_large: |\w+\.workers\.\w+: ")


class WorkdirError(ValueError):
  """The directory does not hold what the command needs."""


class StorageError(OSError):
  """A file of a run could not be written or read; the message names it."""


class Workdir:
  """Paths and records of one run.

  Attributes:
    path: the directory.
    is_writer: true if this process writes; elsewhere writing does nothing.
    lease: the lease that this process holds; None elsewhere and for readers.
  """

  lease: lease_lib.Lease | None = None

  def __init__(self, path: str | os.PathLike, *, is_writer: bool = True):
    # pathlib would take "gs://bucket" as a relative directory "gs:".
    if re.match(r"\w+://", str(path)):
      raise WorkdirError(
          f"--workdir={path} is no directory. Mount the bucket on every host, "
          "for instance with gcsfuse, and name the mounted directory.")
    self.path = pathlib.Path(path)
    if self.path.is_file():
      raise WorkdirError(f"--workdir={path} is a file. Name a directory.")
    self.is_writer = is_writer

  @property
  def metrics(self) -> pathlib.Path:
    return self.path / "metrics.jsonl"

  @property
  def tensorboard(self) -> pathlib.Path:
    return self.path / "tensorboard"

  def stage(self, name: str) -> pathlib.Path:
    """Returns the directory of a stage; makes it where this process writes."""
    path = self.path / name
    if self.is_writer:
      path.mkdir(parents=True, exist_ok=True)
    return path

  def checkpoints(self, stage: str) -> pathlib.Path:
    return self.path / stage / "checkpoints"

  def config(self) -> config_dict.ConfigDict:
    """Reads the resolved config that the directory was made with."""
    return read_config(self.path)

  def environments(self) -> list[dict[str, Any]]:
    """Reads the record of starts: one entry each, oldest first."""
    path = self.path / "environment.json"
    found = read_json(path) if path.exists() else []
    if not isinstance(found, list) or not all(
        isinstance(entry, dict) for entry in found):
      raise damaged(path, "needed a list of objects")
    return found

  def check_lease(self) -> None:
    """Raises `lease.LostError` if another run has taken this workdir."""
    if self.lease is not None:
      self.lease.check()

  def check_known_lease(self) -> None:
    """Raises `LostError` if the heartbeat has found it lost; reads no file."""
    if self.lease is not None:
      self.lease.check_known()

  def write_json(self, name: str | os.PathLike, data: Any) -> None:
    """Writes a JSON file below the directory, whole or not at all."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    self.write_text(name, text + "\n")

  def write_text(self, name: str | os.PathLike, text: str) -> None:
    """Writes a text file below the directory, whole or not at all.

    Raises:
      LostError: another run writes here now.
    """
    if self.is_writer:
      self.check_known_lease()
      # Half a surrogate pair becomes JSON's escape: tasks may return one.
      replace_file(self.path / name, text.encode(errors="backslashreplace"))

  def finish(self, stage: str, summary: Mapping[str, Any]) -> None:
    """Marks a stage as finished: a later start skips it."""
    self.write_json(pathlib.Path(stage, "done.json"), dict(summary))

  def finished(self, stage: str, *needed: str) -> dict[str, Any] | None:
    """Reads the summary of a finished stage, with these keys; None if not
    finished.
    """
    path = self.path / stage / "done.json"
    return read_object(path, *needed) if path.exists() else None


def create(
    path: str | os.PathLike, config: config_dict.ConfigDict, *,
    devices: Sequence[str], may_differ: Sequence[str] = (),
    anew: bool = True,
) -> tuple[Workdir, list[str]]:
  """Makes the directory of a run, or returns to it; for process 0.

  As long as nothing has been trained there the directory belongs to no config:
  after a first start that fails, the corrected command may run in it. This
  holds only if the directory is without doubt a run's and has no other files.

  Args:
    path: the directory; it may exist.
    config: resolved.
    devices: descriptions of the devices, for the record.
    may_differ: names of sections that may differ from the saved config, such
      as those of stages that are evaluated again; config.json stays as it is.
    anew: begin a directory again if nothing was trained in it.

  Returns:
    The workdir, and lines for the console: differences from config.json and
    from the environment of the last start, and records that were damaged. None
    at the first start.

  Raises:
    WorkdirError: the directory belongs to a run of another config, holds
      files but no run, is damaged, or cannot be written.
    ValueError: a task or reward that the config names does not exist.
  """
  workdir = Workdir(path)
  # Also a check: it raises for a function that does not exist.
  found = provenance.environment(config_lib.functions(config), devices)
  news: list[str] = []
  # All checks come before the first write: a refused start changes no file.
  saved = _saved(workdir)
  exists = saved is not None
  if not exists and _holds_files(workdir.path):
    raise _no_run(workdir.path, "no config.json")
  untrained = exists and anew and leftovers.is_untrained(
      workdir.path, saved, _starts(workdir))
  if exists and not untrained:
    check_version(workdir)
  if exists:
    news += _config_changes(workdir, config, may_differ, untrained)
  try:
    if untrained:
      leftovers.clear(workdir.path, saved)
    if not exists or untrained:
      workdir.write_json("config.json", config_lib.jsonable(config))
    leftovers.remove_partials(workdir.path)
    starts = read_or_set_aside(
        workdir.path / "environment.json", workdir.environments,
        news.append) or []
    workdir.write_json("environment.json", [*starts, found])
  except OSError as error:
    raise unwritable(workdir.path, error) from error
  if starts:
    news += [f"differs from the last start: {change}"
             for change in _changes(starts[-1], found)]
  return workdir, news


def _saved(workdir: Workdir) -> dict[str, Any] | None:
  """Reads the saved config as it is; None if there is none.

  Raises:
    WorkdirError: config.json is damaged, or is not that of a run.
  """
  path = workdir.path / "config.json"
  if not path.exists():
    return None
  found = read_object(path)
  if "stages" not in found:  # Releases of models have one of that name too.
    raise _no_run(workdir.path, "its config.json has no stages")
  return found


def _starts(workdir: Workdir) -> list[dict[str, Any]]:
  """Reads the record of starts; empty if it is damaged, which `create` mends.
  """
  try:
    return workdir.environments()
  except WorkdirError:
    return []


def check_version(workdir: Workdir) -> None:
  """Tests which version the run's last start was of.

  Raises:
    WorkdirError: it is older than `OLDEST`; says what can be done.
  """
  last = (_starts(workdir) or [{}])[-1]
  # Version 0.1.0 did not know itself where it was run without being installed.
  found = last.get("versions", {"posttrain": OLDEST}).get("posttrain", "0.1.0")
  numbers = lambda version: [int(n) for n in re.findall(r"\d+", version)]
  if numbers(found) < numbers(OLDEST):
    commit = last.get("git", {}).get("commit") or ""
    raise WorkdirError(
        f"{workdir.path} was written by posttrain {found}"
        + f" (commit {commit[:12]})" * bool(commit)
        + f", and posttrain {posttrain.__version__} resumes runs of {OLDEST} "
        "or later. Resume it with that version, or name another --workdir. "
        f"Its weights can be used: --model={workdir.path}/STAGE/checkpoints "
        "for sample, chat and export, with the --config.chat_template and "
        "--config.thinking of its config.json; init.kind='directory' with that "
        "path in a config. `posttrain report` reads it.")


def _no_run(path: pathlib.Path, why: str) -> WorkdirError:
  return WorkdirError(
      f"{path} holds files, but no run ({why}). Name an empty or a new "
      "directory as --workdir.")


def unwritable(path: pathlib.Path, error: OSError) -> WorkdirError:
  return WorkdirError(
      f"--workdir={path} cannot be written: {error.strerror}. Name one on a "
      "disk that is writable and has room.")


def _config_changes(
    workdir: Workdir, config: config_dict.ConfigDict,
    may_differ: Sequence[str], untrained: bool,
) -> list[str]:
  """Describes how a config differs from the saved one, in lines.

  Raises:
    WorkdirError: a key differs that must not change after training.
  """
  kept = lambda side: {name: value for name, value in side.items()
                       if name not in may_differ}
  changes = config_lib.diff(
      kept(read_object(workdir.path / "config.json")),
      kept(config_lib.jsonable(config)))
  refused = [change for change in changes if not MAY_CHANGE.match(change)]
  if refused and not untrained:
    lines = "\n  ".join(refused)
    raise WorkdirError(
        f"{workdir.path} belongs to a run of another config. It differs in "
        f"(there -> now):\n  {lines}\nName another --workdir, or start "
        "with that config again.")
  why = " (nothing had been trained, so it replaces that config)" * bool(
      refused)
  return [f"differs from the last start{why}: {change}" for change in changes]


def read_or_set_aside(
    path: pathlib.Path, read: Callable[[], Any], say: Callable[[str], None],
) -> Any:
  """Reads a record; if it is damaged, moves it aside and returns None.

  Only for records of how a run went, which no computed number depends on.

  Args:
    path: the record; it is moved aside if it is damaged.
    read: reads it.
    say: takes a warning about it.
  """
  try:
    return read()
  except WorkdirError as error:
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    say(f"{error} It is {aside.name} now, and is begun anew.")
    return None


def _holds_files(path: pathlib.Path) -> bool:
  """Tests if a directory has files; hidden ones do not count.

  A start that was killed at its first write leaves a hidden one.
  """
  return path.exists() and any(
      not file.name.startswith(".") for file in path.iterdir())


def open_existing(
    path: str | os.PathLike, *, is_writer: bool = True) -> Workdir:
  """Opens the workdir of an earlier run.

  Raises:
    WorkdirError: there is none.
  """
  workdir = Workdir(path, is_writer=is_writer)
  if not (workdir.path / "config.json").exists():
    raise WorkdirError(
        f"{workdir.path} holds no run (no config.json). Name the --workdir of "
        "a posttrain train.")
  return workdir


def damaged(path: str | os.PathLike, what: str) -> WorkdirError:
  """Makes the error for a file that does not hold what was written to it."""
  remove = ", or remove it" * (pathlib.Path(path).name != "config.json")
  return WorkdirError(f"{path} is damaged: {what}. Put a copy back{remove}.")


def read_text(path: str | os.PathLike) -> str:
  """Reads UTF-8 text; raises WorkdirError with the file's name otherwise."""
  try:
    return pathlib.Path(path).read_bytes().decode()
  except UnicodeDecodeError as error:
    raise damaged(path, str(error)) from error


def read_json(path: str | os.PathLike) -> Any:
  """Reads a JSON file; raises WorkdirError with its name if it is damaged."""
  try:
    return json.loads(read_text(path))
  except (json.JSONDecodeError, RecursionError) as error:
    raise damaged(path, f"no JSON ({error})") from error


def read_object(path: str | os.PathLike, *needed: str) -> dict[str, Any]:
  """Reads a JSON object that has the needed keys; raises as `read_json`."""
  found = read_json(path)
  if not isinstance(found, dict):
    raise damaged(path, f"found {str(found)[:40]!r}, needed an object")
  for name in needed:
    if name not in found:
      raise damaged(path, f"it has no {name!r}")
  return found


def read_config(
    path: str | os.PathLike, assignments: Sequence[str] = (),
) -> config_dict.ConfigDict:
  """Reads the config of a workdir, with `path=value` assignments applied.

  Raises:
    WorkdirError: config.json is no JSON object, or of an old version.
    ConfigError: it is no config, or an assignment is wrong.
  """
  check_version(Workdir(path, is_writer=False))
  file = pathlib.Path(path, "config.json")
  return config_lib.assign(
      read_object(file), assignments, str(file), saved=True)


def replace_file(path: pathlib.Path, content: bytes) -> None:
  """Replaces a file in one piece: readers see the old one or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  with partial.open("wb") as file:
    file.write(content)
    # Without fsync a power cut may keep the rename and lose the content.
    file.flush()
    os.fsync(file.fileno())
  partial.replace(path)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Describes differences between two starts, apart from time and command."""
  kept = lambda side: {key: value for key, value in side.items()
                       if key not in ("time", "command")}
  return config_lib.diff(kept(old), kept(new))
