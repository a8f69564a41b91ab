"""Maps tensors of a released file to parameters of the model, and back.

A release holds projections as [out, in], one tensor per layer; the model has
them as [L, in..., out...], with heads split and the vocabulary padded. A format
gives a table of names; the conversion is the same for all formats.

One layer of one parameter is on the host at a time, and each host reads the
parts of its own devices only: a file that is mapped into memory is read where a
device needs it.

  L: layers  D: embed  F: mlp  K: kv heads  G: query heads per kv head
  H: head_dim  V: vocab
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding

from posttrain import sharding
from posttrain.model import transformer
from posttrain.model.config import COMPUTE_FIELDS, ModelConfig

# Fields of a ModelConfig that do not make it another model.
NO_SHAPE = (*COMPUTE_FIELDS, "max_positions", "lora", "quantized")

# Takes the number of tensors that are done, and of all tensors.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Source:
  """Tensors of a parameter: one, one per layer, or one per layer and expert.

  Attributes:
    name: has `{layer}` if it belongs to a block, and `{expert}` if each
      expert's part is a tensor of its own.
    shape: shape of a layer's tensor, or of its experts' tensors together,
      row-major.
    parameter: shape of one layer of the parameter, without padding.
    transposed: the tensor's last two axes are swapped.
    prepare: converts the tensor as it is stored, before anything else.
  """

  name: str
  shape: tuple[int, ...]
  parameter: tuple[int, ...]
  transposed: bool = False
  prepare: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor

  @property
  def by_expert(self) -> bool:
    return "{expert}" in self.name

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Shape of a single tensor."""
    return self.shape[1:] if self.by_expert else self.shape

  def names(self, layer: int) -> tuple[str, ...]:
    """Names the tensors of a layer, by expert; the one without layers."""
    name = self.name.replace("{layer}", str(layer))
    experts = range(self.shape[0] if self.by_expert else 1)
    return tuple(name.replace("{expert}", str(expert)) for expert in experts)

  def to_parameter(self, tensors: Sequence[np.ndarray]) -> "Stack | np.ndarray":
    """Converts tensors to the model's layout: views, wherever `prepare` gives
    one.
    """
    shape = self.parameter[1:] if self.by_expert else self.parameter

    def view(tensor):
      tensor = self.prepare(tensor)
      if self.transposed:
        tensor = tensor.swapaxes(-1, -2)
      return tensor.reshape(shape)

    views = [view(tensor) for tensor in tensors]
    return Stack(views) if self.by_expert else views[0]

  def to_tensors(self, parameter: np.ndarray) -> Iterator[np.ndarray]:
    """Converts back, for a format that is written, which has no `prepare`."""
    parameter = parameter[tuple(map(slice, self.parameter))]  # Drops padding.
    *experts, rows, columns = self.shape if self.transposed else (0, 0)
    whole = (parameter.reshape(*experts, columns, rows).swapaxes(-1, -2)
             if self.transposed else parameter.reshape(self.shape))
    yield from whole if self.by_expert else (whole,)


@dataclasses.dataclass(frozen=True)
class Stack:
  """Stacks arrays along a new first axis; reads only the parts asked for."""

  parts: Sequence[np.ndarray]

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    first, *rest = index
    return np.stack([part[tuple(rest)] for part in self.parts[first]])


def table(
    config: ModelConfig, names: Mapping[str, str], block: str,
) -> dict[str, Source]:
  """Maps every parameter path of the model to the tensors that hold it.

  Args:
    config: the model's shape.
    names: names of tensors, by the last part of the parameter's path; without
      the prefix for those of a block.
    block: the prefix, with `{layer}`.

  Raises:
    ValueError: the format has no tensor for a parameter.
  """
  found = _outside(config) | {
      f"blocks/{leaf}": source for leaf, source in _block(config).items()}
  missing = [path for path in found if path.split("/")[-1] not in names]
  if missing:
    raise ValueError(
        f"the format has no tensor for the parameters {', '.join(missing)}.")
  return {
      path: dataclasses.replace(source, name=(
          block if path.startswith("blocks/") else "")
          + names[path.split("/")[-1]])
      for path, source in found.items()}


