"""Architectures. Oracle: the released tensors, before a converter changed them.

Random tensors under Hugging Face's names go through llama.cpp's rules into a
file; out of it come the same numbers in the model's shapes.
"""

import jax
import numpy as np
import pytest

from posttrain import sharding
from posttrain.interop import gguf, parameters
from posttrain.model import transformer
from posttrain.model.config import ModelConfig
from tests.interop import convert_gguf, releases
from tests.interop.releases import BASE, CASES, LLAMA3, released

GGUF_CASES = [
    name for name in CASES if name not in ("mistral", "qwen3_moe")]


@pytest.mark.parametrize("name", GGUF_CASES)
def test_the_released_numbers_come_back(tmp_path, name, one_device):
  architecture, json_config, config, tensors = released(name)
  path = tmp_path / "a.gguf"
  convert_gguf.convert(path, architecture, json_config, tensors)
  file = gguf.read(path)
  assert gguf.model_config(file) == config
  with jax.set_mesh(one_device):
    model = sharding.fetch(transformer.to_dict(gguf.load(file, config)))
  parts = releases.host_tensors(model, config)
  assert parts.keys() == tensors.keys()
  for key, want in tensors.items():
    np.testing.assert_allclose(parts[key], want, atol=3e-7, err_msg=key)


def test_the_divisors_are_llama_3s():
  """Two readings of the same rule; a llama.cpp file of Llama 3.1 has 8."""
  for head_dim, factor in ((64, 32.0), (128, 8.0)):
    want = convert_gguf.llama3_divisors(head_dim, LLAMA3 | dict(factor=factor))
    scaling = gguf.llama3_scaling(want, 5e5, "a file")
    assert (scaling.factor, scaling.original_context) == (factor, 8192)
    with pytest.raises(ValueError, match="is not Llama 3's scaling"):
      gguf.llama3_scaling(want[::-1], 5e5, "a file")


def test_queries_of_the_27b_models_are_scaled_by_their_width():
  metadata = {"general.architecture": "gemma3"} | {
      f"gemma3.{key}": value for key, value in {
          "embedding_length": 5376, "feed_forward_length": 21_504,
          "block_count": 62, "attention.head_count": 32,
          "attention.head_count_kv": 16, "attention.key_length": 128,
          "attention.layer_norm_rms_epsilon": 1e-6,
          "attention.sliding_window": 1024, "rope.freq_base": 1e6}.items()}
  fields = gguf.model_fields(metadata, "a file")
  assert fields["query_scale"] == pytest.approx(168**-0.5)
  metadata["gemma3.block_count"] = 48
  assert "query_scale" not in gguf.model_fields(metadata, "a file")


@pytest.mark.parametrize(("name", "key", "value", "found"), [
    ("llama", "llama.attention.sliding_window", 8, "sliding_window"),
    ("olmo2", "olmo2.attention.sliding_window", 8, "sliding_window"),
    ("qwen3", "qwen3.attention.head_count_kv", [2, 4], "head_count_kv"),
    ("qwen3", "qwen3.rope.scaling.type", "yarn", "'yarn'"),
    ("qwen2", "qwen2.rope.dimension_count", 8, "dimension_count=8"),
    ("gemma3", "gemma3.final_logit_softcapping", 30.0, "softcapping"),
])
def test_what_the_model_does_not_do_is_named(
    tmp_path, name, key, value, found):
  architecture, json_config, _, tensors = released(name)
  path = tmp_path / "a.gguf"
  convert_gguf.convert(path, architecture, json_config, tensors)
  metadata = gguf.read(path).metadata | {key: value}
  with pytest.raises(ValueError, match=found):
    gguf.model_fields(metadata, path)


def test_two_ways_to_say_the_same_model_are_equal(tmp_path):
  architecture, json_config, _, tensors = released("gemma2")
  path = tmp_path / "a.gguf"
  convert_gguf.convert(path, architecture, json_config, tensors)
  file = gguf.read(path)
  same = dict(layer_pattern=("local", "global") * 3, query_scale=16**-0.5,
              dtype="bfloat16", remat="full")
  found = gguf.model_config(file)
  parameters.check_config(
      found, ModelConfig(**(BASE | CASES["gemma2"][2] | same)), path)
  other = dict(layer_pattern=("global", "local"), final_softcap=0.0)
  with pytest.raises(ValueError, match=r"final_softcap is 30\.0.*and 0\.0"):
    parameters.check_config(
        found, ModelConfig(**(BASE | CASES["gemma2"][2] | other)), path)
