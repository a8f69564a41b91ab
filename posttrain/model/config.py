"""Shapes of the one model, and presets with published shapes. No JAX here.

A family is a set of field values, never a subclass. Sources of the presets:
the `config.json` of each model's release.
"""

import dataclasses

REMAT_POLICIES = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")

# Vocabularies are padded to a multiple of this, so that every mesh of a
# power of two up to 128 divides the table and checkpoints move between them.
VOCAB_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer: RMSNorm, RoPE, GQA, gated MLP.

  Attributes:
    vocab_size: ids that exist; 0 means "as many as the tokenizer has".
    embed, mlp, layers: widths and depth (D, F, L).
    heads, kv_heads, head_dim: query heads (K * G), kv heads (K), width (H).
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    tied_embeddings: the output head is the embedding table.
    qk_norm: RMSNorm over each head's query and key (Qwen3).
    qkv_bias: biases on the q, k and v projections (Qwen2).
    dtype: of activations and matrix products; parameters at rest are chosen
      by whoever owns them (float32 when trained), logits are always float32.
    remat: what the backward pass recomputes: "none", "dots" (all but matrix
      products) or "full" (everything inside a layer).
    unroll: layers per iteration of the scan; `layers` unrolls it whole, which
      compiles longer and runs faster on a CPU.
  """

  vocab_size: int
  embed: int
  mlp: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  tied_embeddings: bool = True
  qk_norm: bool = False
  qkv_bias: bool = False
  dtype: str = "float32"
  remat: str = "none"
  unroll: int = 1

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
          f"model.heads={self.heads} is not a multiple of "
          f"model.kv_heads={self.kv_heads}.")
    if self.head_dim % 2:
      raise ValueError(
          f"model.head_dim={self.head_dim} is odd; RoPE rotates pairs.")
    for name, value, known in (
        ("remat", self.remat, REMAT_POLICIES), ("dtype", self.dtype, DTYPES)):
      if value not in known:
        raise ValueError(
            f"compute.{name}={value!r} is unknown; choose from {known}.")
    if not 1 <= self.unroll <= self.layers:
      raise ValueError(
          f"compute.unroll={self.unroll} is not within 1 and the "
          f"{self.layers} layers of the model.")

  @property
  def groups(self) -> int:
    """Query heads per kv head (G)."""
    return self.heads // self.kv_heads

  @property
  def padded_vocab_size(self) -> int:
    return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

  @property
  def num_parameters(self) -> int:
    """Parameters without the padding of the vocabulary."""
    attention = self.embed * self.head_dim * 2 * (self.heads + self.kv_heads)
    attention += self.qk_norm * 2 * self.head_dim
    attention += self.qkv_bias * self.head_dim * (
        self.heads + 2 * self.kv_heads)
    block = attention + 3 * self.embed * self.mlp + 2 * self.embed
    tables = self.vocab_size * self.embed * (1 if self.tied_embeddings else 2)
    return self.layers * block + tables + self.embed


def _qwen2(vocab_size=151_936, **fields) -> ModelConfig:
  return ModelConfig(
      vocab_size=vocab_size, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True,
      **fields)


def _qwen3(**fields) -> ModelConfig:
  return ModelConfig(
      vocab_size=151_936, rope_theta=1e6, norm_eps=1e-6, qk_norm=True,
      head_dim=128, kv_heads=8, **fields)


PRESETS = {
    "tiny": ModelConfig(
        vocab_size=0, embed=128, mlp=384, layers=3, heads=4, kv_heads=2,
        head_dim=32),
    "smollm2-135m": ModelConfig(
        vocab_size=49_152, embed=576, mlp=1536, layers=30, heads=9,
        kv_heads=3, head_dim=64, rope_theta=1e5, norm_eps=1e-5),
    # The release's RoPE scaling is not applied: shapes only.
    "llama3.2-1b": ModelConfig(
        vocab_size=128_256, embed=2048, mlp=8192, layers=16, heads=32,
        kv_heads=8, head_dim=64, rope_theta=5e5, norm_eps=1e-5),
    "qwen2.5-0.5b": _qwen2(
        embed=896, mlp=4864, layers=24, heads=14, kv_heads=2, head_dim=64),
    "qwen2.5-1.5b": _qwen2(
        embed=1536, mlp=8960, layers=28, heads=12, kv_heads=2, head_dim=128),
    "qwen2.5-7b": _qwen2(
        vocab_size=152_064, embed=3584, mlp=18_944, layers=28, heads=28,
        kv_heads=4, head_dim=128, tied_embeddings=False),
    "qwen2.5-32b": _qwen2(
        vocab_size=152_064, embed=5120, mlp=27_648, layers=64, heads=40,
        kv_heads=8, head_dim=128, tied_embeddings=False),
    "qwen3-0.6b": _qwen3(embed=1024, mlp=3072, layers=28, heads=16),
    "qwen3-4b": _qwen3(embed=2560, mlp=9728, layers=36, heads=32),
    "qwen3-8b": _qwen3(
        embed=4096, mlp=12_288, layers=36, heads=32, tied_embeddings=False),
    "qwen3-32b": _qwen3(
        embed=5120, mlp=25_600, layers=64, heads=64, tied_embeddings=False),
}
