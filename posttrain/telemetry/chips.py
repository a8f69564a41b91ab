"""Published rates of TPU chips, and of GPUs for their utilisation.

Rates and links are those that Google Cloud publishes per chip
(https://docs.cloud.google.com/tpu/docs/v5p and its neighbours). The memory is
the limit that libtpu 0.0.42 names when a program is too large. The first of
`kinds` is libtpu's name of the device; JAX knows the other names too. A chip is
listed if training and decoding programs have been compiled for it.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU device, as JAX sees it: all of a chip, or half of a tpu7x.

  Attributes:
    kinds: names of the device in JAX (`device_kind`).
    flops: FLOPs per second, bfloat16.
    hbm_bytes: memory that a program may use.
    hbm_rate: memory bandwidth, bytes per second.
    axis_rate: bytes per second that a device sends along one axis of the
      torus, both ways together: half of the published bidirectional rate,
      over the axes.
    dcn_rate: bytes per second between slices, one way.
    per_chip: devices of a chip.
    sizes: slice shapes that libtpu knows and that Google Cloud offers,
      smallest first.
  """

  name: str
  kinds: tuple[str, ...]
  flops: float
  hbm_bytes: int
  hbm_rate: float
  axis_rate: float
  dcn_rate: float
  per_chip: int
  sizes: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8",
          "8x8x8", "8x8x16", "8x16x16")


def _chip(
    name: str, *kinds: str, teraflops: float, usable_gib: float,
    hbm_gbps: float, ici_gbps: float, dcn_gbits: float,
    sizes: tuple[str, ...], per_chip: int = 1,
) -> Chip:
  """Converts figures per chip to a device's; `usable_gib` is per device."""
  axes = sizes[0].count("x") + 1
  return Chip(
      name=name, kinds=kinds, flops=teraflops * 1e12 / per_chip,
      hbm_bytes=int(usable_gib * GIB), hbm_rate=hbm_gbps * 1e9 / per_chip,
      axis_rate=ici_gbps * 1e9 / 2 / axes / per_chip,
      dcn_rate=dcn_gbits * 1e9 / 8 / per_chip, per_chip=per_chip, sizes=sizes)


CHIPS = {chip.name: chip for chip in (
    # The network's rate of v5e and v6e is published per pod of 256 chips.
    _chip("v5e", "TPU v5 lite", "TPU v5e", teraflops=197, usable_gib=15.75,
          hbm_gbps=819, ici_gbps=400, dcn_gbits=25, sizes=_FLAT),
    _chip("v5p", "TPU v5", "TPU v5p", teraflops=459, usable_gib=95.74,
          hbm_gbps=2765, ici_gbps=1200, dcn_gbits=50, sizes=_CUBES),
    _chip("v6e", "TPU v6 lite", "TPU v6e", teraflops=918, usable_gib=31.25,
          hbm_gbps=1638, ici_gbps=800, dcn_gbits=100, sizes=_FLAT),
    _chip("tpu7x", "TPU7x", teraflops=2307, usable_gib=94.75, hbm_gbps=7380,
          ici_gbps=1200, dcn_gbits=100, sizes=_CUBES, per_chip=2),
)}

# bfloat16 FLOPs per second without sparsity, from NVIDIA's data sheets, by
# JAX's `device_kind`. For MFU alone: plans are made for TPU slices only.
GPUS = {
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


def find(kind: str) -> Chip | None:
  """Finds the chip with a JAX device kind; None if the table lacks it."""
  return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
