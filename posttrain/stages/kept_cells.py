"""Cells of an evaluation that are finished, kept until all of it is.

  <stage>/eval/cells/<checkpoint>/<cell>.json

A cell may take an hour. One that is finished is written at once, and a restart
takes its records as they are: figures are made from records alone. A file names
what it was made with, the code of this package included, and another run
ignores it: two versions of a grader must not be mixed in one result.
"""

import functools
import hashlib
import pathlib
import shutil
from typing import Any

from posttrain import config as config_lib
from posttrain import distributed
from posttrain import workdir as workdir_lib
from posttrain.evaluation import summary
from posttrain.stages.run_context import RunContext
from posttrain.tasks import loading

Records = list[dict[str, Any]]


class KeptCells:
  """Kept cells of one evaluate stage; every host makes the same calls."""

  def __init__(self, context: RunContext):
    section = config_lib.jsonable(context.section)
    self._context = context
    self._folder = context.directory / "eval" / "cells"
    self._made_with = {
        "seed": context.config.seed, "section": section,
        "code": _code(), "sources": {
            name: loading.source_hash(name)
            for name in config_lib.functions(context.config)}}

  def read(self, checkpoint: str, cell: summary.Cell) -> Records | None:
    """Reads a cell's records; None where there are none of these settings.

    Process 0 reads them, as a file may show up late on the other hosts. It
    sends them the values that figures are made from, and not the texts.
    """
    whole: Records | None = None

    def read() -> Records | None:
      nonlocal whole
      self._context.workdir.check_lease()  # Each cell; all hosts hear of it.
      whole = self._read(checkpoint, cell)
      return whole and [
          {name: record[name] for name in summary.SCORED_FROM}
          for record in whole]

    told = distributed.on_first_host(read)
    return told if whole is None else whole

  def _read(self, checkpoint: str, cell: summary.Cell) -> Records | None:
    file = self._file(checkpoint, cell)
    if not file.exists():
      return None
    try:
      found = workdir_lib.read_json(file)
      records, made_with = found["records"], found["made_with"]
    except (ValueError, KeyError, TypeError) as error:
      self._context.console.warning(
          f"{file} is damaged ({error}); the cell is evaluated again")
      return None
    if made_with != self._made_with:
      self._context.console.line(
          f"{file} was made with other settings; the cell is evaluated again")
      return None
    self._context.console.line(
        f"  {checkpoint} {cell.name}: kept from an earlier start")
    return records

  def write(
      self, checkpoint: str, cell: summary.Cell, records: Records) -> None:
    """Keeps a cell that is finished."""
    workdir = self._context.workdir
    workdir.write_json(
        self._file(checkpoint, cell).relative_to(workdir.path),
        {"made_with": self._made_with, "records": records})

  def clear(self) -> None:
    """Removes all kept cells, once the results hold their records."""
    if self._context.workdir.is_writer and self._folder.exists():
      shutil.rmtree(self._folder)

  def _file(self, checkpoint: str, cell: summary.Cell):
    return self._folder / checkpoint / f"{cell.name}.json"


@functools.cache
def _code() -> str:
  """A hash of this package."""
  package = pathlib.Path(config_lib.__file__).parents[1]
  found = hashlib.sha256()
  for file in sorted(package.rglob("*.py")):
    found.update(file.read_bytes())
  return found.hexdigest()
