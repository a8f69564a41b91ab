"""Files that earlier starts left in a workdir, and whether they trained.

See `posttrain.workdir` for what is where.
"""

import pathlib
import re
import shutil

from posttrain import lease

# What a start makes before it trains, and the next one makes by itself: in the
# workdir, and in a stage's directory.
MADE_ANEW = ("tokenizer", "tokenizer.partial", "model.json", "metrics.jsonl",
             "tensorboard")
MADE_ANEW_IN_STAGES = ("data_report.json", "goodput.json", "rollouts")
PARTIAL = re.compile(r"\.(.+)\.(\d+)\.partial")


def has_trained(workdir: pathlib.Path) -> bool:
  """Whether a stage has made anything that a config belongs to."""
  steps = workdir.glob("*/checkpoints/*")  # A kill leaves half of one.
  made = ("*/done.json", "*/damaged/*", "*/eval/[!.]*")
  rows = workdir / "metrics.jsonl"
  return any(step.name.isdecimal() for step in steps) or any(
      any(workdir.glob(pattern)) for pattern in made) or (
          rows.exists() and b"\n" in rows.read_bytes())


def clear(workdir: pathlib.Path) -> None:
  """Removes what starts that have trained nothing left behind."""
  stages = [file.parent for file in workdir.glob("*/data_report.json")]
  stages += [file.parent for file in workdir.glob("*/goodput.json")]
  for path in [
      *(workdir / name for name in MADE_ANEW),
      *(stage / name for stage in stages for name in MADE_ANEW_IN_STAGES)]:
    if path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink(missing_ok=True)


def remove_partials(workdir: pathlib.Path) -> None:
  """Removes what processes that were killed had begun to write.

  They are dead: who holds the workdir is alone in writing, but for a report
  that is being made, which a process of this machine may still write.
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
