"""What the devices of a run do: rates per chip, their peak, memory in use."""

import dataclasses
import os
import pathlib

import jax

from posttrain.telemetry import chips

PAGES = pathlib.Path("/proc/self/statm")


@dataclasses.dataclass(frozen=True)
class Machine:
  """All devices of a run.

  Attributes:
    kind: what JAX calls them.
    chips: how many; devices, where the kind is not in the table.
    peak: FLOPs per second of all, in bfloat16; None if not known.
  """

  kind: str
  chips: float
  peak: float | None

  def mfu(self, name: str, flops: float, seconds: float) -> dict[str, float]:
    """The share of the peak that all devices together had, as a metric.

    Empty where the peak is not known.
    """
    return {} if self.peak is None else {name: flops / seconds / self.peak}


def find() -> Machine:
  """The devices of this run."""
  kind, count = jax.devices()[0].device_kind, jax.device_count()
  chip = chips.find(kind)
  if chip is None:
    flops = chips.GPUS.get(kind)
    return Machine(kind, count, flops and count * flops)
  return Machine(kind, count / chip.per_chip, count * chip.flops)


def memory_in_use() -> dict[str, float]:
  """Bytes, as metrics: of this host's fullest device, or of the process.

  A backend that does not say (CPU) has its arrays in the process's memory,
  where Linux tells how large that is.
  """
  stats = [device.memory_stats() for device in jax.local_devices()]
  if all(stats):
    return {
        "perf/device_bytes": max(s["bytes_in_use"] for s in stats),
        "perf/device_bytes_peak": max(s["peak_bytes_in_use"] for s in stats)}
  if not PAGES.exists():
    return {}
  pages = int(PAGES.read_text().split()[1])
  return {"perf/host_bytes": float(pages * os.sysconf("SC_PAGE_SIZE"))}
