"""GGUF files: metadata, dequantised tensors, and the model from them.

`gguf_file` reads the format, and the `gguf` package dequantises. The meaning of
an architecture's tensors is in `gguf_models`, and its tokenizer in
`gguf_tokenizer`. One tensor at a time is on the host: a layer of a parameter
goes to its place in the stacked arrays on the devices before the next one is
read.
"""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from posttrain.interop import gguf_file, gguf_models, parameters
from posttrain.model import transformer
from posttrain.model.config import ModelConfig


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
  fields = gguf_models.model_fields(file.metadata, file.path)
  if "token_embd.weight" not in file.tensors:
    raise ValueError(f"{file.path} lacks token_embd.weight (a tensor).")
  if gguf_models.ROPE_TENSOR in file.tensors:
    fields["rope_scaling"] = gguf_models.llama3_scaling(
        file.tensor(gguf_models.ROPE_TENSOR), fields["rope_theta"], file.path)
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
  name = gguf_models.architecture(file.metadata, file.path)
  sources = gguf_models.sources(
      config, gguf_models.ARCHITECTURES[name].permuted)
  # The divisors of the frequencies are in the config: `model_config`.
  shapes = {name: tensor.shape for name, tensor in file.tensors.items()
            if name != gguf_models.ROPE_TENSOR}
  parameters.check_tensors(shapes, sources, config.layers, file.path)
  return parameters.load(
      config, sources, file.tensor, dtype=dtype, progress=progress)
