"""Roofline: the least time that a program can take, from its counts.

Every time here is modelled: a count, over a published rate. The bound of a
program is the largest of matrix unit, memory and network, as if each were used
perfectly and all at once.
"""

import dataclasses

ASSUMPTIONS = (
    "rates are the published ones of the chip, and nothing else runs on it",
    "matrix products run at the bfloat16 rate; a float32 product at the "
    "highest precision takes six passes",
    "a collective is a ring along one axis of the torus, both ways, one after "
    "another; over several mesh axes it has the links of one",
    "between slices each chip has its own share of the network",
    "computation, memory and network overlap perfectly: the bound is the "
    "largest of the three",
    "vector arithmetic, the latency of steps and of collectives, and the host "
    "cost nothing",
)


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of one run on one device."""

  matrix: float
  memory: float
  ici: float
  dcn: float

  @property
  def bound(self) -> float:
    return max(self.matrix, self.memory, self.ici + self.dcn)

  @property
  def limited_by(self) -> str:
    network = self.ici + self.dcn
    return {self.matrix: "matrix unit", self.memory: "memory",
            network: "network"}[self.bound]
