"""Machine rates: the best of this machine for a work's products and traffic.

  python -m benchmarks.machine --size=10m --work=sft

This is a process of its own that `benchmarks.serve` talks to, so that its
arrays are in no system's peak of memory. A shared machine changes from minute
to minute, so it is measured again in every round.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import limits, ours, serve, shapes
from benchmarks.limits import Product

OPERAND_BYTES = 2**26  # Right factors of one measurement, all different.
SECONDS = 0.02  # Least time of one measurement.
TRAFFIC_BYTES = {"cpu": 2**28}  # Far beyond any cache.
ACCELERATOR_BYTES = 2**30


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
  """Median of the wall-clock seconds, after a call that warms up."""
  jax.block_until_ready(run())
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def copies(product: Product) -> int:
  """Chooses how often a product is made, so that a call's own cost is small.

  Each copy has weights of its own, since a cached factor would be too fast.
  """
  size = 4 * product.batch * product.k * product.n
  return int(max(1, min(64, OPERAND_BYTES // size,
                        SECONDS * 1e11 // product.flops)))


class Products:
  """Programs that compute one product many times, compiled once."""

  def __init__(self, products: Iterable[Product], dtype: str):
    self._runs = {product: self._run(product, dtype) for product in products}

  def _run(self, product: Product, dtype: str) -> Callable[[], Any]:
    draw = np.random.default_rng(0).standard_normal
    shape = lambda *last: (product.batch, *last)[product.batch == 1:]
    left = jnp.asarray(draw(shape(product.m, product.k), np.float32), dtype)
    rights = [
        jnp.asarray(draw(shape(product.k, product.n), np.float32), dtype)
        for _ in range(copies(product))]
    multiply = jax.jit(lambda left, rights: [left @ x for x in rights])
    return lambda: multiply(left, rights)

  def rates(self, repeats: int) -> dict[Product, float]:
    """Measures FLOPs per second of each product."""
    return {product: copies(product) * product.flops / seconds_of(run, repeats)
            for product, run in self._runs.items()}


def bandwidth(repeats: int) -> float:
  """Measures bytes per second: the best of a copy, a sum and matrix by vector.
  """
  width = 4096
  size = TRAFFIC_BYTES.get(jax.default_backend(), ACCELERATOR_BYTES)
  x = jnp.asarray(np.random.default_rng(0).standard_normal(
      (size // (4 * width), width), np.float32))
  vector = jnp.ones(width)
  read = x.size * 4
  tries = {
      "copy": (jax.jit(lambda x: x + 1), 2 * read),
      "sum": (jax.jit(lambda x: jnp.sum(x, axis=1)), read),
      "matvec": (jax.jit(lambda x: x @ vector), read)}
  return max(moved / seconds_of(lambda: function(x), repeats)
             for function, moved in tries.values())


def main() -> None:
  size, _, shape = serve.arguments(__doc__, shapes.WORKS)
  config = ours.model_config(size)
  works = limits.of(config, shape)
  found = Products(
      {product for work in works for product in work.products}, config.dtype)
  for _ in sys.stdin:
    rates, moved = found.rates(repeats=3), bandwidth(repeats=3)
    flops = sum(work.flops for work in works)
    print(json.dumps({
        "seconds": sum(work.seconds(rates, moved) for work in works),
        "flops": flops, "bytes_per_sec": moved,
        "flops_per_sec": flops / sum(
            count * product.flops / rates[product]
            for work in works for product, count in work.products.items()),
    }), flush=True)


if __name__ == "__main__":
  main()
