"""Architectures. Oracle: the released tensors, before a converter changed them.

Random tensors under Hugging Face's names go through llama.cpp's rules into a
file; out of it come the same numbers in the model's shapes.
"""

import jax
import numpy as np
import pytest

from posttrain import sharding
from posttrain.interop import gguf, gguf_models, parameters
from posttrain.model import transformer
from posttrain.model.config import ModelConfig, RopeScaling
from tests.interop import convert_gguf

SHAPE = dict(
    vocab_size=130, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=True,
    rope_parameters=dict(rope_type="default", rope_theta=5e5))
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=8192)
GEMMA = dict(sliding_window=8, rms_norm_eps=1e-6)
GEMMA3_ROPE = dict(
    full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    sliding_attention=dict(rope_type="default", rope_theta=1e4))

BASE = dict(
    vocab_size=130, embed=32, mlp=48, layers=6, heads=4, kv_heads=2,
    head_dim=16, rope_theta=5e5, norm_eps=1e-6)
GEMMA_FIELDS = dict(
    norm_placement="both", norm_offset=1.0, embedding_scale=True,
    activation="gelu", sliding_window=8)

# By name: architecture, what differs in config.json, and in ModelConfig.
CASES = {
    "llama": ("llama", dict(tie_word_embeddings=False),
              dict(tied_embeddings=False)),
    "llama3": ("llama", dict(rope_parameters=LLAMA3), dict(
        rope_scaling=RopeScaling(
            kind="llama3", factor=32.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_context=8192))),
    "qwen2": ("qwen2", dict(head_dim=None, num_attention_heads=2),
              dict(qkv_bias=True, heads=2)),
    "qwen3": ("qwen3", {}, dict(qk_norm="head")),
    "gemma2": (
        "gemma2",
        GEMMA | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                     rope_parameters=dict(rope_theta=1e4)),
        GEMMA_FIELDS | dict(
            layer_pattern=("local", "global"), attention_softcap=50.0,
            final_softcap=30.0, rope_theta=1e4)),
    "gemma3": (
        "gemma3", GEMMA | dict(rope_parameters=GEMMA3_ROPE),
        GEMMA_FIELDS | dict(
            layer_pattern=("local",) * 5 + ("global",), qk_norm="head",
            rope_theta=1e6, rope_local_theta=1e4,
            rope_scaling=RopeScaling(kind="linear", factor=8.0))),
    "olmo2": ("olmo2", dict(head_dim=None, num_attention_heads=2),
              dict(norm_placement="post", qk_norm="full", heads=2)),
    "smollm3": ("smollm3", {}, dict(
        layer_pattern=("global", "global", "global", "nope"))),
}


def released(name: str) -> tuple[str, dict, ModelConfig, dict]:
  """Architecture, config.json, the model's config, tensors by their names."""
  architecture, changes, fields = CASES[name]
  config = ModelConfig(**(BASE | fields))
  c, rng = config, np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  tensors = {"model.embed_tokens.weight": draw(c.vocab_size, c.embed),
             "model.norm.weight": draw(c.embed)}
  if not c.tied_embeddings:
    tensors["lm_head.weight"] = draw(c.vocab_size, c.embed)
  q_rows, kv_rows = c.heads * c.head_dim, c.kv_heads * c.head_dim
  for layer in range(c.layers):
    shapes = {
        "self_attn.q_proj.weight": (q_rows, c.embed),
        "self_attn.k_proj.weight": (kv_rows, c.embed),
        "self_attn.v_proj.weight": (kv_rows, c.embed),
        "self_attn.o_proj.weight": (c.embed, q_rows),
        "mlp.gate_proj.weight": (c.mlp, c.embed),
        "mlp.up_proj.weight": (c.mlp, c.embed),
        "mlp.down_proj.weight": (c.embed, c.mlp),
        "post_attention_layernorm.weight": (c.embed,)}
    if c.qkv_bias:
      shapes |= {"self_attn.q_proj.bias": (q_rows,),
                 "self_attn.k_proj.bias": (kv_rows,),
                 "self_attn.v_proj.bias": (kv_rows,)}
    if c.qk_norm:
      full = c.qk_norm == "full"
      shapes |= {
          "self_attn.q_norm.weight": (q_rows if full else c.head_dim,),
          "self_attn.k_norm.weight": (kv_rows if full else c.head_dim,)}
    if c.norm_placement != "post":
      shapes["input_layernorm.weight"] = (c.embed,)
    if c.norm_placement != "pre":
      shapes["post_feedforward_layernorm.weight"] = (c.embed,)
    if c.norm_placement == "both":
      shapes["pre_feedforward_layernorm.weight"] = (c.embed,)
    tensors |= {f"model.layers.{layer}.{key}": draw(*shape)
                for key, shape in shapes.items()}
  return architecture, SHAPE | changes, config, tensors


