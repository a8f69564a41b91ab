"""Tiny releases of every family: config.json, tensors, and the shape they have.

Random tensors under the names that transformers gives them, and the
ModelConfig that reads them, written down by hand.
"""

import json

import numpy as np
import safetensors.numpy

from posttrain.model.config import ModelConfig, RopeScaling

SHAPE = dict(
    vocab_size=130, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=True,
    rope_parameters=dict(rope_type="default", rope_theta=5e5))
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=8192)
GEMMA = dict(sliding_window=8, query_pre_attn_scalar=16)
GEMMA3_ROPE = dict(
    full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    sliding_attention=dict(rope_type="default", rope_theta=1e4))

BASE = dict(
    vocab_size=130, embed=32, mlp=48, layers=6, heads=4, kv_heads=2,
    head_dim=16, rope_theta=5e5, max_positions=128, norm_eps=1e-6)
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
    "mistral": ("mistral", dict(sliding_window=8, tie_word_embeddings=False),
                dict(layer_pattern=("local",), sliding_window=8,
                     tied_embeddings=False)),
    "qwen2": ("qwen2", dict(head_dim=None, num_attention_heads=2),
              dict(qkv_bias=True, heads=2)),
    "qwen3": ("qwen3", {}, dict(qk_norm="head")),
    "qwen3_moe": (
        "qwen3_moe",
        dict(moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2,
             norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]),
        dict(qk_norm="head", mlp=12, num_experts=4, experts_per_token=2,
             normalize_router=True)),
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


def released(
    name: str, **sizes: int) -> tuple[str, dict, ModelConfig, dict]:
  """Architecture, config.json, the model's config, tensors by their names."""
  architecture, changes, fields = CASES[name]
  changes = changes | sizes
  config = ModelConfig(**(BASE | fields | sizes))
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
        "post_attention_layernorm.weight": (c.embed,)}
    for prefix in [f"experts.{i}." for i in range(c.num_experts)] or [""]:
      shapes |= {
          f"mlp.{prefix}gate_proj.weight": (c.mlp, c.embed),
          f"mlp.{prefix}up_proj.weight": (c.mlp, c.embed),
          f"mlp.{prefix}down_proj.weight": (c.embed, c.mlp)}
    if c.num_experts:
      shapes["mlp.gate.weight"] = (c.num_experts, c.embed)
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
    "router": "mlp.gate.weight", "attn_norm": "input_layernorm.weight",
    "attn_post_norm": "post_attention_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight"}


def released_name(leaf: str, config: ModelConfig) -> str:
  if leaf == "mlp_norm":
    return ("pre_feedforward_layernorm.weight"
            if config.norm_placement == "both"
            else "post_attention_layernorm.weight")
  return NAMES[leaf]


def write(path, data: dict, tensors: dict, dtype="float32", shards=1) -> None:
  """A directory, its weights by the `safetensors` package."""
  path.mkdir()
  (path / "config.json").write_text(json.dumps(data))
  tensors = {name: value.astype(dtype) for name, value in tensors.items()}
  if shards == 1:
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return
  names = {name: f"model-{i % shards}.safetensors"
           for i, name in enumerate(tensors)}
  for file in set(names.values()):
    safetensors.numpy.save_file(
        {name: value for name, value in tensors.items()
         if names[name] == file}, path / file)
  (path / "model.safetensors.index.json").write_text(
      json.dumps({"weight_map": names}))


def host_tensors(model: dict, config: ModelConfig) -> dict[str, np.ndarray]:
  """Parameters on the host (`to_dict`) under the released names.

  Written apart from the code that is tested: matrices [out, in], heads as
  they follow each other, no padding.
  """
  top = {"embedding": "model.embed_tokens", "head": "lm_head",
         "final_norm": "model.norm"}
  found = {}
  for leaf, value in model.items():
    if leaf in top:
      value = value.T if leaf == "head" else value
      if leaf != "final_norm":
        assert not value[config.vocab_size:].any()
        value = value[:config.vocab_size]
      found[f"{top[leaf]}.weight"] = value
  for leaf, value in model["blocks"].items():
    for layer, part in enumerate(value):
      if part.ndim == 3 and leaf in ("gate", "up", "down"):
        found |= {
            f"model.layers.{layer}.mlp.experts.{i}.{leaf}_proj.weight": one.T
            for i, one in enumerate(part)}
        continue
      if leaf == "o":
        part = part.reshape(-1, config.embed).T
      elif "norm" in leaf or "bias" in leaf:
        part = part.reshape(-1)
      else:
        part = part.reshape(part.shape[0], -1).T
      found[f"model.layers.{layer}.{released_name(leaf, config)}"] = part
  return found
