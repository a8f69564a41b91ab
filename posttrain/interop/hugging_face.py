"""Hugging Face directories: reads and writes config.json and safetensors.

  files = read(path)                 headers only; no tensor is read
  config = model_config(files)       the shape, from config.json
  model = load(files, config)        onto the devices of the current mesh
  save(model, path, tokenizer=...)   a directory that transformers loads

Tokenizer and chat template of a directory: `posttrain.text.tokenizer.load`.
"""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from posttrain import sharding
from posttrain.interop import (
    hugging_face_models,
    parameters,
    safetensors_file,
)
from posttrain.interop.parameters import Progress
from posttrain.model import transformer
from posttrain.model.config import ModelConfig
from posttrain.text import token_files
from posttrain.text.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# The text model of a multimodal release: its prefixes, which transformers 4 and
# 5 write differently, and those of tensors for images.
TEXT = {"language_model.model.": "model.", "language_model.lm_head.":
        "lm_head.", "model.language_model.": "model."}
IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.",
          "model.multi_modal_projector.")

DTYPES = ("float32", "bfloat16")  # Dtypes that can be written.
SHARD_BYTES = 5 * 10**9  # Largest file, unless a tensor is larger.

PART = 2**22  # Numbers that are compared at a time.

# Buffers that old releases saved, and that follow from config.json.
DERIVED = ".rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True)
class Files:
  """A release's directory, read up to the headers of its weights.

  Attributes:
    path: the directory.
    config: config.json of the text model.
    tensors: places of the tensors, by their names in a text model.
  """

  path: pathlib.Path
  config: dict[str, Any]
  tensors: dict[str, safetensors_file.Tensor]


def read(path: str | pathlib.Path) -> Files:
  """Reads config.json and the headers of the weights.

  Raises:
    ValueError: there is no such directory or no safetensors in it, an index
      names files elsewhere, or a file is damaged.
  """
  path = pathlib.Path(path).expanduser()
  if not (path / "config.json").is_file():
    raise ValueError(
        f"{path} has no config.json. A directory as transformers saves it is "
        "needed: config.json, *.safetensors and the tokenizer's files."
        + (" It holds an adapter; its base model is needed first."
           if (path / "adapter_config.json").exists() else ""))
  config = _json(path / "config.json")
  tensors = _tensors(path)
  # A multimodal release: its text model is an ordinary one.
  if isinstance(config.get("text_config"), dict):
    quantized = {key: value for key, value in config.items()
                 if key == "quantization_config"}  # Holds for the text model.
    config = config["text_config"] | quantized
    tensors = {
        _text_name(name): tensor for name, tensor in tensors.items()
        if not name.startswith(IMAGES)}
  return Files(path, config, {
      name: tensor for name, tensor in tensors.items()
      if not name.endswith(DERIVED)})


def _text_name(name: str) -> str:
  for prefix, ours in TEXT.items():
    if name.startswith(prefix):
      return ours + name.removeprefix(prefix)
  return name


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is no JSON: {error}.") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path} is no JSON object.")
  return found


def _tensors(path: pathlib.Path) -> dict[str, safetensors_file.Tensor]:
  """Reads the tensors of all shards, by name."""
  if not (path / INDEX).exists():
    return safetensors_file.read_header(_single(path))
  index = _json(path / INDEX).get("weight_map")
  if not isinstance(index, dict) or not all(
      isinstance(name, str) for name in index.values()):
    raise ValueError(f"{path / INDEX} has no weight_map of file names.")
  found: dict[str, safetensors_file.Tensor] = {}
  for name in sorted(set(index.values())):
    _check_shard(path, name)
    found |= safetensors_file.read_header(path / name)
  # An index and shards of two downloads would otherwise mix two models.
  wrong = [name for name in {**index, **found} if name not in index
           or name not in found or found[name].path.name != index[name]]
  if wrong:
    raise ValueError(
        f"{path / INDEX} and the files that it names do not agree on where "
        f"{len(wrong)} tensors are, {wrong[0]} among them. Get both again.")
  return found


