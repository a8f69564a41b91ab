"""Presets: published model shapes by name. No JAX here.

Source: the `config.json` of each release. A family fills in the fields that its
sizes share; a size's own fields are on its line.
"""

import functools
from typing import Any

from posttrain.model.config import ModelConfig, RopeScaling


def _llama3(factor: float, **fields) -> ModelConfig:
  """Llama 3.1 and 3.2: RoPE scaled from 8,192 to 131,072 tokens."""
  scaling = RopeScaling(
      "llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
      original_context=8192)
  return ModelConfig(
      vocab_size=128_256, kv_heads=8, rope_theta=5e5, rope_scaling=scaling,
      max_positions=131_072, norm_eps=1e-5, **fields)


# SmolLM2 (arXiv 2502.02737).
_smollm2 = functools.partial(
    ModelConfig, vocab_size=49_152, head_dim=64, norm_eps=1e-5,
    max_positions=8192)
# Qwen2.5 (arXiv 2412.15115): biases on q, k and v.
_qwen2 = functools.partial(
    ModelConfig, vocab_size=151_936, rope_theta=1e6, norm_eps=1e-6,
    qkv_bias=True, max_positions=32_768)
# Qwen3 (arXiv 2505.09388): RMSNorm over each head of q and k.
_qwen3 = functools.partial(
    ModelConfig, vocab_size=151_936, rope_theta=1e6, norm_eps=1e-6,
    qk_norm="head", head_dim=128, kv_heads=8, max_positions=40_960)
# Qwen3-MoE: all layers have experts; `mlp` is `moe_intermediate_size`.
_qwen3_moe = functools.partial(
    _qwen3, kv_heads=4, num_experts=128, experts_per_token=8,
    normalize_router=True, tied_embeddings=False)
# OLMo 2 (arXiv 2501.00656): norms behind attention and MLP.
_olmo2 = functools.partial(
    ModelConfig, vocab_size=100_352, head_dim=128, rope_theta=5e5,
    norm_eps=1e-6, norm_placement="post", qk_norm="full",
    tied_embeddings=False, max_positions=4096)
GEMMA: dict[str, Any] = dict(
    norm_placement="both", norm_offset=1.0, embedding_scale=True,
    activation="gelu")


def _gemma2(query_width: int, head_dim=256, **fields) -> ModelConfig:
  """Gemma 2 (arXiv 2408.00118): local and global layers by turns, soft caps."""
  return ModelConfig(
      vocab_size=256_000, head_dim=head_dim, sliding_window=4096,
      layer_pattern=("local", "global"), attention_softcap=50.0,
      final_softcap=30.0, query_scale=query_width**-0.5, max_positions=8192,
      **GEMMA, **fields)


def _gemma3(
    query_width=256, head_dim=256, vocab_size=262_208, sliding_window=1024,
    scaled=True, **fields,
) -> ModelConfig:
  """Gemma 3's text model (arXiv 2503.19786).

  Sizes from 4B on scale the RoPE of global layers.
  """
  return ModelConfig(
      vocab_size=vocab_size, head_dim=head_dim, qk_norm="head",
      layer_pattern=("local",) * 5 + ("global",),
      sliding_window=sliding_window, rope_theta=1e6, rope_local_theta=1e4,
      rope_scaling=RopeScaling("linear", factor=8.0) if scaled else None,
      max_positions=131_072 if scaled else 32_768,
      query_scale=query_width**-0.5, **GEMMA, **fields)


