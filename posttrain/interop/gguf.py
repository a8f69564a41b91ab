"""GGUF files: metadata, dequantised tensors, and the one model from them.

The `gguf` package parses the file and dequantises; what an architecture's
tensors mean is in `gguf_models`, and its tokenizer in `gguf_tokenizer`. One
tensor at a time is on the host: a layer of a parameter goes to its place in
the stacked arrays on the devices before the next one is read.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from posttrain.interop import gguf_models
from posttrain.model import transformer
from posttrain.model.config import COMPUTE_FIELDS, ModelConfig


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
  fields = gguf_models.model_fields(file.metadata, file.path)
  if "token_embd.weight" not in file.tensors:
    raise ValueError(f"{file.path} lacks token_embd.weight (a tensor).")
  if gguf_models.ROPE_TENSOR in file.tensors:
    fields["rope_scaling"] = gguf_models.llama3_scaling(
        file.tensor(gguf_models.ROPE_TENSOR), fields["rope_theta"], file.path)
  return ModelConfig(
      vocab_size=file.shape("token_embd.weight")[0],
      tied_embeddings="output.weight" not in file.tensors, **fields)


def check_config(file: GGUFFile, config: ModelConfig) -> None:
  """Raises ValueError naming every field in which file and config differ."""
  found = _comparable(model_config(file))
  wanted = _comparable(config)
  differences = [
      f"{name} is {found[name]} in the file and {wanted[name]} in the config"
      for name in found if found[name] != wanted[name]]
  if differences:
    raise ValueError(
        f"{file.path} does not hold the configured model: "
        f"{'; '.join(differences)}. Change model or model_overrides.")


def _comparable(config: ModelConfig) -> dict[str, Any]:
  """Fields by name; what has no effect, and two ways to say it, are equal."""
  fields = {
      field.name: getattr(config, field.name)
      for field in dataclasses.fields(config)
      if field.name not in COMPUTE_FIELDS}
  return fields | dict(
      layer_pattern=config.layer_kinds, query_scale=config.attention_scale)


def parameter_sources(
    file: GGUFFile, config: ModelConfig) -> dict[str, gguf_models.Source]:
  """For every parameter path of the model, the tensor that holds it."""
  name = gguf_models.architecture(file.metadata, file.path)
  return gguf_models.parameter_sources(
      config, gguf_models.ARCHITECTURES[name].permuted)


def check_tensors(file: GGUFFile, config: ModelConfig) -> None:
  """Raises one ValueError with all missing, unexpected, mis-shaped tensors."""
  expected = {
      name: source.shape
      for source in parameter_sources(file, config).values()
      for name in source.names(config.layers)}
  faults = [f"missing: {name} {list(shape)}"
            for name, shape in expected.items() if name not in file.tensors]
  for name in file.tensors:
    if name == gguf_models.ROPE_TENSOR:
      continue  # It is in the config: `model_config`.
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


def parameters(
    file: GGUFFile, config: ModelConfig, *, dtype: str = "float32",
) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
  """Paths, and for each its host arrays: one, or one per layer.

  Args:
    file: a file whose shape is the config's.
    config: of the model to fill.
    dtype: of the arrays: "float32" for parameters that are trained.

  Raises:
    ValueError: the file holds another model, or other tensors.
  """
  check_config(file, config)
  check_tensors(file, config)
  for path, source in parameter_sources(file, config).items():
    yield path, (
        source.convert(file.tensor(name)).astype(jnp.dtype(dtype), copy=False)
        for name in source.names(config.layers))


def load(
    file: GGUFFile, config: ModelConfig, *, dtype: str = "float32",
) -> transformer.Transformer:
  """The model with the file's weights, sharded over the current mesh.

  One tensor at a time is whole on the host: for SmolLM2-135M at most the
  113 MB of the embedding table, beside what is already on the devices.

  Args, Raises: see `parameters`.
  """
  layout = transformer.to_dict(transformer.abstract(config))
  tree: dict[str, Any] = {}
  for path, arrays in parameters(file, config, dtype=dtype):
    *parents, leaf = path.split("/")
    place, node = layout, tree
    for name in parents:
      place, node = place[name], node.setdefault(name, {})
    place = place[leaf]
    node[leaf] = (stacked(arrays, place, dtype) if parents
                  else put_like(next(arrays), place))
  return transformer.from_dict(config, tree)


def stacked(
    arrays: Iterator[np.ndarray], like: jax.ShapeDtypeStruct, dtype: str,
) -> jax.Array:
  """[L, ...] on the devices, filled layer by layer."""
  layer = jax.eval_shape(lambda w: w[0], like)
  whole = _zeros(like.shape, dtype, like.sharding.spec)
  for index, array in enumerate(arrays):
    whole = _set_layer(whole, put_like(array, layer), index)
  return whole


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: str, layout) -> jax.Array:
  return jnp.zeros(shape, dtype, out_sharding=layout)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(whole: jax.Array, layer: jax.Array, index: int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(whole, layer, index, 0)


def put_like(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
  """A global array, laid out as an abstract one of the same shape."""
  assert array.shape == like.shape, (array.shape, like.shape)
  sharding = NamedSharding(jax.sharding.get_mesh(), like.sharding.spec)
  return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index])
