"""GGUF architectures, as llama.cpp's converter writes them.

A family is a row of `ARCHITECTURES`: the fields of its ModelConfig that the
file does not have, and the metadata keys that it may have in addition to the
common ones. The converter changes weights in these ways:

* "llama" and "smollm3": the rows of the q and k projections are permuted, head
  by head, for a rotary embedding that rotates neighbouring dimensions (2i,
  2i + 1); ours rotates (i, i + H/2), so the permutation is undone. The other
  architectures are stored as they were released.
* "gemma2" and "gemma3": 1 is added to every norm, and subtracted here, since
  the model adds it (`norm_offset`).
* Llama 3's RoPE scaling is not in the metadata but a tensor of divisors of the
  frequencies, `rope_freqs.weight`; its parameters are computed from it.

Anything else that a file asks for is an error. Source: llama.cpp,
`conversion/*.py` and `src/llama-model.cpp`.

  D: embed  H: head_dim
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from posttrain.interop import parameters
from posttrain.model import attention
from posttrain.model.config import ModelConfig, RopeScaling

ROPE_TENSOR = "rope_freqs.weight"
LLAMA3_CONTEXT, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Properties of an architecture that its files' metadata lack.

  Attributes:
    fields: fields of its ModelConfig.
    keys: metadata that this architecture has in addition to the common ones:
      field -> key without the architecture's name.
    optional: as `keys`, for fields with a default in `fields`.
    permuted: q and k are stored for interleaved RoPE.
    wide: number of layers of the size whose queries are scaled by
      (D / heads) ** -0.5 instead of H ** -0.5; 0: none.
  """

  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
  optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
  permuted: bool = False
  wide: int = 0


GEMMA = dict(
    norm_placement="both", norm_offset=1.0, embedding_scale=True,
    activation="gelu")
ARCHITECTURES = {
    "llama": Architecture(permuted=True),
    "qwen2": Architecture(dict(qkv_bias=True)),
    "qwen3": Architecture(dict(qk_norm="head")),
    "gemma2": Architecture(
        GEMMA | dict(layer_pattern=("local", "global")), {
            "sliding_window": "attention.sliding_window",
            "attention_softcap": "attn_logit_softcapping",
            "final_softcap": "final_logit_softcapping"}, wide=46),
    "gemma3": Architecture(
        GEMMA | dict(layer_pattern=("local",) * 5 + ("global",),
                     qk_norm="head", rope_local_theta=10_000.0),
        {"sliding_window": "attention.sliding_window"},
        {"rope_local_theta": "rope.freq_base_swa"}, wide=62),
    "olmo2": Architecture(dict(norm_placement="post", qk_norm="full")),
    "smollm3": Architecture(
        dict(layer_pattern=("global",) * 3 + ("nope",)), permuted=True),
}

REQUIRED = {
    "embed": "embedding_length", "mlp": "feed_forward_length",
    "layers": "block_count", "heads": "attention.head_count",
    "norm_eps": "attention.layer_norm_rms_epsilon"}

