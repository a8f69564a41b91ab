"""GGUF files: metadata, dequantised tensors, and the model from them.

`gguf_file` reads the format, and the `gguf` package dequantises. The tokenizer
is in `gguf_tokenizer`. One tensor at a time is on the host: a layer of a
parameter goes to its place in the stacked arrays on the devices before the next
one is read.

Architectures are as llama.cpp's converter writes them. A family is a row of
`ARCHITECTURES`: the fields of its ModelConfig that the file does not have, and
the metadata keys that it may have in addition to the common ones. The converter
changes weights in these ways:

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
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from posttrain.interop import gguf_file, parameters
from posttrain.model import attention, transformer
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


@dataclasses.dataclass(frozen=True)
class GGUFFile:
  """A parsed GGUF file; tensors stay on disk (memory-mapped) until read.

  Attributes:
    path: the file's path.
    metadata: every key of the file, as Python values and lists.
    tensors: places of the tensors in the file, by name.
  """

  path: Path
  metadata: dict[str, Any]
  tensors: dict[str, gguf_file.Tensor]

  def tensor(self, name: str) -> np.ndarray:
    """Reads one tensor, dequantised to float32.

    Raises:
      ValueError: the `gguf` package cannot dequantise its type.
    """
    tensor = self.tensors[name]
    try:
      return gguf.dequantize(tensor.view(), tensor.kind)
    except NotImplementedError as error:
      raise ValueError(
          f"{self.path}: tensor {name} is {tensor.kind.name}, which the "
          "gguf package cannot dequantise. Use a file of another "
          "quantisation, such as Q8_0 or F16.") from error


def read(path: str | Path) -> GGUFFile:
  """Parses a GGUF file.

  Raises:
    ValueError: the path is not a file, or the file not in the GGUF format.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f"{path} is not a file; a GGUF file is needed.")
  return GGUFFile(path, *gguf_file.read_header(path))


def model_config(file: GGUFFile) -> ModelConfig:
  """Reads the model's shape from a file; compute fields keep their defaults.

  Raises:
    ValueError: the architecture is unknown, metadata are missing, or they ask
      for something that this model does not do.
  """
  fields = model_fields(file.metadata, file.path)
  if "token_embd.weight" not in file.tensors:
    raise ValueError(f"{file.path} lacks token_embd.weight (a tensor).")
  if ROPE_TENSOR in file.tensors:
    fields["rope_scaling"] = llama3_scaling(
        file.tensor(ROPE_TENSOR), fields["rope_theta"], file.path)
  return ModelConfig(
      vocab_size=file.tensors["token_embd.weight"].shape[0],
      tied_embeddings="output.weight" not in file.tensors, **fields)


def load(
    file: GGUFFile, config: ModelConfig, *, dtype: str = "float32",
    progress: parameters.Progress | None = None,
) -> transformer.Transformer:
  """Loads the file's weights into a model, sharded over the current mesh.

  One tensor at a time is whole on the host: for SmolLM2-135M at most the 113 MB
  of the embedding table, in addition to what is on the devices.

  Args:
    file: a file of a model with the config's shape.
    config: shape of the model.
    dtype: dtype of the parameters; "float32" if they are trained.
    progress: called after every tensor.

  Raises:
    ValueError: the file holds another model, or other tensors.
  """
  parameters.check_config(model_config(file), config, file.path)
  name = architecture(file.metadata, file.path)
  tensors = sources(config, ARCHITECTURES[name].permuted)
  # The divisors of the frequencies are in the config: `model_config`.
  shapes = {name: tensor.shape for name, tensor in file.tensors.items()
            if name != ROPE_TENSOR}
  parameters.check_tensors(shapes, tensors, config.layers, file.path)
  return parameters.load(
      config, tensors, file.tensor, dtype=dtype, progress=progress)