def _matrix(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Source:
  return Source(
      "", (math.prod(outputs), math.prod(inputs)), (*inputs, *outputs),
      transposed=True)


def _vector(*shape: int) -> Source:
  return Source("", (math.prod(shape),), shape)


def _experts(count: int, inputs: int, outputs: int) -> Source:
  return Source(
      "", (count, outputs, inputs), (count, inputs, outputs), transposed=True)


def _outside(c: ModelConfig) -> dict[str, Source]:
  table = c.vocab_size, c.embed
  sources = {
      "embedding": Source("", table, table), "final_norm": _vector(c.embed)}
  if not c.tied_embeddings:
    sources["head"] = _matrix((c.embed,), (c.vocab_size,))
  return sources


def _block(c: ModelConfig) -> dict[str, Source]:
  width, mlp = (c.embed,), (c.mlp,)
  heads, kv = (c.kv_heads, c.groups, c.head_dim), (c.kv_heads, c.head_dim)
  sources = {
      "q": _matrix(width, heads), "k": _matrix(width, kv),
      "v": _matrix(width, kv), "o": _matrix(heads, width)}
  if c.num_experts:
    sources |= {
        "router": _matrix(width, (c.num_experts,)),
        "gate": _experts(c.num_experts, c.embed, c.mlp),
        "up": _experts(c.num_experts, c.embed, c.mlp),
        "down": _experts(c.num_experts, c.mlp, c.embed)}
  else:
    sources |= {
        "gate": _matrix(width, mlp), "up": _matrix(width, mlp),
        "down": _matrix(mlp, width)}
  if c.qkv_bias:
    sources |= {"q_bias": _vector(*heads), "k_bias": _vector(*kv),
                "v_bias": _vector(*kv)}
  if c.qk_norm == "head":
    sources |= {name: _vector(c.head_dim) for name in ("q_norm", "k_norm")}
  if c.qk_norm == "full":
    sources |= {"q_norm": _vector(*heads), "k_norm": _vector(*kv)}
  norms = []
  if c.norm_placement != "post":
    norms += ["attn_norm", "mlp_norm"]
  if c.norm_placement != "pre":
    norms += ["attn_post_norm", "mlp_post_norm"]
  return sources | {name: _vector(c.embed) for name in norms}


def comparable(config: ModelConfig) -> dict[str, Any]:
  """Returns fields by name, normalised so that equal models have equal fields.

  Fields without effect on the shape are left out, and fields with two spellings
  have one.
  """
  fields = {
      field.name: getattr(config, field.name)
      for field in dataclasses.fields(config)
      if field.name not in NO_SHAPE}
  # Two spellings of one model: a short layer pattern and its repetition, a
  # scale and its default.
  return fields | dict(
      layer_pattern=config.layer_kinds, query_scale=config.attention_scale)


def check_config(found: ModelConfig, wanted: ModelConfig, path: Any) -> None:
  """Raises ValueError with every field in which file and config differ."""
  have, want = comparable(found), comparable(wanted)
  differences = [
      f"{name} is {have[name]} in the file and {want[name]} in the config"
      for name in have if have[name] != want[name]]
  if differences:
    raise ValueError(
        f"{path} does not hold the configured model: "
        f"{'; '.join(differences)}. Change model or "
        "model_overrides, or set model to \"\" for the file's shape.")


def check_tensors(
    found: Mapping[str, tuple[int, ...]], sources: Mapping[str, Source],
    layers: int, path: Any,
) -> None:
  """Raises one ValueError with all missing, unexpected, mis-shaped tensors.

  Args:
    found: shapes by name, row-major.
    sources: the expected tensors.
    layers: the model's number of layers.
    path: names the file or directory in the error.
  """
  expected = shapes(sources, layers)
  faults = [f"missing: {name} {list(shape)}"
            for name, shape in expected.items() if name not in found]
  for name, shape in found.items():
    if name not in expected:
      faults.append(f"unexpected: {name} {list(shape)}")
    elif shape != expected[name]:
      faults.append(
          f"mis-shaped: {name} is {list(shape)} and should be "
          f"{list(expected[name])}")
  if faults:
    raise ValueError(
        f"{path} does not hold the {len(expected)} tensors of the "
        "configured model:\n  " + "\n  ".join(faults))


@dataclasses.dataclass(frozen=True)
class Place:
  """Place of tensors in the model: a layer of a parameter, or all of one.

  Attributes:
    names: names of the tensors that hold it.
    path: the parameter's path.
    layer: None for a parameter without layers.
  """

  names: tuple[str, ...]
  path: str
  layer: int | None


def places(sources: Mapping[str, Source], layers: int) -> list[Place]:
  """Lists all places in order: embedding, layer by layer, the rest.

  A model is computed in this order, and files are mostly written in it.
  """
  found = [
      Place(source.names(layer or 0), path, layer)
      for path, source in sources.items()
      for layer in (range(layers) if "{layer}" in source.name else (None,))]
  return sorted(found, key=lambda place: (
      -1 if place.path == "embedding" else
      layers if place.layer is None else place.layer))


def shapes(
    sources: Mapping[str, Source], layers: int) -> dict[str, tuple[int, ...]]:
  """Lists the shapes of all tensors, in the order of `tensors`."""
  return {name: sources[place.path].tensor_shape
          for place in places(sources, layers) for name in place.names}


def load(
    config: ModelConfig, sources: Mapping[str, Source],
    tensor: Callable[[str], np.ndarray], *, dtype: str,
    order: Callable[[str], Any] | None = None,
    progress: Progress | None = None,
) -> transformer.Transformer:
  """Loads tensors into a model, sharded over the current mesh.

  Args:
    config: the model's shape.
    sources: the tensors of every parameter path.
    tensor: reads a tensor by its name; the same on every host.
    dtype: dtype of the parameters; tensors are rounded to it.
    order: a sort key of names, for a file that is best read in its own order.
    progress: called after every layer of every parameter.
  """
  layout = traverse_util.flatten_dict(
      transformer.to_dict(transformer.abstract(config)), sep="/")
  if layout.keys() != sources.keys():
    raise ValueError(
        f"{sorted(layout.keys() ^ sources.keys())} are parameters of the model "
        "or of the table of tensors, not of both.")
  arrays: dict[str, jax.Array] = {}
  todo = places(sources, config.layers)
  # A mapped file on a network disk is read much faster front to back.
  if order is not None:
    todo.sort(key=lambda place: order(place.names[0]))
  for done, place in enumerate(todo, 1):
    arrays[place.path] = _filled(
        arrays.get(place.path), layout[place.path], place.layer,
        sources[place.path].to_parameter(
            [tensor(name) for name in place.names]), dtype)
    if progress:
      progress(done, len(todo))
  return transformer.from_dict(
      config, traverse_util.unflatten_dict(arrays, sep="/"))


def _filled(
    whole: jax.Array | None, like: jax.ShapeDtypeStruct, layer: int | None,
    value: Stack | np.ndarray, dtype: str,
) -> jax.Array:
  """Returns a parameter with one more of its layers, or with all of it."""
  if layer is None:
    return put_like(value, like, dtype)
  if whole is None:
    whole = jnp.zeros(like.shape, dtype, out_sharding=like.sharding.spec)
  part = put_like(value, jax.eval_shape(lambda w: w[0], like), dtype)
  # Wait, or tensors would pile up on the host: reading is faster than copying
  # to the device.
  return jax.block_until_ready(_set_layer(whole, part, layer))


def put_like(
    array: Stack | np.ndarray, like: jax.ShapeDtypeStruct, dtype: str,
) -> jax.Array:
  """Makes a global array in the layout of an abstract one, padded with zeros.

  Args:
    array: any shape and dtype; only the parts of this host's devices are read.
    like: shape and sharding; no axis is shorter than the array's.
    dtype: dtype of the result.
  """
  def part(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None
    # Always a copy: JAX on CPUs may use NumPy's memory, and a device array must
    # not be a part of a mapped file.
    block = np.zeros([
        len(range(*cut.indices(size)))
        for cut, size in zip(index, like.shape, strict=True)], dtype)
    found = array[index]
    block[tuple(map(slice, found.shape))] = found
    return block

  layout = NamedSharding(jax.sharding.get_mesh(), like.sharding.spec)
  return jax.make_array_from_callback(like.shape, layout, part)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(whole: jax.Array, layer: jax.Array, index: int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(whole, layer, index, 0)


def tensors(
    model: transformer.Transformer, sources: Mapping[str, Source],
    dtype: str,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields names and whole tensors of a model, one at a time, on every host.

  Every process has to take part. Values are rounded to `dtype` on the devices,
  before they are gathered.
  """
  arrays = traverse_util.flatten_dict(transformer.to_dict(model), sep="/")
  for place in places(sources, model.config.layers):
    value = arrays[place.path]
    value = (value.astype(dtype) if place.layer is None
             else _get_layer(value, place.layer, dtype))
    yield from zip(
        place.names, sources[place.path].to_tensors(sharding.fetch(value)),
        strict=True)


@functools.partial(jax.jit, static_argnums=2)
def _get_layer(whole: jax.Array, index: int, dtype: str) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(
      whole, index, keepdims=False).astype(dtype)