PRESETS = {
    "tiny": ModelConfig(
        vocab_size=0, embed=128, mlp=384, layers=3, heads=4, kv_heads=2,
        head_dim=32),
    "smollm2-135m": _smollm2(
        embed=576, mlp=1536, layers=30, heads=9, kv_heads=3, rope_theta=1e5),
    "smollm2-360m": _smollm2(
        embed=960, mlp=2560, layers=32, heads=15, kv_heads=5, rope_theta=1e5),
    "smollm2-1.7b": _smollm2(
        embed=2048, mlp=8192, layers=24, heads=32, kv_heads=32,
        rope_theta=130_000.0),
    "smollm3-3b": ModelConfig(
        vocab_size=128_256, embed=2048, mlp=11_008, layers=36, heads=16,
        kv_heads=4, head_dim=128, rope_theta=5e6, norm_eps=1e-6,
        max_positions=65_536, layer_pattern=("global",) * 3 + ("nope",)),
    "llama3.1-8b": _llama3(
        8.0, embed=4096, mlp=14_336, layers=32, heads=32, head_dim=128,
        tied_embeddings=False),
    "llama3.1-70b": _llama3(
        8.0, embed=8192, mlp=28_672, layers=80, heads=64, head_dim=128,
        tied_embeddings=False),
    "llama3.2-1b": _llama3(
        32.0, embed=2048, mlp=8192, layers=16, heads=32, head_dim=64),
    "llama3.2-3b": _llama3(
        32.0, embed=3072, mlp=8192, layers=28, heads=24, head_dim=128),
    "qwen2.5-0.5b": _qwen2(
        embed=896, mlp=4864, layers=24, heads=14, kv_heads=2, head_dim=64),
    "qwen2.5-1.5b": _qwen2(
        embed=1536, mlp=8960, layers=28, heads=12, kv_heads=2, head_dim=128),
    "qwen2.5-3b": _qwen2(
        embed=2048, mlp=11_008, layers=36, heads=16, kv_heads=2, head_dim=128),
    "qwen2.5-7b": _qwen2(
        vocab_size=152_064, embed=3584, mlp=18_944, layers=28, heads=28,
        kv_heads=4, head_dim=128, tied_embeddings=False),
    "qwen2.5-14b": _qwen2(
        vocab_size=152_064, embed=5120, mlp=13_824, layers=48, heads=40,
        kv_heads=8, head_dim=128, tied_embeddings=False),
    "qwen2.5-32b": _qwen2(
        vocab_size=152_064, embed=5120, mlp=27_648, layers=64, heads=40,
        kv_heads=8, head_dim=128, tied_embeddings=False),
    "qwen2.5-72b": _qwen2(
        vocab_size=152_064, embed=8192, mlp=29_568, layers=80, heads=64,
        kv_heads=8, head_dim=128, tied_embeddings=False),
    "qwen3-0.6b": _qwen3(embed=1024, mlp=3072, layers=28, heads=16),
    "qwen3-1.7b": _qwen3(embed=2048, mlp=6144, layers=28, heads=16),
    "qwen3-4b": _qwen3(embed=2560, mlp=9728, layers=36, heads=32),
    "qwen3-8b": _qwen3(
        embed=4096, mlp=12_288, layers=36, heads=32, tied_embeddings=False),
    "qwen3-14b": _qwen3(
        embed=5120, mlp=17_408, layers=40, heads=40, tied_embeddings=False),
    "qwen3-32b": _qwen3(
        embed=5120, mlp=25_600, layers=64, heads=64, tied_embeddings=False),
    "qwen3-30b-a3b": _qwen3_moe(embed=2048, mlp=768, layers=48, heads=32),
    "qwen3-235b-a22b": _qwen3_moe(embed=4096, mlp=1536, layers=94, heads=64),
    "gemma2-2b": _gemma2(
        256, embed=2304, mlp=9216, layers=26, heads=8, kv_heads=4),
    "gemma2-9b": _gemma2(
        256, embed=3584, mlp=14_336, layers=42, heads=16, kv_heads=8),
    "gemma2-27b": _gemma2(
        144, embed=4608, mlp=36_864, layers=46, heads=32, kv_heads=16,
        head_dim=128),
    "gemma3-270m": _gemma3(
        embed=640, mlp=2048, layers=18, heads=4, kv_heads=1,
        vocab_size=262_144, sliding_window=512, scaled=False),
    "gemma3-1b": _gemma3(
        embed=1152, mlp=6912, layers=26, heads=4, kv_heads=1,
        vocab_size=262_144, sliding_window=512, scaled=False),
    "gemma3-4b": _gemma3(
        embed=2560, mlp=10_240, layers=34, heads=8, kv_heads=4),
    "gemma3-12b": _gemma3(
        embed=3840, mlp=15_360, layers=48, heads=16, kv_heads=8),
    "gemma3-27b": _gemma3(
        168, head_dim=128, embed=5376, mlp=21_504, layers=62, heads=32,
        kv_heads=16),
    "mistral-7b-v0.1": ModelConfig(
        vocab_size=32_000, embed=4096, mlp=14_336, layers=32, heads=32,
        kv_heads=8, head_dim=128, norm_eps=1e-5, tied_embeddings=False,
        layer_pattern=("local",), sliding_window=4096, max_positions=32_768),
    "mistral-7b-v0.3": ModelConfig(
        vocab_size=32_768, embed=4096, mlp=14_336, layers=32, heads=32,
        kv_heads=8, head_dim=128, rope_theta=1e6, norm_eps=1e-5,
        max_positions=32_768, tied_embeddings=False),
    "olmo2-1b": _olmo2(
        embed=2048, mlp=8192, layers=16, heads=16, kv_heads=16),
    "olmo2-7b": _olmo2(
        embed=4096, mlp=11_008, layers=32, heads=32, kv_heads=32),
    "olmo2-13b": _olmo2(
        embed=5120, mlp=13_824, layers=40, heads=40, kv_heads=40),
    "olmo2-32b": _olmo2(
        embed=5120, mlp=27_648, layers=64, heads=40, kv_heads=8),
}

# Presets whose published files come as a Python package.
PACKAGED = ("smollm2-135m",)
