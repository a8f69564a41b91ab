"""Leftover files of earlier starts in a workdir, and if they trained anything.

See `posttrain.workdir` for what is where.
"""

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from posttrain import lease

# Files that a start makes before it trains; the next start makes them again.
MADE_ANEW = (
    r"model\.json|metrics\.jsonl"
    r"|tensorboard/{stage}/events\.out\.tfevents\.[^/]+"
    r"|tokenizer(\.partial)?/(tokenizer\.(json|model)|chat_template\.jinja"
    r"|(tokenizer|generation)_config\.json|SHA256SUMS)"
    r"|{stage}/(data_report\.json|goodput\.json|rollouts/step_\d+\.jsonl)")
# Files that stay: the next start adds to them, or people may want them.
STAYS = (
    r"(config|environment)\.json|report\.html"
    r"|(environment\.json|metrics\.jsonl|{stage}/goodput\.json)\.damaged"
    r"|{stage}/(bad_batch_step_\d+\.npz|journal/(step_\d+|[^/]+/[^/]+))")
# Folders that are not listed: all their files are a run's, and may be many.
OWN_FOLDERS = r"{stage}/(checkpoints|damaged|profile)|frozen"
PARTIAL = re.compile(
    r"\.(.+)\.(\d+)\.partial|\.lease\.[0-9a-f]{32}\.partial")


def is_untrained(
    workdir: pathlib.Path, config: Any, starts: Sequence[Mapping],
) -> bool:
  """Tests if this is a run that has trained nothing, and holds no other files.

  Args:
    config: content of its config.json.
    starts: content of its environment.json.
  """
  stages = _stages(config)
  # Such a run's files are deleted by `clear`, so doubt means no: other tools
  # write a config.json too.
  ours = bool(stages) and bool(starts) and all(
      "versions" in start for start in starts)
  if not ours or has_trained(workdir):
    return False
  tokenizer = workdir / "tokenizer"
  return (not tokenizer.exists() or (tokenizer / "SHA256SUMS").exists()) and (
      # One file of somebody else, and nothing here is removed.
      all(_matches(f"{MADE_ANEW}|{STAYS}", stages, file)
          or PARTIAL.fullmatch(file.name)
          for file in _files(workdir, workdir, stages)))


def _stages(config: Any) -> list[str]:
  """Returns the names of a saved config's stages; none if it is not of a run.
  """
  found = config.get("stages") if isinstance(config, dict) else None
  return found if isinstance(found, list) and all(
      isinstance(name, str) for name in found) else []


def _matches(pattern: str, stages: Sequence[str], file: pathlib.Path) -> bool:
  names = "|".join(map(re.escape, stages))
  return bool(re.fullmatch(
      pattern.replace("{stage}", f"({names})"), file.as_posix()))


def _files(
    folder: pathlib.Path, workdir: pathlib.Path, stages: Sequence[str],
) -> Iterator[pathlib.Path]:
  """Yields the files of a folder, relative to the workdir, without OWN_FOLDERS.

  Hidden files of the workdir itself are left out: it may be the root of a disk,
  with a `lost+found` or `.Trash`.
  """
  for path in folder.iterdir():
    name = path.relative_to(workdir)
    if name.parts[0].startswith("."):
      continue
    if path.is_symlink() or not path.is_dir():
      yield name
    elif not _matches(OWN_FOLDERS, stages, name):
      yield from _files(path, workdir, stages)


def has_trained(workdir: pathlib.Path) -> bool:
  """Tests if a stage has made anything that a config belongs to."""
  # A checkpoint that was cut off by a kill has a name that is no number.
  steps = workdir.glob("*/checkpoints/*")
  made = ("*/done.json", "*/damaged/*", "*/eval/[!.]*")
  rows = workdir / "metrics.jsonl"
  return any(step.name.isdecimal() for step in steps) or any(
      any(workdir.glob(pattern)) for pattern in made) or (
          rows.exists() and b"\n" in rows.read_bytes())


def clear(workdir: pathlib.Path, config: Any) -> None:
  """Removes the files that starts without any training left behind.

  Args:
    workdir: one for which `is_untrained` holds.
    config: content of its config.json.
  """
  stages = _stages(config)
  for file in list(_files(workdir, workdir, stages)):
    if _matches(MADE_ANEW, stages, file):
      (workdir / file).unlink()
      # Upwards, and never the workdir itself, which may be a mount point.
      for folder in (workdir / parent for parent in list(file.parents)[:-1]):
        if any(folder.iterdir()):
          break
        folder.rmdir()


def remove_partials(workdir: pathlib.Path) -> None:
  """Removes files that killed processes had begun to write.

  Who holds the workdir is alone in writing, so their writers are dead. One
  exception is a report, which another process of this machine may be making. A
  lease's partial file may be a live heartbeat's, which is written again seconds
  later.
  """
  folders = [workdir, *(
      folder for pattern in ("*", "*/rollouts", "*/eval", "*/eval/cells/*")
      for folder in workdir.glob(pattern) if folder.is_dir())]
  for folder in folders:
    for file in folder.glob(".*.partial"):
      match = PARTIAL.fullmatch(file.name)
      if match and not (match[1] == "report.html"
                        and lease.is_running(int(match[2]))):
        file.unlink(missing_ok=True)
