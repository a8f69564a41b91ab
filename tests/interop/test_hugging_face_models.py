"""config.json as releases have it. Oracle: the presets.

The files of releases are given as they are published, without the keys that
have nothing to do with the model's shape.
"""

import dataclasses

import pytest

from posttrain.interop import hugging_face_models, parameters
from posttrain.model.config import ModelConfig, RopeScaling
from posttrain.model.presets import PRESETS

LLAMA_3_2_1B = dict(
    model_type="llama", attention_bias=False, attention_dropout=0.0,
    head_dim=64, hidden_act="silu", hidden_size=2048, intermediate_size=8192,
    max_position_embeddings=131_072, mlp_bias=False, num_attention_heads=32,
    num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1,
    rms_norm_eps=1e-5, rope_scaling=dict(
        factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
        original_max_position_embeddings=8192, rope_type="llama3"),
    rope_theta=500_000.0, tie_word_embeddings=True, torch_dtype="bfloat16",
    transformers_version="4.45.0.dev0", use_cache=True, vocab_size=128_256,
    bos_token_id=128_000, eos_token_id=[128_001, 128_008, 128_009])
SMOLLM2_135M = dict(
    model_type="llama", hidden_act="silu", hidden_size=576,
    intermediate_size=1536, max_position_embeddings=8192,
    num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3,
    rms_norm_eps=1e-5, rope_interleaved=False, rope_scaling=None,
    is_llama_config=True, rope_theta=100_000, tie_word_embeddings=True,
    vocab_size=49_152)
MISTRAL_V01 = dict(
    model_type="mistral", hidden_act="silu", hidden_size=4096,
    intermediate_size=14_336, max_position_embeddings=32_768,
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
    rms_norm_eps=1e-5, rope_theta=10_000.0, sliding_window=4096,
    tie_word_embeddings=False, vocab_size=32_000)
MISTRAL_V03 = MISTRAL_V01 | dict(
    rope_theta=1_000_000.0, sliding_window=None, vocab_size=32_768)
QWEN_2_5_7B = dict(
    model_type="qwen2", attention_dropout=0.0, hidden_act="silu",
    hidden_size=3584, intermediate_size=18_944,
    max_position_embeddings=32_768, max_window_layers=28,
    num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4,
    rms_norm_eps=1e-6, rope_theta=1_000_000.0, sliding_window=131_072,
    tie_word_embeddings=False, use_sliding_window=False, vocab_size=152_064)
QWEN_3_4B = dict(
    model_type="qwen3", attention_bias=False, attention_dropout=0.0,
    head_dim=128, hidden_act="silu", hidden_size=2560,
    intermediate_size=9728, max_position_embeddings=40_960,
    max_window_layers=36, num_attention_heads=32, num_hidden_layers=36,
    num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None,
    rope_theta=1_000_000, sliding_window=None, tie_word_embeddings=True,
    use_sliding_window=False, vocab_size=151_936)
QWEN_3_30B_A3B = dict(
    model_type="qwen3_moe", attention_bias=False, attention_dropout=0.0,
    decoder_sparse_step=1, head_dim=128, hidden_act="silu", hidden_size=2048,
    intermediate_size=6144, max_position_embeddings=40_960,
    max_window_layers=48, mlp_only_layers=[], moe_intermediate_size=768,
    norm_topk_prob=True, num_attention_heads=32, num_experts=128,
    num_experts_per_tok=8, num_hidden_layers=48, num_key_value_heads=4,
    output_router_logits=False, rms_norm_eps=1e-6, rope_scaling=None,
    rope_theta=1_000_000.0, router_aux_loss_coef=0.001, sliding_window=None,
    tie_word_embeddings=False, use_sliding_window=False, vocab_size=151_936)
GEMMA_2_27B = dict(
    model_type="gemma2", attention_bias=False, attention_dropout=0.0,
    attn_logit_softcapping=50.0, cache_implementation="hybrid",
    final_logit_softcapping=30.0, head_dim=128,
    hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
    hidden_size=4608, intermediate_size=36_864,
    max_position_embeddings=8192, num_attention_heads=32,
    num_hidden_layers=46, num_key_value_heads=16, query_pre_attn_scalar=144,
    rms_norm_eps=1e-6, rope_theta=10_000.0, sliding_window=4096,
    sliding_window_size=4096, vocab_size=256_000, _attn_implementation="eager")
