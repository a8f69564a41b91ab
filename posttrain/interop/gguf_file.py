"""GGUF format: metadata and an index of tensors, then the tensors' bytes.

Every count and size is compared with the bytes that are left before anything of
that size is made: a header of a few bytes can announce 2**40 elements. The
`gguf` package's own reader believes it. That package only dequantises here, and
the tests compare the two readers.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2
and 3, little-endian; magic, version, number of tensors, number of fields; the
fields, as key, type and value; the tensors, as name, dimensions, type and
offset; the data, aligned.
"""

import dataclasses
import math
import mmap
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np

LONGEST_HEADER = 100_000_000  # As in safetensors; vocabularies take 10 MB.
DEEPEST_ARRAY = 4  # Most levels of nested arrays.
MOST_DIMENSIONS = 4  # The format's limit.

Kind = gguf.GGUFValueType
SCALARS = {
    Kind.UINT8: "u1", Kind.INT8: "i1", Kind.UINT16: "<u2", Kind.INT16: "<i2",
    Kind.UINT32: "<u4", Kind.INT32: "<i4", Kind.UINT64: "<u8",
    Kind.INT64: "<i8", Kind.FLOAT32: "<f4", Kind.FLOAT64: "<f8",
    Kind.BOOL: "u1"}
# The fewest bytes of a value: a string has a length, an array also a type.
SMALLEST = {kind: np.dtype(dtype).itemsize for kind, dtype in SCALARS.items()
            } | {Kind.STRING: 8, Kind.ARRAY: 12}
