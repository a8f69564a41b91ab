"""Configuration of the transformer: shape and how it is computed. No JAX here.

A family of models is a set of field values, never a subclass: see `presets`.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

REMAT_POLICIES = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")
LAYER_KINDS = ("global", "local", "nope")
NORM_PLACEMENTS = ("pre", "post", "both")
ACTIVATIONS = ("silu", "gelu")
QK_NORMS = ("", "head", "full")
ROPE_SCALINGS = ("llama3", "linear")
MOE_FORMS = ("auto", "dense", "grouped")
ATTENTION_FORMS = ("reference", "blocks", "splash")
SPLASH_MULTIPLE = 128  # Of a block's tokens: lanes of a vector register.
GRADIENT_FORMS = ("reference", "in_layout")
# Fields that say how the model is computed, not what it is: a config's
# `compute` sets them, and files of weights do not have them.
COMPUTE_FIELDS = (
    "dtype", "remat", "unroll", "moe", "attention", "attention_block",
    "gradients", "decode_attention")
# Logical axes of a layer's matrices, where it has no experts.
HEADS = ("kv_heads", "groups", "head_dim")
KV_HEADS = ("kv_heads", "head_dim")
MATRIX_AXES: dict[str, tuple[str, ...]] = {
    "q": ("embed", *HEADS), "k": ("embed", *KV_HEADS),
    "v": ("embed", *KV_HEADS), "o": (*HEADS, "embed"),
    "gate": ("embed", "mlp"), "up": ("embed", "mlp"), "down": ("mlp", "embed")}
# How many leading axes of a matrix, behind that of the layers, are contracted.
INPUT_AXES = {"q": 1, "k": 1, "v": 1, "o": 3, "gate": 1, "up": 1, "down": 1}
QUANTIZED = ("int8", "int4", "nf4")
LORA_DECODE = ("live", "merged")
# Dtypes of the sampler's KV cache, and of the weights of its decode loop:
# `compute.dtype`, or 8 bits with scales.
SAMPLING_DTYPES = ("compute", "int8")
DECODE_ATTENTION = ("reference", "kernel")
INTERPRETED = "interpreted"  # The kernel in Python, slowly: for tests.


def check_sampling_dtype(name: str, value: str) -> None:
  """Raises ValueError for an unknown `cache_dtype` or `weights_dtype`."""
  if value not in SAMPLING_DTYPES:
    raise ValueError(
        f"{name}={value!r} is unknown; choose from {SAMPLING_DTYPES}.")


# Vocabularies are padded to a multiple of this, so that every mesh of a
# power of two up to 128 divides the table and checkpoints move between them.
VOCAB_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Scaling of rotary frequencies (RoPE) to a longer context.

  Attributes:
    kind: "linear" divides all frequencies by `factor`; "llama3" only those
      whose wavelength is above original_context / low_freq_factor, blending
      into the others up to original_context / high_freq_factor.
    factor: how many times longer the context becomes.
    low_freq_factor, high_freq_factor, original_context: of "llama3"; the last
      in tokens.
  """

  kind: str
  factor: float
  low_freq_factor: float = 0.0
  high_freq_factor: float = 0.0
  original_context: int = 0

  def __post_init__(self):
    if self.kind not in ROPE_SCALINGS:
      raise ValueError(
          f"rope_scaling.kind={self.kind!r} is unknown; choose from "
          f"{ROPE_SCALINGS}.")
    if self.kind == "llama3" and not (
        0 < self.low_freq_factor < self.high_freq_factor
        and self.original_context > 0):
      raise ValueError(
          "rope_scaling of the kind 'llama3' needs 0 < low_freq_factor < "
          f"high_freq_factor and an original_context; found {self}.")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Configuration of LoRA: W + scale * A B in place of a matrix W.

  Attributes:
    rank: columns of A, rows of B (r).
    alpha: the scale is alpha / r, or alpha / sqrt(r) with `rslora`.
    targets: names of matrices, of `INPUT_AXES`.
    rslora: use the rank-stabilised scale (arXiv 2312.03732).
    decode: weights of the sampler's decode loop: "live", base and adapter, two
      products; "merged", their sum, made once per call.
  """

  rank: int
  alpha: float = 16.0
  targets: tuple[str, ...] = tuple(INPUT_AXES)
  rslora: bool = False
  decode: str = "live"

  def __post_init__(self):
    unknown = [name for name in self.targets if name not in INPUT_AXES]
    if unknown or not self.targets:
      raise ValueError(
          f"lora.targets={self.targets} must name some of "
          f"{', '.join(INPUT_AXES)}.")
    if len(set(self.targets)) < len(self.targets):
      raise ValueError(f"lora.targets={self.targets} names one twice.")
    if self.rank < 1:
      raise ValueError(f"lora.rank={self.rank} must be 1 or more.")
    if self.decode not in LORA_DECODE:
      raise ValueError(
          f"lora.decode={self.decode!r}; choose from {LORA_DECODE}.")

  @property
  def scale(self) -> float:
    """Factor of A B."""
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Configuration of a decoder-only transformer: RMSNorm, RoPE, GQA, gated MLP.

  Attributes:
    vocab_size: ids that exist; 0 means "as many as the tokenizer has".
    embed, mlp, layers: widths and depth (D, F, L). With experts, `mlp` is the
      width of one.
    heads, kv_heads, head_dim: query heads (K * G), kv heads (K), width (H).
    layer_pattern: kinds of layers, repeated over the depth: "global" sees all
      earlier tokens, "local" the last `sliding_window` tokens, "nope" all
      without rotary positions (SmolLM3).
    sliding_window: tokens that a local layer sees, the query's own included.
    rope_theta: base of the rotary frequencies.
    rope_local_theta: base of local layers; 0 for the same.
    rope_scaling: scaling of the global layers' frequencies.
    max_positions: context length that a release names, in tokens; 0: none.
      Nothing here stops at it: it is exported again with the weights.
    norm_eps: added to the mean square in RMSNorm.
    norm_offset: added to every norm's scale (Gemma: 1).
    norm_placement: of attention and MLP: "pre", on what they read; "post", on
      what they add (OLMo 2); "both" (Gemma).
    embedding_scale: embeddings are multiplied by sqrt(D) (Gemma).
    activation: of the gate: "silu", or "gelu" (its tanh form).
    attention_softcap, final_softcap: scores and logits become
      cap * tanh(x / cap) (Gemma 2); 0: no cap.
    query_scale: factor of the scores; 0 for head_dim**-0.5.
    tied_embeddings: the output head is the embedding table.
    qk_norm: RMSNorm of queries and keys: "head", over each head (Qwen3);
      "full", over all heads together (OLMo 2).
    qkv_bias: biases on the q, k and v projections (Qwen2).
    num_experts: of every layer's feed-forward (E); 0: it is one dense MLP.
    experts_per_token: experts that a token is routed to (k).
    normalize_router: the probabilities of the chosen experts are divided by
      their sum (`norm_topk_prob` of Qwen3-MoE's releases).
    dtype: compute dtype, of activations and matrix products. Parameters that
      are trained rest in float32, and logits are always float32.
    remat: what the backward pass recomputes: "none", "dots" (all but matrix
      products) or "full" (everything inside a layer).
    unroll: layers per iteration of the scan; `layers` unrolls it whole, which
      compiles longer and runs faster on a CPU.
    moe: how experts are computed: "dense", all on all tokens; "grouped", each
      on its own tokens; "auto", grouped on a TPU and dense elsewhere.
    attention: form for whole sequences, in training and prefill: "reference",
      over a mask of all pairs; "blocks", see `blockwise_attention`; "splash",
      a kernel for TPUs, see `splash`.
    attention_block: tokens of a block of the last two forms.
    gradients: form of the gradients of the blocks' matrices: "reference", as
      JAX has them; "in_layout", see `block.contract_in_layout`.
    decode_attention: form for the sampler's steps: "reference", XLA's products
      over the whole cache, or "kernel", see `decode_kernel`.
    lora: adapters, see `lora.add`; None: there are none.
    quantized: how quantised matrices rest, see `quantized`; "": none is.
  """

  vocab_size: int
  embed: int
  mlp: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  layer_pattern: tuple[str, ...] = ("global",)
  sliding_window: int = 0
  rope_theta: float = 10_000.0
  rope_local_theta: float = 0.0
  rope_scaling: RopeScaling | None = None
  max_positions: int = 0
  norm_eps: float = 1e-6
  norm_offset: float = 0.0
  norm_placement: str = "pre"
  embedding_scale: bool = False
  activation: str = "silu"
  attention_softcap: float = 0.0
  final_softcap: float = 0.0
  query_scale: float = 0.0
  tied_embeddings: bool = True
  qk_norm: str = ""
  qkv_bias: bool = False
  num_experts: int = 0
  experts_per_token: int = 0
  normalize_router: bool = False
  dtype: str = "float32"
  remat: str = "none"
  unroll: int = 1
  moe: str = "auto"
  attention: str = "reference"
  attention_block: int = 128
  gradients: str = "reference"
  decode_attention: str = "reference"
  lora: LoraConfig | None = None
  quantized: str = ""

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
          f"model.heads={self.heads} is not a multiple of "
          f"model.kv_heads={self.kv_heads}.")
    if self.head_dim % 2:
      raise ValueError(
          f"model.head_dim={self.head_dim} is odd; RoPE rotates pairs.")
    for name, value, known in (
        ("compute.remat", self.remat, REMAT_POLICIES),
        ("compute.dtype", self.dtype, DTYPES),
        ("compute.moe", self.moe, MOE_FORMS),
        ("compute.attention", self.attention, ATTENTION_FORMS),
        ("compute.gradients", self.gradients, GRADIENT_FORMS),
        ("compute.decode_attention", self.decode_attention,
         (*DECODE_ATTENTION, INTERPRETED)),
        ("model.norm_placement", self.norm_placement, NORM_PLACEMENTS),
        ("model.activation", self.activation, ACTIVATIONS),
        ("model.qk_norm", self.qk_norm, QK_NORMS),
        *(("model.layer_pattern", kind, LAYER_KINDS)
          for kind in self.layer_pattern)):
      if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose from {known}.")
    if not self.layer_pattern:
      raise ValueError("model.layer_pattern is empty.")
    if ("local" in self.layer_pattern) != (self.sliding_window > 0):
      raise ValueError(
          f"model.sliding_window={self.sliding_window} and "
          f"model.layer_pattern={self.layer_pattern} do not agree: a window "
          "above 0 belongs to local layers, and they to it.")
    if self.attention == "splash" and self.attention_block % SPLASH_MULTIPLE:
      raise ValueError(
          f"compute.attention_block={self.attention_block} must be a multiple "
          f"of {SPLASH_MULTIPLE} for compute.attention='splash'.")
    self._check_experts()
    if not 1 <= self.unroll <= self.layers:
      raise ValueError(
          f"compute.unroll={self.unroll} is not within 1 and the "
          f"{self.layers} layers of the model.")

  def _check_experts(self) -> None:
    """Raises ValueError for fields of experts that contradict each other."""
    chosen, experts = self.experts_per_token, self.num_experts
    if not 0 <= chosen <= experts or bool(chosen) != bool(experts):
      raise ValueError(
          f"model.experts_per_token={chosen} is not within 1 and "
          f"model.num_experts={experts}; a dense model has 0 of both.")
    if not experts and self.normalize_router:
      raise ValueError(
          "model.normalize_router has no effect: model.num_experts is 0.")
    if not experts and self.moe != "auto":
      raise ValueError(
          f"compute.moe={self.moe!r} has no effect: model.num_experts is 0.")

  def to_json(self) -> dict[str, Any]:
    """Returns the fields of the model, without those of `COMPUTE_FIELDS`."""
    fields = dataclasses.asdict(self)
    return {name: value for name, value in fields.items()
            if name not in COMPUTE_FIELDS}

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> "ModelConfig":
    """Makes a config of `to_json`'s result, as a file has it.

    Raises:
      ValueError: a field is not known, or missing.
    """
    fields = dict(data, layer_pattern=tuple(data.get("layer_pattern", ())))
    if fields.get("rope_scaling"):
      fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    try:
      return cls(**fields)
    except TypeError as error:
      raise ValueError(f"the shape of a model is damaged: {error}.") from error

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """Kind of every layer."""
    return tuple(itertools.islice(
        itertools.cycle(self.layer_pattern), self.layers))

  @property
  def attention_scale(self) -> float:
    """Factor of the attention scores."""
    return self.query_scale or self.head_dim**-0.5

  @property
  def groups(self) -> int:
    """G, query heads per kv head."""
    return self.heads // self.kv_heads

  @property
  def padded_vocab_size(self) -> int:
    """V, rows of the embedding table."""
    return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

  @property
  def num_parameters(self) -> int:
    """Parameters without the padding of the vocabulary."""
    return self._parameters(self.num_experts)

  @property
  def num_active_parameters(self) -> int:
    """Parameters that one token passes through; fewer with experts."""
    return self._parameters(self.experts_per_token)

  def matrix_parameters(self, experts: int) -> int:
    """Counts the parameters of one layer's matrices, with `experts` experts."""
    attention = self.embed * self.head_dim * 2 * (self.heads + self.kv_heads)
    return attention + self.embed * self.num_experts + (
        3 * self.embed * self.mlp * (experts or 1))

  def _parameters(self, experts: int) -> int:
    """Counts parameters with `experts` experts in each layer, if it has any."""
    norms = {
        "": 0, "head": 2 * self.head_dim,
        "full": self.head_dim * (self.heads + self.kv_heads)}[self.qk_norm]
    norms += (4 if self.norm_placement == "both" else 2) * self.embed
    biases = self.qkv_bias * self.head_dim * (self.heads + 2 * self.kv_heads)
    block = self.matrix_parameters(experts) + norms + biases
    tables = self.vocab_size * self.embed * (1 if self.tied_embeddings else 2)
    return self.layers * block + tables + self.embed
