"""The safetensors format: a JSON header, then the tensors' bytes.

Read as views of the mapped file, so that a tensor can be turned round and cut
before a byte of it is read, and written tensor by tensor; the `safetensors`
package copies what it reads, and wants a whole file at once to write it. The
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
LONGEST_HEADER = 100_000_000  # Of the format's own reader.


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies.

  Attributes:
    path: of its file.
    dtype: as the format names it, "BF16"; not all can be read here.
    shape: row-major.
    offset: of its first byte in the file.
  """

  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  def view(self) -> np.ndarray:
    """The values, read from disk where they are touched."""
    return np.memmap(
        self.path, DTYPES[self.dtype], "r", self.offset, self.shape)


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a file by name.

  Raises:
    ValueError: it is cut short, or in another format.
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
  """Type, shape and offsets of a header's entry, or any error."""
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
  """A file that is written tensor by tensor."""

  def __init__(
      self, path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]],
      dtype: np.dtype,
  ):
    """Writes the header.

    Args:
      path: of a new file.
      shapes: by name, in the order in which the tensors will come.
      dtype: of all of them.
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
    """The file is whole, and on the disk."""
    assert self._file.tell() == self._end, (self._file.tell(), self._end)
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
