"""Gradient accumulation: cuts a host batch into microbatches on the mesh.

  M: microbatches  R: rows of one, over all devices  T: length
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from posttrain import sharding


def stack(
    batch: Mapping[str, np.ndarray], num_microbatches: int,
    put: Callable[..., Any] = sharding.put,
) -> dict[str, Any]:
  """Cuts rows into microbatches, padded to what the mesh divides.

  Padding is zeros: segment 0, outside every loss. As denominators are sums over
  the whole batch, it changes no gradient.

  Args:
    batch: arrays [rows] or [rows, T, ...], the same on every host.
    num_microbatches: M.
    put: makes device arrays; `sharding.abstract` gives their shapes only.

  Returns:
    Arrays [M, R] or [M, R, T, ...], sharded over "batch" and "length".
  """
  multiple = num_microbatches * sharding.axis_size("batch")

  def fold(array: np.ndarray) -> Any:
    # Every microbatch must have the same number of rows, which the mesh
    # divides: all of them run in one compiled loop.
    padding = -len(array) % multiple
    array = np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
    array = array.reshape(num_microbatches, -1, *array.shape[1:])
    axes = (None, "batch", "length", *(None,) * array.ndim)[:array.ndim]
    return put(array, *axes)

  return {name: fold(array) for name, array in batch.items()}