# Keys that are checked, or do not affect the computation.
OTHER = {
    "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "context_length", "vocab_size"}

FLOATS = ("rope_theta", "rope_local_theta", "norm_eps", "attention_softcap",
          "final_softcap")


def architecture(metadata: Mapping[str, Any], path: Any) -> str:
  """Returns the file's architecture; raises ValueError if it is unknown."""
  name = metadata.get("general.architecture")
  if name not in ARCHITECTURES:
    raise ValueError(
        f"{path} holds the architecture {name!r}; this reader knows "
        f"{', '.join(ARCHITECTURES)}.")
  return name


def model_fields(
    metadata: Mapping[str, Any], path: Any) -> dict[str, Any]:
  """Reads the fields of a ModelConfig that the metadata determine.

  Those are all but vocab_size, tied_embeddings and a RoPE scaling that is a
  tensor.

  Raises:
    ValueError: the architecture is unknown, metadata are missing, or they ask
      for something that this model does not do.
  """
  name = architecture(metadata, path)
  row = ARCHITECTURES[name]
  found = {key.removeprefix(f"{name}."): value
           for key, value in metadata.items() if key.startswith(f"{name}.")}
  required = {**REQUIRED, **row.keys}
  missing = [f"{name}.{key}" for key in required.values() if key not in found]
  if missing:
    raise ValueError(f"{path} lacks {', '.join(missing)}.")
  unknown = {
      f"{name}.{key}": value for key, value in found.items()
      if isinstance(value, list) or key not in {
          *OTHER, *required.values(), *row.optional.values()}}
  if unknown:
    raise ValueError(
        f"{path} asks for what this model does not do: {unknown}.")
  fields = dict(row.fields) | {
      field: found[key] for field, key in {**required, **row.optional}.items()
      if key in found}
  fields["kv_heads"] = found.get("attention.head_count_kv", fields["heads"])
  fields["head_dim"] = _head_dim(found, fields, name, path)
  fields["max_positions"] = found.get("context_length", 0)
  fields["rope_theta"] = found.get("rope.freq_base", 10_000.0)
  scaling = _linear_scaling(found, name, path)
  if scaling is not None:
    fields["rope_scaling"] = scaling
  if row.wide == fields["layers"]:
    fields["query_scale"] = (fields["embed"] / fields["heads"]) ** -0.5
  # Files store float32: 9.999999747378752e-06 becomes 1e-05 again, as in
  # config.json.
  return {key: float(str(np.float32(value))) if key in FLOATS else value
          for key, value in fields.items()}


def _head_dim(found, fields, name, path) -> int:
  head_dim = found.get(
      "attention.key_length", fields["embed"] // fields["heads"])
  for key in ("attention.value_length", "rope.dimension_count"):
    if found.get(key, head_dim) != head_dim:
      raise ValueError(
          f"{path} has {name}.{key}={found[key]}; this model needs it to be "
          f"the width of a head, {head_dim}.")
  return head_dim


def _linear_scaling(found, name, path) -> RopeScaling | None:
  kind = found.get("rope.scaling.type", "none")
  if kind not in ("none", "linear"):
    raise ValueError(
        f"{path} has {name}.rope.scaling.type={kind!r}; this reader knows "
        "'none' and 'linear'.")
  if kind == "none":
    return None
  if "rope.scaling.factor" not in found:
    raise ValueError(f"{path} lacks {name}.rope.scaling.factor.")
  return RopeScaling(
      kind="linear",
      factor=float(str(np.float32(found["rope.scaling.factor"]))))


def llama3_scaling(
    divisors: np.ndarray, rope_theta: float, path: Any) -> RopeScaling:
  """Finds Llama 3's RoPE scaling from `rope_freqs.weight`, [H / 2].

  The factor is the largest divisor. The other values are the published
  constants, which all of the divisors have to confirm.

  Raises:
    ValueError: the divisors belong to another scaling.
  """
  scaling = RopeScaling(
      kind="llama3", factor=float(f"{divisors.max():.6g}"),
      low_freq_factor=LLAMA3_LOW, high_freq_factor=LLAMA3_HIGH,
      original_context=LLAMA3_CONTEXT)
  plain, scaled = (
      np.asarray(attention.frequencies(2 * len(divisors), rope_theta, kind))
      for kind in (None, scaling))
  if not np.allclose(divisors, plain / scaled, rtol=1e-4):
    raise ValueError(
        f"{path} has a rope_freqs.weight that is not Llama 3's scaling by "
        f"{scaling.factor} from {LLAMA3_CONTEXT} positions: {divisors}.")
  return scaling


NAMES = {
    "embedding": "token_embd.weight", "final_norm": "output_norm.weight",
    "head": "output.weight",
    "q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight",
    "gate": "ffn_gate.weight", "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "attn_norm": "attn_norm.weight", "mlp_norm": "ffn_norm.weight",
    "attn_post_norm": "post_attention_norm.weight",
    "mlp_post_norm": "post_ffw_norm.weight"}


def undo_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
  """Reorders rows for interleaved RoPE to rows for half-split RoPE.

  The converter's `permute` splits the H rows of each head in two halves and
  interleaves them; here row 2i goes back to i and row 2i + 1 to H/2 + i.

  Args:
    weight: [heads * H, D].
    heads: number of heads of the projection.
  """
  rows, width = weight.shape
  pairs = weight.reshape(heads, rows // heads // 2, 2, width)
  return pairs.swapaxes(1, 2).reshape(rows, width)


def sources(
    config: ModelConfig, permuted: bool) -> dict[str, parameters.Source]:
  """Maps every parameter path of the model to the tensors that hold it."""
  c, prepare = config, dict[str, Callable]()
  if permuted:
    prepare |= {"q": functools.partial(undo_permutation, heads=c.heads),
                "k": functools.partial(undo_permutation, heads=c.kv_heads)}
  if c.norm_offset:
    take_off = lambda norm: norm - np.float32(c.norm_offset)
    prepare |= {leaf: take_off for leaf in NAMES if leaf.endswith("norm")}
  table = parameters.table(c, NAMES, "blk.{layer}.")
  return {path: dataclasses.replace(
      source, prepare=prepare.get(path.split("/")[-1], source.prepare))
          for path, source in table.items()}
