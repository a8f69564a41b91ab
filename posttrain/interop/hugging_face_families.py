"""Families of transformers: a row of `FAMILIES` each.

Source: `configuration_*.py` and `modeling_*.py` of transformers, 5.24.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
  """Properties of a family that its config.json lacks, and its keys.

  Attributes:
    architecture: the class in transformers.
    fields: fields of the ModelConfig that all of its models share.
    defaults: transformers' values for keys that are missing.
    activation: the key of the activation.
    keys: keys of layer kinds, and keys that only this family has; see `_kinds`.
    period: without `layer_types`, each `period`-th layer is global.
  """

  architecture: str
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  activation: str = "hidden_act"
  keys: tuple[str, ...] = ()
  period: int = 0


QWEN = ("use_sliding_window", "sliding_window", "max_window_layers",
        "layer_types")
MOE = {  # Our fields of the experts, and transformers' keys.
    "mlp": "moe_intermediate_size", "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "normalize_router": "norm_topk_prob"}
GEMMA: dict[str, Any] = dict(
    norm_placement="both", norm_offset=1.0, embedding_scale=True)
GEMMA_DEFAULTS: dict[str, Any] = dict(
    max_position_embeddings=8192, vocab_size=256_000, hidden_size=2304,
    intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256,
    hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True,
    query_pre_attn_scalar=256, sliding_window=4096)
GEMMA_KEYS = (
    "sliding_window", "layer_types", "query_pre_attn_scalar",
    "final_logit_softcapping", "attn_logit_softcapping")

FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM", defaults=dict(sliding_window=4096),
        keys=("sliding_window",)),
    "qwen2": Family(
        "Qwen2ForCausalLM", dict(qkv_bias=True), dict(
            sliding_window=4096, max_window_layers=28), keys=QWEN),
    "qwen3": Family(
        "Qwen3ForCausalLM", dict(qk_norm="head"), dict(
            head_dim=128, sliding_window=4096, max_window_layers=28),
        keys=QWEN),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", dict(qk_norm="head"), dict(
            head_dim=128, sliding_window=4096, max_window_layers=28,
            norm_topk_prob=False, decoder_sparse_step=1), keys=(
                *QWEN, *MOE.values(), "num_local_experts",
                "decoder_sparse_step", "mlp_only_layers")),
    "gemma2": Family(
        "Gemma2ForCausalLM", GEMMA, GEMMA_DEFAULTS | dict(
            final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
        activation="hidden_activation", keys=GEMMA_KEYS, period=2),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", GEMMA | dict(qk_norm="head"),
        GEMMA_DEFAULTS | dict(
            max_position_embeddings=131_072, vocab_size=262_208,
            rope_theta=1e6, rope_local_base_freq=1e4,
            sliding_window_pattern=6),
        activation="hidden_activation", period=6,
        keys=(*GEMMA_KEYS, "rope_local_base_freq", "sliding_window_pattern")),
    "olmo2": Family(
        "Olmo2ForCausalLM", dict(norm_placement="post", qk_norm="full"),
        dict(rms_norm_eps=1e-5)),
    "smollm3": Family(
        "SmolLM3ForCausalLM", defaults=dict(
            num_key_value_heads=4, rope_theta=2e6, tie_word_embeddings=True,
            no_rope_layer_interval=4),
        keys=("no_rope_layers", "no_rope_layer_interval", "layer_types",
              "max_window_layers")),
}
