"""Charts of a stage's metrics, for the report; and those that stages share."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chart:
  """Series that are drawn in one chart.

  Attributes:
    metrics: name -> label in the legend.
    spread: name -> metric of its standard deviation, drawn as a band.
    unit: "number", "share" (0..1, shown in percent) or "seconds".
    log: a logarithmic value axis.
    stacked: areas on top of one another.
    optional: a run may lack it, so the report does not list its absence.
  """

  title: str
  metrics: Mapping[str, str]
  spread: Mapping[str, str] = dataclasses.field(default_factory=dict)
  unit: str = "number"
  log: bool = False
  stacked: bool = False
  optional: bool = False
  caption: str = ""


LEARNING = (
    Chart("Gradient norm", {"grad_norm": "before clipping"}, log=True),
    Chart("Learning rate", {"learning_rate": "learning rate"}),
)
MACHINE = (
    Chart("Utilisation", {"perf/mfu": "MFU", "perf/learn_mfu": "of updates",
                          "perf/goodput": "goodput"}, unit="share",
          caption="MFU: model FLOPs over the chips' peak. Goodput: wall time "
          "that went to steps that count.", optional=True),
    Chart("Hosts", {"time/host_slowest": "slowest",
                    "time/host_median": "median"}, unit="seconds",
          caption="Time of its own between two comparisons.", optional=True),
)
