"""Released models: GGUF files and Hugging Face directories, in one interface.

  files = read(path)        a Hugging Face directory, or a GGUF file
  config = model_config(files)
  tokenizer = tokenizer(files)
  model = load(files, config)
"""

import pathlib

from posttrain.interop import gguf, gguf_tokenizer, hugging_face
from posttrain.interop.parameters import Progress
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.text import tokenizer as tokenizer_lib
from posttrain.text.tokenizer import Tokenizer

Release = gguf.GGUFFile | hugging_face.Files


def read(path: str | pathlib.Path) -> Release:
  """Reads a release's config and index of tensors; no tensor is read.

  Raises:
    ValueError: there is no release, or its weights are pickled.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    return hugging_face.read(path)
  # Refused before it is looked for: to unpickle is to run a program.
  if path.suffix in hugging_face.PICKLED:
    raise hugging_face.pickled(path.parent, [path.name])
  if not path.exists():
    raise ValueError(
        f"{path} does not exist; a GGUF file or a directory with config.json "
        "and *.safetensors is needed.")
  if path.suffix == ".safetensors":
    raise ValueError(
        f"{path} is a single file of weights. Name its directory, which has "
        "config.json and the tokenizer too.")
  return gguf.read(path)


def model_config(files: Release) -> ModelConfig:
  """Reads the model's shape; compute fields keep their defaults."""
  if isinstance(files, gguf.GGUFFile):
    return gguf.model_config(files)
  return hugging_face.model_config(files)


def tokenizer(files: Release) -> Tokenizer:
  """Loads the tokenizer, with its chat template."""
  if isinstance(files, gguf.GGUFFile):
    return gguf_tokenizer.load(files)
  return tokenizer_lib.load(
      files.path, vocab_size=model_config(files).vocab_size)


def load(
    files: Release, config: ModelConfig, *, dtype: str = "float32",
    progress: Progress | None = None,
) -> Transformer:
  """Loads the model onto the mesh; see `gguf.load` and `hugging_face.load`."""
  if isinstance(files, gguf.GGUFFile):
    return gguf.load(files, config, dtype=dtype, progress=progress)
  return hugging_face.load(files, config, dtype=dtype, progress=progress)