GEMMA_3_1B = dict(
    model_type="gemma3_text", attention_bias=False, attention_dropout=0.0,
    attn_logit_softcapping=None, cache_implementation="hybrid",
    final_logit_softcapping=None, head_dim=256,
    hidden_activation="gelu_pytorch_tanh", hidden_size=1152,
    intermediate_size=6912, max_position_embeddings=32_768,
    num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1,
    query_pre_attn_scalar=256, rms_norm_eps=1e-6,
    rope_local_base_freq=10_000, rope_scaling=None, rope_theta=1_000_000,
    sliding_window=512, sliding_window_pattern=6, vocab_size=262_144)
GEMMA_3_4B_TEXT = dict(  # The rest is left to the defaults of transformers.
    model_type="gemma3_text", hidden_size=2560, intermediate_size=10_240,
    num_hidden_layers=34, rope_scaling=dict(factor=8.0, rope_type="linear"),
    sliding_window=1024)
OLMO_2_7B = dict(
    model_type="olmo2", attention_bias=False, attention_dropout=0.0,
    hidden_act="silu", hidden_size=4096, intermediate_size=11_008,
    max_position_embeddings=4096, num_attention_heads=32,
    num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-6,
    rope_scaling=None, rope_theta=500_000, tie_word_embeddings=False,
    vocab_size=100_352)
SMOLLM3_3B = dict(
    model_type="smollm3", attention_bias=False, attention_dropout=0.0,
    hidden_act="silu", hidden_size=2048, intermediate_size=11_008,
    layer_types=["full_attention"] * 36, max_position_embeddings=65_536,
    max_window_layers=28, mlp_bias=False, no_rope_layer_interval=4,
    no_rope_layers=[1, 1, 1, 0] * 9, num_attention_heads=16,
    num_hidden_layers=36, num_key_value_heads=4, pretraining_tp=2,
    rms_norm_eps=1e-6, rope_scaling=None, rope_theta=5_000_000.0,
    sliding_window=None, use_sliding_window=False, vocab_size=128_256)

PUBLISHED = {
    "llama3.2-1b": LLAMA_3_2_1B, "smollm2-135m": SMOLLM2_135M,
    "mistral-7b-v0.1": MISTRAL_V01, "mistral-7b-v0.3": MISTRAL_V03,
    "qwen2.5-7b": QWEN_2_5_7B, "qwen3-4b": QWEN_3_4B,
    "gemma2-27b": GEMMA_2_27B, "gemma3-1b": GEMMA_3_1B,
    "gemma3-4b": GEMMA_3_4B_TEXT, "olmo2-7b": OLMO_2_7B,
    "smollm3-3b": SMOLLM3_3B, "qwen3-30b-a3b": QWEN_3_30B_A3B}