# A parameter's released name, where the norms' names depend on the placement.
NAMES = {
    "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight", "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias", "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight", "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight",
    "attn_norm": "input_layernorm.weight",
    "attn_post_norm": "post_attention_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight"}


def released_name(leaf: str, config: ModelConfig) -> str:
  if leaf == "mlp_norm":
    return ("pre_feedforward_layernorm.weight"
            if config.norm_placement == "both"
            else "post_attention_layernorm.weight")
  return NAMES[leaf]


@pytest.mark.parametrize("name", CASES)
def test_the_released_numbers_come_back(tmp_path, name, one_device):
  architecture, json_config, config, tensors = released(name)
  path = tmp_path / "a.gguf"
  convert_gguf.convert(path, architecture, json_config, tensors)
  file = gguf.read(path)
  assert gguf.model_config(file) == config
  with jax.set_mesh(one_device):
    model = sharding.fetch(transformer.to_dict(gguf.load(file, config)))
  blocks = model.pop("blocks")
  top = {"embedding": "model.embed_tokens", "head": "lm_head",
         "final_norm": "model.norm"}
  parts = {f"{top[leaf]}.weight": value for leaf, value in model.items()} | {
      f"model.layers.{layer}.{released_name(leaf, config)}": part
      for leaf, value in blocks.items() for layer, part in enumerate(value)}
  assert parts.keys() == tensors.keys()
  for key, want in tensors.items():
    got = parts[key]
    if key in ("model.embed_tokens.weight", "lm_head.weight"):
      got = got if key != "lm_head.weight" else got.T
      assert not got[config.vocab_size:].any()
      got = got[:config.vocab_size]
    elif want.ndim == 2:  # [out, in]; heads are split behind D, or before.
      want = want.T
    np.testing.assert_allclose(
        got.reshape(want.shape), want, atol=3e-7, err_msg=key)


def test_the_divisors_are_llama_3s():
  """Two readings of the same rule; a llama.cpp file of Llama 3.1 has 8."""
  for head_dim, factor in ((64, 32.0), (128, 8.0)):
    want = convert_gguf.llama3_divisors(head_dim, LLAMA3 | dict(factor=factor))
    scaling = gguf_models.llama3_scaling(want, 5e5, "a file")
    assert (scaling.factor, scaling.original_context) == (factor, 8192)
    with pytest.raises(ValueError, match="is not Llama 3's scaling"):
      gguf_models.llama3_scaling(want[::-1], 5e5, "a file")


def test_queries_of_the_27b_models_are_scaled_by_their_width():
  metadata = {"general.architecture": "gemma3"} | {
      f"gemma3.{key}": value for key, value in {
          "embedding_length": 5376, "feed_forward_length": 21_504,
          "block_count": 62, "attention.head_count": 32,
          "attention.head_count_kv": 16, "attention.key_length": 128,
          "attention.layer_norm_rms_epsilon": 1e-6,
          "attention.sliding_window": 1024, "rope.freq_base": 1e6}.items()}
  fields = gguf_models.model_fields(metadata, "a file")
  assert fields["query_scale"] == pytest.approx(168**-0.5)
  metadata["gemma3.block_count"] = 48
  assert "query_scale" not in gguf_models.model_fields(metadata, "a file")


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
    gguf_models.model_fields(metadata, path)


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
