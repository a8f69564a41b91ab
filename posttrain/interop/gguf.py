"""GGUF files: metadata, dequantised tensors, and the one model from them.

The `gguf` package parses the file and dequantises; what is known here is how
llama.cpp lays a Llama out. Its converter permutes the rows of the q and k
projections, head by head, for a rotary embedding that turns neighbouring
dimensions (2i, 2i + 1); ours turns (i, i + H/2), so the permutation is undone.

  L: layers  D: embed  F: mlp  K: kv heads  G: query heads per kv head
  H: head_dim  V: vocab

Tokenizers are in `gguf_tokenizer`. Deliberately not here: architectures other
than "llama", RoPE scaling, experts: a file that has them is an error.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from posttrain.model import transformer
from posttrain.model.config import ModelConfig

ARCHITECTURE = "llama"

# Fields of a ModelConfig that a file decides; the others are the user's.
SHAPE_FIELDS = (
    "vocab_size", "embed", "mlp", "layers", "heads", "kv_heads", "head_dim",
    "rope_theta", "norm_eps", "tied_embeddings", "qk_norm", "qkv_bias")

METADATA_KEYS = {
    "embed": "llama.embedding_length",
    "mlp": "llama.feed_forward_length",
    "layers": "llama.block_count",
    "heads": "llama.attention.head_count",
    "kv_heads": "llama.attention.head_count_kv",
    "rope_theta": "llama.rope.freq_base",
    "norm_eps": "llama.attention.layer_norm_rms_epsilon",
}

# Known keys that say nothing about the computation, or that are checked.
OTHER_KEYS = {
    "llama.context_length", "llama.vocab_size", "llama.rope.dimension_count",
    "llama.attention.key_length", "llama.attention.value_length"}


@dataclasses.dataclass(frozen=True)
class GGUFFile:
  """A parsed file. Tensors stay on disk (memory-mapped) until they are read.

  Attributes:
    path: where it was read from.
    metadata: every key of the file, as Python values and lists.
    tensors: by name, as the `gguf` package describes them.
  """

  path: Path
  metadata: dict[str, Any]
  tensors: dict[str, gguf.ReaderTensor]

  def shape(self, name: str) -> tuple[int, ...]:
    """Row-major: `[out, in]` of a projection. GGUF writes it reversed."""
    return tuple(int(size) for size in reversed(self.tensors[name].shape))

  def tensor(self, name: str) -> np.ndarray:
    """One tensor, dequantised to float32.

    Raises:
      ValueError: the `gguf` package cannot dequantise its type.
    """
    tensor = self.tensors[name]
    try:
      return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(
          f"{self.path}: tensor {name} is {tensor.tensor_type.name}, which the "
          "gguf package cannot dequantise. Use a file of another "
          "quantisation, such as Q8_0 or F16.") from error


def read(path: str | Path) -> GGUFFile:
  """Parses a GGUF file; a few seconds, since vocabularies are long.

  Raises:
    ValueError: the path is not a file, or not one in the GGUF format.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f"{path} is not a file; a GGUF file is needed.")
  try:
    reader = gguf.GGUFReader(path)
  except (ValueError, IndexError, KeyError) as error:
    raise ValueError(
        f"{path} cannot be read as a GGUF file ({error}). It may be cut "
        "short, or in another format.") from error
  metadata = {
      name: field.contents() for name, field in reader.fields.items()}
  return GGUFFile(path, metadata, {t.name: t for t in reader.tensors})


