"""Accelerator names: each launcher's words for the slices of `posttrain plan`.

The sizes are those of `posttrain.plan.topology`, so that what was planned is
what is launched. Sources: https://docs.cloud.google.com/tpu/docs/v5p and its
neighbours (accelerator types, runtime versions),
https://docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
(labels), and the tables of xpk and SkyPilot.
"""

import dataclasses

from posttrain.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Names:
  """Names of one chip.

  Attributes:
    accelerator: the prefix of an accelerator type, as in `v5litepod-16`.
    cores: units per chip that an accelerator type counts.
    runtime: the image of a TPU VM; "" if the chip has no TPU VMs.
    gke: the node label `cloud.google.com/gke-tpu-accelerator`.
  """

  accelerator: str
  cores: int
  runtime: str
  gke: str


NAMES = {
    "v5e": Names("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Names("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Names("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    "tpu7x": Names("tpu7x", 2, "", "tpu7x"),  # On GKE only.
}


def names(topology: Topology) -> Names:
  return NAMES[topology.chip.name]


def accelerator_type(topology: Topology) -> str:
  """Returns the accelerator type of one slice, such as `v5p-128` for v5p:4x4x4.
  """
  found = names(topology)
  return f"{found.accelerator}-{chips_per_slice(topology) * found.cores}"


def runtime_version(topology: Topology) -> str:
  """Returns the image of a TPU VM.

  Raises:
    ValueError: the chip is not offered as TPU VMs.
  """
  found = names(topology)
  if not found.runtime:
    raise ValueError(
        f"--topology={topology.name}: {topology.chip.name} is offered on GKE "
        "only. Use `python -m launch.gke` or `python -m launch.xpk`.")
  return found.runtime


def chips_per_slice(topology: Topology) -> int:
  return topology.num_chips // topology.num_slices


def chips_per_host(topology: Topology) -> int:
  """Chips of a GKE machine for slices; a TPU VM of v5e or v6e may have eight.
  """
  return min(4, chips_per_slice(topology))


def hosts_per_slice(topology: Topology) -> int:
  return chips_per_slice(topology) // chips_per_host(topology)
