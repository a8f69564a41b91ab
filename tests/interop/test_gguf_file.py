"""Headers of GGUF files. Oracles: the `gguf` package's reader, of files that
are right, and a process with little memory, of files that are not."""

import json
import struct
import subprocess
import sys

import gguf as gguf_package
import numpy as np
import pytest

from posttrain.interop import gguf, gguf_file
from tests.interop import tiny_gguf

KIND = gguf_package.GGUFValueType
TOKENS = [f"token {i} é" for i in range(500)]


def text(value: str) -> bytes:
  return struct.pack("<Q", len(value.encode())) + value.encode()


def array(kind: int, count: int, values: bytes = b"") -> bytes:
  return struct.pack("<IQ", kind, count) + values


def header(*fields: tuple[str, int, bytes], tensors=(), counts=None) -> bytes:
  """A file by hand: fields are (key, type, value)."""
  num_tensors, num_fields = counts or (len(tensors), len(fields))
  return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_fields) + b"".join(
      text(key) + struct.pack("<I", kind) + value
      for key, kind, value in fields) + b"".join(tensors)


def tensor(name: str, dims, kind: int, offset: int) -> bytes:
  return text(name) + struct.pack(
      f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def test_a_header_is_what_the_package_reads(tmp_path):
  path = tmp_path / "a.gguf"
  writer = gguf_package.GGUFWriter(path, "llama")
  writer.add_array("tokens", TOKENS)
  writer.add_array("scores", [0.5, -1.5])
  writer.add_array("flags", [True, False])
  writer.add_array("numbers", [-2**31, 7])
  writer.add_custom_alignment(64)
  for name, value in {
      "uint8": 255, "int8": -1, "uint16": 65535, "int16": -2,
      "uint32": 2**32 - 1, "int32": -3, "uint64": 2**63}.items():
    getattr(writer, f"add_{name}")(name, value)
  writer.add_float64("f64", 1e300)
  writer.add_bool("yes", True)
  values = np.arange(96, dtype=np.float32).reshape(3, 32)
  q8 = gguf_package.GGMLQuantizationType.Q8_0
  writer.add_tensor("plain", values)
  writer.add_tensor("half", values.astype(np.float16))
  writer.add_tensor("blocks", gguf_package.quantize(values, q8), raw_dtype=q8)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  metadata, tensors = gguf_file.read_header(path)
  reader = gguf_package.GGUFReader(path)
  theirs = {name: field.contents() for name, field in reader.fields.items()
            if not name.startswith("GGUF.")}
  assert metadata == theirs and metadata["tokens"] == TOKENS
  assert {key: type(value) for key, value in metadata.items()} == {
      key: type(value) for key, value in theirs.items()}
  assert list(tensors) == [each.name for each in reader.tensors]
  for each in reader.tensors:
    ours = tensors[each.name]
    assert ours.kind == each.tensor_type
    assert ours.shape == tuple(reversed(each.shape.tolist()))
    assert ours.view().dtype == each.data.dtype
    np.testing.assert_array_equal(ours.view(), each.data)


def nested(depth: int) -> bytes:
  return b"".join(array(KIND.ARRAY, 1) for _ in range(depth)) + array(
      KIND.UINT8, 1, b"\x07")


FILL = bytes(13_000)
HOSTILE = {
    "scalars": (header(("a.b", KIND.ARRAY, array(KIND.UINT8, 2**40) + FILL)),
                "field 'a.b' announces 1,099,511,627,776 elements"),
    "strings": (header(("a.b", KIND.ARRAY, array(KIND.STRING, 2**40) + FILL)),
                "field 'a.b' announces 1,099,511,627,776 elements"),
    "one string": (header(("a.b", KIND.STRING, struct.pack("<Q", 2**40))),
                   "field 'a.b' announces 1,099,511,627,776 bytes"),
    "arrays": (header(("a.b", KIND.ARRAY, array(KIND.ARRAY, 2**40) + FILL)),
               "field 'a.b' announces 1,099,511,627,776 elements"),
    "deep": (header(("a.b", KIND.ARRAY, nested(1000) + FILL)),
             "field 'a.b' has arrays in arrays, more than 4 deep"),
    "fields": (header(counts=(0, 2**60)) + FILL,
               "its start announces 1,152,921,504,606,846,976 fields"),
    "tensors": (header(counts=(2**60, 0)) + FILL,
                "announces 1,152,921,504,606,846,976 tensors"),
    "dimensions": (header(tensors=[tensor("w", [2] * 9, 0, 0)]) + FILL,
                   "tensor 'w' has 9 dimensions"),
    "a large tensor": (
        header(tensors=[tensor("w", [2**40, 2**40], 0, 0)]) + FILL,
        "tensor 'w' is said to end at byte 4,835,703,278,458,516"),
    "a far tensor": (header(tensors=[tensor("w", [4], 0, 2**62)]) + FILL,
                     "tensor 'w' is said to end at byte 4,611,686,018,427,"),
    "broken blocks": (header(tensors=[tensor("w", [33], 8, 0)]) + FILL,
                      "tensor 'w' is of Q8_0 with rows of 33 values"),
    "types": (header(("a.b", 77, FILL)), "field 'a.b' is of type 77"),
    "tensor types": (header(tensors=[tensor("w", [4], 999, 0)]) + FILL,
                     "tensor 'w' is of type 999"),
    "not UTF-8": (header(("a.b", KIND.STRING, struct.pack("<Q", 1) + b"\xff")),
                  "field 'a.b' is not UTF-8"),
    "twice": (header(*[("a.b", KIND.UINT8, b"\1")] * 2), "'a.b' comes twice"),
    "alignment": (header(("general.alignment", KIND.UINT32, bytes(4))),
                  "field 'general.alignment' is 0"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "cut": (header(("a.b", KIND.UINT64, b"\1\2")), "field 'a.b' is cut off"),
}

READ = """
import json, pathlib, resource, sys
from posttrain.interop import gguf_file
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
limit = used * resource.getpagesize() + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
  try:
    gguf_file.read_header(pathlib.Path(path))
    print(json.dumps("read"))
  except ValueError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_headers_take_no_memory(tmp_path):
  """64 MiB more than the imports, and ten seconds, for all of them."""
  paths = []
  for number, (contents, _) in enumerate(HOSTILE.values()):
    paths.append(tmp_path / f"{number}.gguf")
    paths[-1].write_bytes(contents)
  found = subprocess.run(
      [sys.executable, "-c", READ, *map(str, paths)], timeout=60,
      capture_output=True, text=True, check=False)
  assert found.returncode == 0, found.stderr
  lines = [json.loads(line) for line in found.stdout.splitlines()]
  for path, line, (_, message) in zip(
      paths, lines, HOSTILE.values(), strict=True):
    assert line.startswith(f"{path} cannot be read as a GGUF file: ")
    assert message in line


def test_arrays_in_arrays_are_lists_in_lists(tmp_path):
  path = tmp_path / "a.gguf"
  path.write_bytes(header(("a", KIND.ARRAY, nested(3))))
  assert gguf.read(path).metadata == {"a": [[[[7]]]]}


def test_no_damage_of_a_byte_is_anything_but_an_error_or_a_file(tmp_path):
  """Any byte of a small header, changed: read, or refused; never otherwise."""
  shape = tiny_gguf.Shape(vocab=8, embed=32, mlp=32, layers=1)
  tiny_gguf.write(
      tmp_path / "a.gguf", shape, tiny_gguf.random_tensors(shape))
  whole = (tmp_path / "a.gguf").read_bytes()
  rng = np.random.default_rng(0)
  damaged = tmp_path / "b.gguf"
  refused = 0
  for at in rng.integers(0, 1200, 300):
    changed = bytearray(whole)
    changed[at] = rng.integers(256)
    damaged.write_bytes(changed)
    try:
      _, tensors = gguf_file.read_header(damaged)
    except ValueError as error:
      assert str(error).startswith(f"{damaged} cannot be read")
      refused += 1
    else:
      for each in tensors.values():
        assert each.offset + each.size <= len(whole)
  assert refused > 50