def read(data: dict) -> ModelConfig:
  return hugging_face_models.model_config(data, "config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_the_preset(name):
  found = read(PUBLISHED[name])
  parameters.check_config(found, PRESETS[name], name)
  assert found.max_positions == PRESETS[name].max_positions


@pytest.mark.parametrize("name", [
    name for name, preset in PRESETS.items() if preset.vocab_size])
def test_what_is_written_of_a_preset_is_read_again(name):
  written = hugging_face_models.to_json(PRESETS[name])
  assert written["max_position_embeddings"] == PRESETS[name].max_positions
  parameters.check_config(read(written), PRESETS[name], name)


@pytest.mark.parametrize("name, family", [
    ("llama3.2-1b", "llama"), ("mistral-7b-v0.1", "mistral"),
    ("qwen2.5-7b", "qwen2"), ("qwen3-4b", "qwen3"),
    ("qwen3-30b-a3b", "qwen3_moe"), ("gemma2-2b", "gemma2"),
    ("gemma3-4b", "gemma3_text"), ("olmo2-7b", "olmo2"),
    ("smollm3-3b", "smollm3"),
    # The same computation; transformers' Llama has no window to name.
    ("mistral-7b-v0.3", "llama")])
def test_the_family_that_is_written(name, family):
  assert hugging_face_models.to_json(PRESETS[name])["model_type"] == family


def in_version_5(data: dict) -> dict:
  """The same file as transformers 5 writes it."""
  data = dict(data)
  scaling = data.pop("rope_scaling", None) or dict(rope_type="default")
  theta = data.pop("rope_theta", 1e6)
  rope = scaling | dict(rope_theta=theta)
  if data["model_type"] == "gemma3_text":
    local = data.pop("rope_local_base_freq", 1e4)
    rope = dict(
        full_attention=rope,
        sliding_attention=dict(rope_type="default", rope_theta=local))
  return data | dict(rope_parameters=rope)


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_versions_of_transformers_say_the_same(name):
  data = PUBLISHED[name]
  assert read(in_version_5(data)) == read(data)


def test_older_spellings():
  scaling = dict(type="linear", factor=4.0)  # `type` became `rope_type`.
  assert read(LLAMA_3_2_1B | dict(rope_scaling=scaling)).rope_scaling == (
      RopeScaling("linear", factor=4.0))
  windows = QWEN_2_5_7B | dict(
      use_sliding_window=True, max_window_layers=20, sliding_window=64)
  config = read(windows)
  assert config.layer_kinds == ("global",) * 20 + ("local",) * 8
  assert config.sliding_window == 64
  assert read(hugging_face_models.to_json(config)) == config
  types = ["sliding_attention", "full_attention"] * 14
  config = read(windows | dict(layer_types=types))
  assert config.layer_pattern == ("local", "global")


@pytest.mark.parametrize("base, change, message", [
    (LLAMA_3_2_1B, dict(model_type="gpt2"), "'gpt2'; this reader knows llama"),
    (LLAMA_3_2_1B, dict(attention_bias=True), "'attention_bias': True"),
    (LLAMA_3_2_1B, dict(attention_dropout=0.1), "'attention_dropout': 0.1"),
    (LLAMA_3_2_1B, dict(layer_types=["a"]), "layer_types"),
    (LLAMA_3_2_1B, dict(quantization_config=dict(bits=4)), "quantization"),
    (LLAMA_3_2_1B, dict(auto_map={"AutoModel": "a.B"}), "auto_map"),
    (LLAMA_3_2_1B, dict(rope_parameters=dict(rope_type="default")),
     "both set"),
    (LLAMA_3_2_1B, dict(hidden_act="relu"), "hidden_act='relu'"),
    (LLAMA_3_2_1B, dict(hidden_size=None), "lacks hidden_size"),
    (LLAMA_3_2_1B, dict(rope_scaling=dict(
        rope_type="yarn", factor=4.0)), "'yarn'"),
    (LLAMA_3_2_1B, dict(rope_scaling=dict(
        rope_type="linear", factor=4.0, beta_fast=32)), "beta_fast"),
    (LLAMA_3_2_1B, dict(rope_scaling=dict(rope_type="llama3", factor=4.0)),
     "'llama3' with"),
    (LLAMA_3_2_1B, dict(rope_scaling=None, rope_parameters=dict(
        rope_type="default", partial_rotary_factor=0.5)), "partial_rotary"),
    (MISTRAL_V01, dict(rope_scaling=None, rope_parameters=dict(
        full_attention=dict(rope_type="default"),
        sliding_attention=dict(rope_type="default"))), "sliding_attention"),
    (GEMMA_3_1B, dict(use_bidirectional_attention=True), "bidirectional"),
    (GEMMA_3_1B, dict(rope_scaling=None, rope_parameters=dict(
        full_attention=dict(rope_type="default"), sliding_attention=dict(
            rope_type="linear", factor=2.0))), "has a scaling"),
    (GEMMA_3_1B, dict(layer_types=["full_attention"] * 25), "25 kinds"),
    (GEMMA_3_1B, dict(layer_types=["chunked_attention"] * 26), "chunked"),
    (QWEN_3_4B, dict(num_experts=8), "'num_experts': 8"),
    (QWEN_3_30B_A3B, dict(decoder_sparse_step=2), "decoder_sparse_step"),
    (QWEN_3_30B_A3B, dict(mlp_only_layers=[0]), "mlp_only_layers"),
    (QWEN_3_30B_A3B, dict(num_experts=None), "lacks num_experts"),
    (SMOLLM3_3B, dict(layer_types=["sliding_attention"] * 36),
     "sliding window"),
    (SMOLLM3_3B, dict(use_sliding_window=True), "use_sliding_window"),
])
def test_what_the_model_does_not_do_is_an_error(base, change, message):
  with pytest.raises(ValueError, match=message):
    read(base | change)


def test_the_error_of_a_model_without_a_family():
  preset = dataclasses.replace(PRESETS["llama3.2-1b"], final_softcap=30.0)
  with pytest.raises(ValueError, match=r"nearest, llama, does not have final"):
    hugging_face_models.to_json(preset)