def _check_shard(path: pathlib.Path, name: str) -> None:
  """Checks that a shard is a file next to the index, whoever wrote the index.

  The file itself may be a link: caches of downloads are made of links.
  """
  if name != pathlib.PurePath(name).name or "\\" in name or name == "..":
    raise ValueError(
        f"{path / INDEX} names {name!r}, which is not a file in its own "
        "directory. It is not read.")
  if name.endswith(PICKLED):
    raise pickled(path, [name])
  if not (path / name).is_file():
    raise ValueError(
        f"{path / INDEX} names {name}, which is not there. The download may "
        "not have finished.")


def _single(path: pathlib.Path) -> pathlib.Path:
  if (path / SINGLE).exists():
    return path / SINGLE
  found = sorted(path.glob("*.safetensors"))
  if len(found) == 1:
    return found[0]
  if found:
    raise ValueError(
        f"{path} holds {len(found)} *.safetensors files and no {INDEX} that "
        "says which belong together.")
  names = sorted(
      file.name for file in path.iterdir() if file.suffix in PICKLED)
  if names:
    raise pickled(path, names)
  raise ValueError(f"{path} holds no *.safetensors file.")


def pickled(path: pathlib.Path, names: list[str]) -> ValueError:
  """Makes the error for weights that are not read, with the remedy."""
  return ValueError(
      f"{path} holds its weights as {', '.join(names[:3])}: pickled Python, "
      "which can run any program when it is read. It is not read. Use a "
      "release with *.safetensors, or save it anew where you trust it: "
      "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...).")


def model_config(files: Files) -> ModelConfig:
  """Reads the model's shape; compute fields keep their defaults.

  Raises:
    ValueError: config.json asks for what the model does not do.
  """
  return hugging_face_models.model_config(
      files.config, files.path / "config.json")


def load(
    files: Files, config: ModelConfig, *, dtype: str = "float32",
    progress: Progress | None = None,
) -> transformer.Transformer:
  """Loads the files' weights into a model, sharded over the current mesh.

  Shards are read one after the other, and each host reads the parts of its
  devices only. float16 and bfloat16 are converted to `dtype`, which is exact
  for float32.

  Args:
    files: files of a model with the config's shape.
    config: shape of the model.
    dtype: dtype of the parameters; "float32" if they are trained.
    progress: called after every tensor.

  Raises:
    ValueError: the files hold another model, or other tensors.
  """
  parameters.check_config(model_config(files), config, files.path)
  sources = hugging_face_models.table(config)
  tensors = _without_tied_head(files, config)
  parameters.check_tensors(
      {name: tensor.shape for name, tensor in tensors.items()}, sources,
      config.layers, files.path)
  unreadable = [
      f"{name} ({tensor.dtype})" for name, tensor in tensors.items()
      if tensor.dtype not in safetensors_file.DTYPES]
  if unreadable:
    raise ValueError(
        f"{files.path} has tensors of a type that is not read here: "
        f"{', '.join(unreadable)}. "
        f"{', '.join(safetensors_file.DTYPES)} are.")
  return parameters.load(
      config, sources, lambda name: tensors[name].view(), dtype=dtype,
      order=lambda name: (tensors[name].path, tensors[name].offset),
      progress=progress)


def _without_tied_head(
    files: Files, config: ModelConfig) -> dict[str, safetensors_file.Tensor]:
  """Drops a head that is equal to the embedding table it is tied to.

  Raises:
    ValueError: it differs from the table.
  """
  embedding, head = (hugging_face_models.NAMES[leaf]
                     for leaf in ("embedding", "head"))
  tensors = dict(files.tensors)
  if not config.tied_embeddings or not {embedding, head} <= tensors.keys():
    return tensors
  tied = tensors.pop(head)
  if not _equal(tensors[embedding], tied):
    raise ValueError(
        f"{files.path}/config.json says that the head is the embedding table "
        f"(tie_word_embeddings), and {head} differs from {embedding}. Set it "
        "to false there, or take out the tensor that is not meant.")
  return tensors


