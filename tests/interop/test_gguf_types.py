"""Every stored type. Oracles: scalar loops over the format, and rounding.

The package quantises to all but the K-quants; blocks of those are made of
random bytes here. No whole model in a K-quant has been run.
"""

import gguf as gguf_package
import numpy as np
import pytest

from posttrain.interop import gguf
from tests.interop import gguf_blocks

TYPES = gguf_package.GGMLQuantizationType
SHAPE = 3, 512


def write(path, data: np.ndarray, kind=None):
  writer = gguf_package.GGUFWriter(path, "llama")
  writer.add_tensor("w", data, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return gguf.read(path)


def random_blocks(name: str) -> np.ndarray:
  """[3, bytes]: any bytes are a block, if its scales are finite."""
  _, size, width, halves = gguf_blocks.FORMATS[name]
  rng = np.random.default_rng(0)
  blocks = rng.integers(0, 256, (SHAPE[0] * SHAPE[1] // size, width), np.uint8)
  for at in halves:
    scales = rng.normal(size=len(blocks)).astype(np.float16)
    blocks[:, at:at + 2] = scales.view(np.uint8).reshape(-1, 2)
  return blocks.reshape(SHAPE[0], -1)


@pytest.mark.parametrize("name", gguf_blocks.FORMATS)
def test_blocks_are_what_a_scalar_loop_reads(tmp_path, name):
  loop, _, width, _ = gguf_blocks.FORMATS[name]
  data = random_blocks(name)
  file = write(tmp_path / "a.gguf", data, TYPES[name])
  assert file.tensors["w"].shape == SHAPE
  got = file.tensor("w")
  want = [loop(block.tobytes()) for block in data.reshape(-1, width)]
  assert got.dtype == np.float32
  np.testing.assert_allclose(
      got, np.array(want, np.float32).reshape(SHAPE), rtol=1e-6, atol=1e-6)


# The largest error of a weight: a share of its block's largest one.
ROUNDING = {"Q8_0": 1 / 254, "Q5_0": 1 / 16, "Q5_1": 1 / 31, "Q4_0": 1 / 8,
            "Q4_1": 1 / 15, "BF16": 1 / 256, "F16": 1 / 2048, "F32": 0.0}


@pytest.mark.parametrize("name", ROUNDING)
def test_what_is_written_is_read(tmp_path, name):
  values = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
  data = gguf_package.quantize(values, TYPES[name])
  file = write(tmp_path / "a.gguf", data, TYPES[name])
  assert file.tensors["w"].shape == SHAPE
  got = file.tensor("w")
  assert got.dtype == np.float32 and got.shape == SHAPE
  largest = np.abs(values.reshape(-1, 32)).max(-1, keepdims=True)
  error = np.abs(got - values).reshape(-1, 32)
  # A scale is itself rounded, to eleven bits.
  assert (error <= largest * (ROUNDING[name] * 1.01 + 1e-3 * (
      name.startswith("Q")))).all()
  assert np.unique(got).size > 8


def test_a_type_that_is_not_known_is_named(tmp_path):
  data = np.zeros((1, 40), np.uint8)
  file = write(tmp_path / "a.gguf", data, TYPES.Q8_1)
  with pytest.raises(ValueError, match=r"w is Q8_1.*Q8_0 or F16"):
    file.tensor("w")
