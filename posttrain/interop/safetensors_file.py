"""Safetensors format: a JSON header, then the tensors' bytes.

Tensors are read as views of the mapped file, so that one can be transposed and
cut before a byte of it is read, and are written one by one. The `safetensors`
package copies what it reads, and needs a whole file at once to write it. The
tests compare the two.

Format: https://huggingface.co/docs/safetensors; 8 bytes with the header's
length, the header (name -> dtype, shape, offsets from its end), the data.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # The limit of the format's own reader.


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Place of a tensor in a safetensors file.

  Attributes:
    path: the file's path.
    dtype: the format's name, such as "BF16"; not all can be read here.
    shape: row-major.
    offset: its first byte in the file.
  """

  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  def view(self) -> np.ndarray:
    """Maps the values, which are read from disk where they are touched."""
    return np.memmap(
        self.path, DTYPES[self.dtype], "r", self.offset, self.shape)


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """Reads the places of a file's tensors, by name.

  Raises:
    ValueError: the file is cut short, or in another format.
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LONGEST_HEADER):
      raise _damaged(path, f"its {size} bytes do not hold the header")
    text = file.read(length)
  try:
    spans = {name: _span(entry) for name, entry in json.loads(text).items()
             if name != "__metadata__"}
  except (ValueError, KeyError, TypeError, AttributeError,
          RecursionError) as error:
    raise _damaged(path, f"its header is no index of tensors ({error!r})"
                   ) from error
  # Tensors must follow each other without gaps, as the format says: a file may
  # otherwise carry bytes that no reader shows.
  position = 0
  for name, (dtype, shape, begin, end) in sorted(
      spans.items(), key=lambda item: item[1][2:]):
    if begin != position or end < begin:
      raise _damaged(path, f"{name} is said to be at bytes {begin} to {end}, "
                     f"and the tensor before ends at {position}")
    if dtype in DTYPES and (
        math.prod(shape) * DTYPES[dtype].itemsize != end - begin):
      raise _damaged(path, f"{name} of {dtype} {list(shape)} is said to take "
                     f"{end - begin} bytes")
    position = end
  if position != size - 8 - length:
    raise _damaged(path, f"it has {size} bytes and its header speaks of "
                   f"{position + 8 + length}")
  return {
      name: Tensor(path, dtype, shape, 8 + length + begin)
      for name, (dtype, shape, begin, _) in spans.items()}


def _span(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
  """Reads type, shape and offsets of a header's entry; raises any error."""
  begin, end = entry["data_offsets"]
  numbers = (*entry["shape"], begin, end)
  if not all(type(n) is int and n >= 0 for n in numbers):
    raise ValueError(f"{entry} has something else than whole numbers")
  return str(entry["dtype"]), tuple(entry["shape"]), begin, end


def _damaged(path: pathlib.Path, what: str) -> ValueError:
  return ValueError(
      f"{path} cannot be read as a safetensors file: {what}. It may be cut "
      "short, or in another format; get it again.")


class Writer:
  """Writes a file tensor by tensor."""

  def __init__(
      self, path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]],
      dtype: np.dtype,
  ):
    """Writes the header.

    Args:
      path: a new file.
      shapes: by name, in the order in which tensors will be written.
      dtype: dtype of all tensors.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
      end = position + math.prod(shape) * dtype.itemsize
      header[name] = dict(
          dtype=NAMES[dtype], shape=list(shape), data_offsets=[position, end])
      position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Data begin at a multiple of 8.
    self._dtype = dtype
    self._end = 8 + len(text) + position
    self._file = path.open("xb")
    self._file.write(len(text).to_bytes(8, "little") + text)

  def write(self, tensor: np.ndarray) -> None:
    """Appends the next tensor."""
    assert tensor.dtype == self._dtype, (tensor.dtype, self._dtype)
    self._file.write(np.ascontiguousarray(tensor).view(np.uint8).data)

  def close(self) -> None:
    """Flushes the file to the disk; all tensors must be written."""
    assert self._file.tell() == self._end, (self._file.tell(), self._end)
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
