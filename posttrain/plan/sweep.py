"""Sweep over meshes, topologies and remat policies, by modelled time."""

from collections.abc import Sequence

from ml_collections import config_dict

from posttrain import config as config_lib
from posttrain import sharding
from posttrain.plan import estimate, plan, report
from posttrain.plan.topology import Topology
from posttrain.stages.stage import stage_of
from posttrain.telemetry.memory import format_bytes

SHOWN = 12


def rank(
    stages: estimate.Stages, topology: Topology,
) -> list[estimate.Candidate]:
  """Ranks the best meshes and policies of every size by chip-seconds of a step.

  What does not fit comes last, the smallest first.
  """
  best = []
  for other in topology.others():
    best += sorted(estimate.candidates(stages, other), key=_order)[:3]
  return sorted(best, key=_order)


def _order(each: estimate.Candidate) -> tuple:
  return (not each.fits, each.chip_seconds if each.fits else each.bytes)


def compile_best(
    config: config_dict.ConfigDict, ranked: Sequence[estimate.Candidate],
    count: int, only: str = "",
) -> list[tuple[estimate.Candidate, plan.Plan]]:
  """Compiles the first candidates that are estimated to fit.

  Args:
    only: as in `plan.make`.
  """
  found = []
  for each in [each for each in ranked if each.fits][:count]:
    changed = config_lib.assign(
        config, each.assignments, "--sweep", saved=True)
    found.append((each, plan.make(
        changed, each.topology, only=only, with_padding=False)))
  return found


def tables(
    ranked: Sequence[estimate.Candidate],
    compiled: Sequence[tuple[estimate.Candidate, plan.Plan]],
) -> list[report.Table]:
  """Tables of the ranking, and of the best after compilation."""
  layout = lambda each: (str(each.topology), *(
      text.partition("=")[2] for text in each.assignments))
  rows = [(
      *layout(each), "yes" if each.fits else "no", format_bytes(each.bytes),
      report.seconds(each.seconds), f"{each.chip_seconds:.3g}")
      for each in ranked[:SHOWN]]
  header = ("topology", *sharding.ALWAYS, "remat")  # The axes that it sweeps.
  found = [report.Table(
      "Sweep (modelled)",
      (*header, "fits", "bytes per device", "a step", "chip-seconds"), rows,
      (f"{len(ranked)} candidates, three of each size; by chip-seconds of "
       "one step of every training stage",))]
  if not compiled:
    return found
  rows = []
  for each, result in compiled:
    config = result.setup.config
    steps = [result.step_seconds(name) for name in config.stages
             if stage_of(config[name].kind).schema.trains]
    known = [seconds for seconds in steps if seconds is not None]
    rows.append((
        *layout(each), "yes" if result.fits else "NO",
        format_bytes(max(r.memory.total for r in result.results)),
        report.seconds(sum(known)) if known == steps else report.NONE,
        f"{sum(r.seconds for r in result.results):.0f} s"))
  return [*found, report.Table(
      "Best of the sweep, compiled", (
          *header, "fits (compiler)", "largest peak + beside (compiler)",
          "steps (modelled, from HLO)", "compiled in (measured)"), rows)]