SMALLEST_FIELD, SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
# Types that are not stored in blocks; the `gguf` package takes all others as
# bytes.
PLAIN = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1", "I16": "<i2",
         "I32": "<i4", "I64": "<i8"}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Place of a tensor in a GGUF file.

  Attributes:
    path: the file's path.
    kind: the type in which its values are stored.
    shape: row-major, `[out, in]` of a projection. GGUF writes it reversed.
    offset: its first byte in the file.
  """

  path: pathlib.Path
  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  offset: int

  @property
  def stored(self) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape in the file: values, or the bytes of their blocks."""
    if self.kind.name in PLAIN:
      return np.dtype(PLAIN[self.kind.name]), self.shape
    # A block holds `block` numbers in `width` bytes, along the last axis.
    block, width = gguf.GGML_QUANT_SIZES[self.kind]
    return np.dtype(np.uint8), (
        *self.shape[:-1], self.shape[-1] // block * width)

  @property
  def size(self) -> int:
    """Size in bytes."""
    dtype, shape = self.stored
    return math.prod(shape) * dtype.itemsize

  def view(self) -> np.ndarray:
    """Maps the stored array, which is read from disk where it is touched."""
    dtype, shape = self.stored
    return np.memmap(self.path, dtype, "r", self.offset, shape)


def read_header(
    path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Reads the metadata, as Python values and lists, and the tensors, by name.

  Raises:
    ValueError: the file is cut short, damaged or in another format; the
      message names the field.
  """
  with path.open("rb") as file:
    size = file.seek(0, 2)
    if size < 24:
      raise _damaged(path, f"it has {size} bytes")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      return _Header(path, data).read()


class _Header:
  """A reader with a position in the header.

  `_what` names the part that is being read, for error messages.
  """

  def __init__(self, path: pathlib.Path, data: mmap.mmap):
    self._path, self._data = path, data
    # A limit, as counts are compared with the bytes that are left.
    self._at, self._end = 0, min(len(data), LONGEST_HEADER)
    self._what = "its start"

  def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if self._take(4) != b"GGUF":
      raise self._error("is not that of the format")
    version = self._number("<I")
    if version not in (2, 3):
      raise self._error(
          f"says version {version}, and 2 and 3 are known, little-endian")
    tensors = self._count("tensors", SMALLEST_TENSOR)
    fields = self._count("fields", SMALLEST_FIELD)
    metadata: dict[str, Any] = {}
    for number in range(fields):
      self._what = f"field {number + 1} of {fields}"
      key = self._string()
      self._what = f"field {key!r}"
      if key in metadata:
        raise self._error("comes twice")
      metadata[key] = self._value(self._type(Kind), 0)
    found: dict[str, Tensor] = {}
    for number in range(tensors):
      self._what = f"tensor {number + 1} of {tensors}"
      name = self._string()
      self._what = f"tensor {name!r}"
      if name in found:
        raise self._error("comes twice")
      found[name] = self._tensor()
    return metadata, self._place(found, metadata)

  def _tensor(self) -> Tensor:
    """Reads a tensor's entry; its offset is from where the data begin."""
    dimensions = self._number("<I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
      raise self._error(f"has {dimensions} dimensions, and the format has up "
                        f"to {MOST_DIMENSIONS}")
    shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
    kind = self._type(gguf.GGMLQuantizationType)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
      raise self._error(
          f"is of {kind.name} with rows of {shape[-1]} values, which are no "
          f"whole blocks of {block}")
    return Tensor(self._path, kind, shape, self._number("<Q"))

  def _place(
      self, tensors: dict[str, Tensor], metadata: dict[str, Any],
  ) -> dict[str, Tensor]:
    """Makes offsets start at the file's start, and checks them against its
    size.
    """
    self._what = "field 'general.alignment'"
    unit = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(unit) is not int or unit < 1 or unit & (unit - 1):
      raise self._error(f"is {unit!r}, and a power of two is needed")
    # The data begin at the next multiple of the alignment.
    start, found = -(-self._at // unit) * unit, {}
    for name, tensor in tensors.items():
      self._what = f"tensor {name!r}"
      end = start + tensor.offset + tensor.size
      if end > len(self._data):
        raise self._error(
            f"is said to end at byte {end:,}, and the file has "
            f"{len(self._data):,}")
      found[name] = dataclasses.replace(tensor, offset=start + tensor.offset)
    return found

  def _value(self, kind: Kind, depth: int) -> Any:
    if kind == Kind.STRING:
      return self._string()
    if kind in SCALARS:
      return self._scalars(kind, 1)[0]
    if depth == DEEPEST_ARRAY:
      raise self._error(
          f"has arrays in arrays, more than {DEEPEST_ARRAY} deep")
    inner = self._type(Kind)
    count = self._count("elements", SMALLEST[inner])
    if inner in SCALARS:
      return self._scalars(inner, count)
    return [self._value(inner, depth + 1) for _ in range(count)]

  def _scalars(self, kind: Kind, count: int) -> list[Any]:
    dtype = np.dtype(SCALARS[kind])
    values = np.frombuffer(self._take(count * dtype.itemsize), dtype)
    return (values != 0 if kind == Kind.BOOL else values).tolist()

  def _type(self, types: Callable[[int], Any]) -> Any:
    """Reads a member of an enum."""
    number = self._number("<I")
    try:
      return types(number)
    except ValueError as error:
      raise self._error(f"is of type {number}, which is not known") from error

  def _count(self, what: str, smallest: int) -> int:
    """Reads a number of things that take at least `smallest` bytes each."""
    count, left = self._number("<Q"), self._end - self._at
    if count * smallest > left:
      raise self._error(
          f"announces {count:,} {what}, and {left:,} bytes of the header can "
          "be left")
    return count

  def _string(self) -> str:
    data = self._take(self._count("bytes of text", 1))
    try:
      return data.decode()
    except UnicodeDecodeError as error:
      raise self._error(f"is not UTF-8 ({error})") from error

  def _number(self, form: str) -> int:
    return struct.unpack(form, self._take(struct.calcsize(form)))[0]

  def _take(self, size: int) -> bytes:
    data = self._data[self._at:min(self._at + size, self._end)]
    if len(data) < size:
      raise self._error("is cut off")
    self._at += size
    return data

  def _error(self, what: str) -> ValueError:
    return _damaged(self._path, f"{self._what} {what}")


def _damaged(path: pathlib.Path, what: str) -> ValueError:
  return ValueError(
      f"{path} cannot be read as a GGUF file: {what}. It may be cut short, "
      "damaged, or in another format; get it again.")
