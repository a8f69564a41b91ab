"""What this machine does at best: matrix multiplication and memory traffic.

Measured over all devices at once, in the same run as what is compared with
them, since a shared machine is not the same from one minute to the next.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain import sharding

MATMUL_SIZES = (512, 1024, 2048, 4096, 8192)
LONG_ENOUGH = 0.02  # Seconds of a product; a larger one is no faster then.
# Per device: far beyond any cache, and long against a kernel's launch.
TRAFFIC_BYTES = {"cpu": 2**28}
ACCELERATOR_BYTES = 2**30


def seconds_of(run: Callable[[], Any], repeats: int) -> list[float]:
  """Wall-clock seconds of `run`, which is called once before to warm up."""
  jax.block_until_ready(run())
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return seconds


def random(shape: tuple[int, ...], dtype: str) -> jax.Array:
  """One part per device; values that no algebra can simplify."""
  values = np.random.default_rng(0).standard_normal(shape, np.float32)
  return sharding.put(
      values, "batch", *(None,) * (len(shape) - 1)).astype(dtype)


def matmul_rate(dtype: str, repeats: int) -> float:
  """FLOPs per second of the best size of square product."""
  devices = jax.device_count()
  best = 0.0
  for size in MATMUL_SIZES:
    a = random((devices, size, size), dtype)
    product = jax.jit(lambda a: jnp.einsum("nij,njk->nik", a, a))
    seconds = statistics.median(seconds_of(lambda: product(a), repeats))
    best = max(best, 2 * devices * size**3 / seconds)
    if seconds > LONG_ENOUGH:
      break
  return best


def bandwidth(repeats: int) -> float:
  """Bytes per second of the best of a copy, a sum and a matrix by a vector."""
  devices, width = jax.device_count(), 4096
  size = TRAFFIC_BYTES.get(jax.default_backend(), ACCELERATOR_BYTES)
  rows = size // (4 * width)
  x = random((devices, rows, width), "float32")
  vector = jnp.ones(width)
  read = x.size * 4
  tries = {
      "copy": (jax.jit(lambda x: x + 1), 2 * read),
      "sum": (jax.jit(lambda x: jnp.sum(x, axis=2)), read),
      "matvec": (jax.jit(lambda x: jnp.einsum("nij,j->ni", x, vector)), read)}
  return max(
      moved / statistics.median(seconds_of(lambda: function(x), repeats))
      for function, moved in tries.values())


def measure(dtype: str, *, repeats: int = 5) -> dict[str, float]:
  """Both rates; the mesh is set by the caller, all of it on "fsdp"."""
  return {
      "matmul_flops_per_sec": matmul_rate(dtype, repeats),
      "memory_bytes_per_sec": bandwidth(repeats)}
