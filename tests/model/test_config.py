"""Oracles: published parameter counts, and the shapes of the module itself."""

import dataclasses

import jax
import pytest

from posttrain.model import transformer
from posttrain.model.config import ModelConfig
from posttrain.model.presets import PRESETS
from tests import meshes
from tests.model import build

# Of each release's safetensors, tied tables once; Gemma 3 without its vision.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
}


def test_presets_have_the_published_sizes():
  named = {name: c.num_parameters for name, c in PRESETS.items()
           if name != "tiny"}
  assert named == PUBLISHED


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-7b", "qwen3-32b"])
def test_the_module_has_the_parameters_that_its_config_counts(name):
  config = PRESETS[name]
  with jax.set_mesh(meshes.one()):
    model = transformer.abstract(config)
  tables = 1 if config.tied_embeddings else 2
  padding = config.padded_vocab_size - config.vocab_size
  assert config.num_parameters == (
      sum(w.size for w in jax.tree.leaves(model))
      - padding * config.embed * tables)


@pytest.mark.parametrize("option", build.OPTIONS)
def test_every_option_is_counted(option):
  config = build.make_config(**build.OPTIONS[option])
  with jax.set_mesh(meshes.one()):
    model = transformer.abstract(config)
  tables = 1 if config.tied_embeddings else 2
  assert config.num_parameters == (
      sum(w.size for w in jax.tree.leaves(model))
      - (128 - 87) * config.embed * tables)


def test_active_parameters_are_those_of_the_chosen_experts():
  """The figures in the names of the releases, in billions."""
  active = {name: round(PRESETS[name].num_active_parameters / 1e9)
            for name in ("qwen3-30b-a3b", "qwen3-235b-a22b")}
  assert active == {"qwen3-30b-a3b": 3, "qwen3-235b-a22b": 22}
  dense = PRESETS["qwen3-8b"]
  assert dense.num_active_parameters == dense.num_parameters


@pytest.mark.parametrize("vocab_size,padded", [
    (1, 128), (87, 128), (128, 128), (129, 256), (49_152, 49_152)])
def test_the_vocabulary_is_padded_to_128(vocab_size, padded):
  config = dataclasses.replace(PRESETS["tiny"], vocab_size=vocab_size)
  assert config.padded_vocab_size == padded


@pytest.mark.parametrize("fields,message", [
    (dict(heads=5), "model.heads=5 is not a multiple of model.kv_heads=2"),
    (dict(head_dim=7), "model.head_dim=7 is odd"),
    (dict(remat="some"), "compute.remat='some' is unknown; choose from"),
    (dict(dtype="float16"), "compute.dtype='float16' is unknown"),
    (dict(num_experts=4), "experts_per_token=0 is not within 1 and model.num"),
    (dict(num_experts=2, experts_per_token=3), "experts_per_token=3 is not"),
    (dict(experts_per_token=3), "experts_per_token=3 is not within"),
    (dict(normalize_router=True), "normalize_router has no effect"),
    (dict(moe="dense"), "compute.moe='dense' has no effect: model.num_expert"),
    (dict(moe="megablocks"), "compute.moe='megablocks' is unknown"),
    (dict(unroll=3), "compute.unroll=3 is not within 1 and the 2 layers"),
])
def test_impossible_shapes_are_errors_that_name_the_key(fields, message):
  with pytest.raises(ValueError, match=message):
    ModelConfig(**(build.BASE | fields))
