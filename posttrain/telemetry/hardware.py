"""Hardware of a run: chips and their peak, and memory in use."""

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
    kind: JAX's name for the kind of device.
    chips: number of chips; of devices, if the kind is not in the table.
    peak: FLOPs per second of all chips, in bfloat16; None if not known.
  """

  kind: str
  chips: float
  peak: float | None

  def mfu(self, name: str, flops: float, seconds: float) -> dict[str, float]:
    """Returns the model-FLOPs utilisation (MFU) as a metric.

    Empty if the peak is not known.

    Args:
      name: the metric's name.
      flops: model FLOPs on all devices, see `telemetry.flops`.
      seconds: in which they were computed.
    """
    return {} if self.peak is None else {name: flops / seconds / self.peak}


def find() -> Machine:
  """Finds the devices of this run."""
  kind, count = jax.devices()[0].device_kind, jax.device_count()
  chip = chips.find(kind)
  # GPUs and CPUs: a device is a chip, and the peak of a CPU is not known.
  if chip is None:
    flops = chips.GPUS.get(kind)
    return Machine(kind, count, flops and count * flops)
  return Machine(kind, count / chip.per_chip, count * chip.flops)


def memory_in_use() -> dict[str, float]:
  """Measures memory in use, as metrics in bytes.

  On accelerators it is that of this host's fullest device. A CPU backend
  reports nothing: its arrays are in the memory of the process, which Linux
  reports.
  """
  stats = [device.memory_stats() for device in jax.local_devices()]
  if all(stats):
    return {
        "perf/device_bytes": max(s["bytes_in_use"] for s in stats),
        "perf/device_bytes_peak": max(s["peak_bytes_in_use"] for s in stats)}
  if not PAGES.exists():
    return {}
  pages = int(PAGES.read_text().split()[1])  # Resident set size.
  return {"perf/host_bytes": float(pages * os.sysconf("SC_PAGE_SIZE"))}