def model_config(file: GGUFFile) -> ModelConfig:
  """The shape of the model in a file; compute fields keep their defaults.

  Raises:
    ValueError: another architecture, metadata that is missing, or metadata
      that asks for something the model does not do.
  """
  metadata, path = file.metadata, file.path
  architecture = metadata.get("general.architecture")
  if architecture != ARCHITECTURE:
    raise ValueError(
        f"{path} holds the architecture {architecture!r}; this reader knows "
        f"{ARCHITECTURE!r} only.")
  missing = [key for key in METADATA_KEYS.values() if key not in metadata]
  if "token_embd.weight" not in file.tensors:
    missing.append("token_embd.weight (a tensor)")
  if missing:
    raise ValueError(f"{path} lacks {', '.join(missing)}.")
  known = OTHER_KEYS | set(METADATA_KEYS.values())
  unknown = {
      key: value for key, value in metadata.items()
      if key.startswith("llama.") and key not in known}
  if unknown:
    raise ValueError(
        f"{path} asks for what this model does not do: {unknown}.")
  fields = {name: metadata[key] for name, key in METADATA_KEYS.items()}
  for name in ("rope_theta", "norm_eps"):
    # Stored as float32: 9.999999747378752e-06 is 1e-05 again.
    fields[name] = float(str(np.float32(fields[name])))
  head_dim = metadata.get(
      "llama.attention.key_length", fields["embed"] // fields["heads"])
  for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
    if metadata.get(key, head_dim) != head_dim:
      raise ValueError(
          f"{path} has {key}={metadata[key]}; this model needs it to be the "
          f"width of a head, {head_dim}.")
  return ModelConfig(
      vocab_size=file.shape("token_embd.weight")[0], head_dim=head_dim,
      tied_embeddings="output.weight" not in file.tensors, **fields)


def check_config(file: GGUFFile, config: ModelConfig) -> None:
  """Raises ValueError naming every field in which file and config differ."""
  found = model_config(file)
  differences = [
      f"{name} is {getattr(found, name)} in the file and "
      f"{getattr(config, name)} in the config"
      for name in SHAPE_FIELDS
      if getattr(found, name) != getattr(config, name)]
  if differences:
    raise ValueError(
        f"{file.path} does not hold the configured model: "
        f"{'; '.join(differences)}. Change model or model_overrides.")


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a parameter comes from, one layer of it (or all, without layers).

  Attributes:
    name: of the tensor, with `{layer}` where it belongs to a block.
    shape: row-major, in the file.
    convert: from that shape to the parameter's, without its layer axis.
  """

  name: str
  shape: tuple[int, ...]
  convert: Callable[[np.ndarray], np.ndarray] = lambda w: w


def undo_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
  """[heads * H, D] rows for interleaved RoPE -> rows for half-split RoPE.

  The converter's `permute` splits the H rows of each head in two halves and
  interleaves them; here row 2i goes back to i and row 2i + 1 to H/2 + i.
  """
  rows, width = weight.shape
  pairs = weight.reshape(heads, rows // heads // 2, 2, width)
  return pairs.swapaxes(1, 2).reshape(rows, width)


def parameter_sources(config: ModelConfig) -> dict[str, Source]:
  """For every parameter path of the model, the tensor that holds it."""
  c = config
  q_rows, kv_rows = c.heads * c.head_dim, c.kv_heads * c.head_dim
  heads, kv = (c.kv_heads, c.groups, c.head_dim), (c.kv_heads, c.head_dim)
  pad = ((0, c.padded_vocab_size - c.vocab_size), (0, 0))
  block = lambda name: f"blk.{{layer}}.{name}.weight"
  transposed = lambda w: w.T
  sources = {
      "embedding": Source(
          "token_embd.weight", (c.vocab_size, c.embed),
          lambda w: np.pad(w, pad)),
      "final_norm": Source("output_norm.weight", (c.embed,)),
      "blocks/attn_norm": Source(block("attn_norm"), (c.embed,)),
      "blocks/mlp_norm": Source(block("ffn_norm"), (c.embed,)),
      "blocks/q": Source(
          block("attn_q"), (q_rows, c.embed),
          lambda w: undo_permutation(w, c.heads).T.reshape(c.embed, *heads)),
      "blocks/k": Source(
          block("attn_k"), (kv_rows, c.embed),
          lambda w: undo_permutation(w, c.kv_heads).T.reshape(c.embed, *kv)),
      "blocks/v": Source(
          block("attn_v"), (kv_rows, c.embed),
          lambda w: w.T.reshape(c.embed, *kv)),
      "blocks/o": Source(
          block("attn_output"), (c.embed, q_rows),
          lambda w: w.T.reshape(*heads, c.embed)),
      "blocks/gate": Source(block("ffn_gate"), (c.mlp, c.embed), transposed),
      "blocks/up": Source(block("ffn_up"), (c.mlp, c.embed), transposed),
      "blocks/down": Source(block("ffn_down"), (c.embed, c.mlp), transposed),
  }
  if not c.tied_embeddings:
    sources["head"] = Source(
        "output.weight", (c.vocab_size, c.embed), lambda w: np.pad(w, pad).T)
  return sources


def check_tensors(file: GGUFFile, config: ModelConfig) -> None:
  """Raises one ValueError with all missing, unexpected, mis-shaped tensors."""
  expected = {
      name: source.shape for source in parameter_sources(config).values()
      for name in layer_names(source, config.layers)}
  faults = [f"missing: {name} {list(shape)}"
            for name, shape in expected.items() if name not in file.tensors]
  for name in file.tensors:
    if name not in expected:
      faults.append(f"unexpected: {name} {list(file.shape(name))}")
    elif file.shape(name) != expected[name]:
      faults.append(
          f"mis-shaped: {name} is {list(file.shape(name))} and should be "
          f"{list(expected[name])}")
  if faults:
    raise ValueError(
        f"{file.path} does not hold the {len(expected)} tensors of the "
        "configured model:\n  " + "\n  ".join(faults))


def layer_names(source: Source, layers: int) -> list[str]:
  if "{layer}" not in source.name:
    return [source.name]
  return [source.name.format(layer=layer) for layer in range(layers)]


def read_parameter(
    file: GGUFFile, source: Source, layers: int, dtype: np.dtype,
) -> np.ndarray:
  """One whole parameter on the host, its layers dequantised one by one."""
  if "{layer}" not in source.name:
    return source.convert(file.tensor(source.name)).astype(dtype, copy=False)
  names = layer_names(source, layers)
  first = source.convert(file.tensor(names[0]))
  stacked = np.empty((layers, *first.shape), dtype)
  stacked[0] = first
  for layer, name in enumerate(names[1:], start=1):
    stacked[layer] = source.convert(file.tensor(name))
  return stacked


def parameters(
    file: GGUFFile, config: ModelConfig, *, dtype: str = "float32",
) -> Iterator[tuple[str, np.ndarray]]:
  """Paths and whole host arrays, one at a time.

  Args:
    file: a file whose shape is the config's.
    config: of the model to fill.
    dtype: of the arrays: "float32" for parameters that are trained.

  Raises:
    ValueError: the file holds another model, or other tensors.
  """
  check_config(file, config)
  check_tensors(file, config)
  for path, source in parameter_sources(config).items():
    yield path, read_parameter(
        file, source, config.layers, jnp.dtype(dtype))


def load(
    file: GGUFFile, config: ModelConfig, *, dtype: str = "float32",
) -> transformer.Transformer:
  """The model with the file's weights, sharded over the current mesh.

  One parameter at a time is whole on the host: for SmolLM2-135M at most the
  113 MB of the embedding table, beside what is already on the devices.

  Args, Raises: see `parameters`.
  """
  layout = transformer.to_dict(transformer.abstract(config))
  tree: dict[str, Any] = {}
  for path, array in parameters(file, config, dtype=dtype):
    *parents, leaf = path.split("/")
    place, node = layout, tree
    for name in parents:
      place, node = place[name], node.setdefault(name, {})
    node[leaf] = put_like(array, place[leaf])
  return transformer.from_dict(config, tree)


def put_like(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
  """A global array, laid out as an abstract one of the same shape."""
  assert array.shape == like.shape, (array.shape, like.shape)
  sharding = NamedSharding(jax.sharding.get_mesh(), like.sharding.spec)
  return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index])
