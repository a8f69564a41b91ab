"""`posttrain plan`: compiles, prints and saves a plan."""

import json
import pathlib

from ml_collections import config_dict

from posttrain.plan import estimate, measure, plan, report, sweep, topology
from posttrain.plan.environment import PlanError
from posttrain.telemetry import console as console_lib
from posttrain.workdir import replace_file

FITS, TOO_LARGE = 0, 3


def run(
    config: config_dict.ConfigDict, where: topology.Topology, *,
    json_file: str = "", html_file: str = "", only: str = "",
    sweeping: bool = False, compile_best: int = 3,
) -> int:
  """Plans a config; returns the exit status.

  Args:
    json_file, html_file: where to save the figures and the page; "" for not.
    only, sweeping, compile_best: as the flags of these names.

  Raises:
    PlanError: the config does not go with the topology, or cannot be swept.
  """
  if sweeping and config.mesh.roles == "split":
    raise PlanError(
        "--sweep estimates roles that share their devices. Leave it out, or "
        "set mesh.roles='shared'.")
  console = console_lib.Console()
  found = plan.make(
      config, where, only=only, report=lambda result: console.line(
          _progress(result)))
  console.line("")
  for line in report.summary(found):
    console.line(line)
  extra = []
  if sweeping:
    ranked = sweep.rank(
        estimate.of_config(config, found.setup.model), where)
    extra = sweep.tables(ranked, sweep.compile_best(
        config, ranked, compile_best, only=only))
  for table in (*report.tables(found), *extra):
    for line in report.lines(table):
      console.line(line)
  if found.advice:
    console.line("\n== What to change ==")
  for line in found.advice:
    console.line(f"  {line}")
  for file, text in (
      (json_file, lambda: json.dumps(report.as_json(found), indent=2)),
      (html_file, lambda: report.page(found, extra))):
    if file:
      replace_file(pathlib.Path(file), text().encode())
      console.line(f"saved {file}")
  return FITS if found.fits else TOO_LARGE


def _progress(result: measure.Result) -> str:
  if result.same_as:
    return f"{result.name}: the program of {result.same_as}"
  verdict = "fits" if result.fits else "does NOT fit"
  return f"{result.name}: compiled in {result.seconds:.0f} s, {verdict}"