def _equal(a: safetensors_file.Tensor, b: safetensors_file.Tensor) -> bool:
  """Compares two tensors by parts, so that neither is ever whole in memory."""
  if (a.dtype, a.shape) != (b.dtype, b.shape) or (
      a.dtype not in safetensors_file.DTYPES):
    return False
  rows = max(1, PART // max(1, math.prod(a.shape[1:])))
  return all(
      np.array_equal(a.view()[i:i + rows], b.view()[i:i + rows])
      for i in range(0, a.shape[0], rows))


def save(
    model: transformer.Transformer, path: str | pathlib.Path, *,
    tokenizer: Tokenizer, dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES, progress: Progress | None = None,
) -> None:
  """Writes a directory that transformers loads with no code of ours.

  Every process takes part, as tensors are gathered one at a time, and process 0
  writes, under a temporary name until all is there.

  Args:
    model: a model on the current mesh.
    path: the directory, which must not exist.
    tokenizer: its files and the chat template are written too.
    dtype: dtype of the tensors, "float32" or "bfloat16"; rounded to it.
    shard_bytes: the largest file; several files get an index.
    progress: called after every tensor.

  Raises:
    ValueError: the directory exists, the dtype is another, or no family of
      transformers computes this model.
  """
  path = pathlib.Path(path).absolute()
  if dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r} cannot be written; {DTYPES} can.")
  config = config_json(model.config, tokenizer, dtype)
  if sharding.of_first_host(np.array(path.exists())):
    raise ValueError(
        f"{path} exists, and is not overwritten. Name a new directory.")
  partial = path.with_name(f".{path.name}.partial")
  writes = jax.process_index() == 0
  if writes:
    shutil.rmtree(partial, ignore_errors=True)  # Left by a killed export.
    partial.mkdir(parents=True)
  _write_weights(
      model, partial if writes else None, dtype, shard_bytes, progress)
  if writes:
    tokenizer.save(partial)
    token_files.write_json(partial / "config.json", config)
    token_files.write_json(partial / "generation_config.json", {
        key: value for key, value in config.items()
        if key.endswith("_token_id") and value is not None})
    partial.rename(path)


def config_json(
    config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
  """Makes config.json of a model with this tokenizer; raises as `save`."""
  token = lambda name: tokenizer.controls.get(tokenizer.named.get(name, ""))
  # Null is written too: without the key the family's default id would be used.
  return hugging_face_models.to_json(config) | {
      "torch_dtype": dtype, "bos_token_id": token("bos_token"),
      "eos_token_id": list(tokenizer.stop_ids),
      "pad_token_id": token("pad_token")}


def _write_weights(
    model: transformer.Transformer, path: pathlib.Path | None, dtype: str,
    shard_bytes: int, progress: Progress | None,
) -> None:
  """Writes all shards and their index; `path` is None where nothing is written.
  """
  kind = np.dtype(jax.numpy.dtype(dtype))
  sources = hugging_face_models.table(model.config)
  shapes = parameters.shapes(sources, model.config.layers)
  shards = _shards(shapes, kind.itemsize, shard_bytes)
  files = [SINGLE] if len(shards) == 1 else [
      f"model-{i:05d}-of-{len(shards):05d}.safetensors"
      for i in range(1, len(shards) + 1)]
  # Every process iterates, as each tensor is gathered together; process 0 alone
  # has a writer.
  tensors, done = parameters.tensors(model, sources, dtype), 0
  for file, names in zip(files, shards, strict=True):
    writer = None if path is None else safetensors_file.Writer(
        path / file, {name: shapes[name] for name in names}, kind)
    for name, (found, tensor) in zip(names, tensors, strict=False):
      assert name == found, (name, found)
      if writer:
        writer.write(tensor)
      done += 1
      if progress:
        progress(done, len(shapes))
    if writer:
      writer.close()
  if path is not None and len(shards) > 1:
    token_files.write_json(path / INDEX, {
        "metadata": {"total_size": kind.itemsize * sum(
            map(math.prod, shapes.values()))},
        "weight_map": {name: file for file, names in zip(
            files, shards, strict=True) for name in names}})


def _shards(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, most: int,
) -> list[list[str]]:
  """Splits names, in order, into files of at most `most` bytes."""
  shards: list[list[str]] = [[]]
  size = 0
  for name, shape in shapes.items():
    own = math.prod(shape) * itemsize
    if shards[-1] and size + own > most:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += own
  return shards
