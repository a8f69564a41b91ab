"""LoRA adapters as a directory that `peft` loads onto the base model.

  adapter_config.json          rank, alpha, targets
  adapter_model.safetensors    lora_A [r, in], lora_B [out, r] per layer

The names are those of the decoder layers that all families here share in
transformers. Heads need no reordering: both sides rotate half-split pairs.

  L: layers  r: rank
"""

import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from posttrain import sharding
from posttrain.model.config import INPUT_AXES
from posttrain.model.transformer import Transformer
from posttrain.text import token_files

MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj"}


def config(model: Transformer, base: str) -> dict[str, Any]:
  """Makes the content of adapter_config.json.

  Args:
    model: a model with adapters.
    base: name or directory of the base model, which `peft` loads.

  Raises:
    ValueError: the model has no adapters.
  """
  lora = model.config.lora
  if lora is None:
    raise ValueError(
        "These weights have no adapters: the stage was trained with "
        "lora.rank=0. Export them whole, without --adapter-of.")
  alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
  return {
      "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
      "base_model_name_or_path": base, "r": lora.rank, "lora_alpha": alpha,
      "use_rslora": lora.rslora, "lora_dropout": 0.0, "bias": "none",
      "fan_in_fan_out": False, "init_lora_weights": True,
      "target_modules": [
          MODULES[name].rpartition(".")[2] for name in lora.targets]}


def tensors(model: Transformer) -> dict[str, np.ndarray]:
  """Gathers float32 arrays by peft's names; the same on every host."""
  assert model.config.lora is not None
  found: dict[str, np.ndarray] = {}
  for name in model.config.lora.targets:
    a, b = sharding.fetch([
        getattr(model.blocks, f"{name}_lora_{x}")[...] for x in "ab"])
    # The axes of inputs (or outputs), such as heads and head_dim, are one axis
    # in transformers.
    rank, cut = a.shape[-1], 1 + INPUT_AXES[name]
    assert a.ndim == cut + 1
    a = a.reshape(len(a), -1, rank).swapaxes(1, 2)  # [L, r, in]
    b = b.reshape(len(b), rank, -1).swapaxes(1, 2)  # [L, out, r]
    for layer in range(len(a)):
      module = f"base_model.model.model.layers.{layer}.{MODULES[name]}"
      found[f"{module}.lora_A.weight"] = np.ascontiguousarray(a[layer])
      found[f"{module}.lora_B.weight"] = np.ascontiguousarray(b[layer])
  return found


def save(model: Transformer, path: str | pathlib.Path, base: str) -> None:
  """Writes the directory, whole or not at all; process 0 alone writes.

  Args:
    path: must not exist.
    base: see `config`.

  Raises:
    ValueError: the model has no adapters, or the path exists.
  """
  contents, arrays = config(model, base), tensors(model)
  path = pathlib.Path(path)
  if path.exists():
    raise ValueError(f"{path} exists; name another directory.")
  if jax.process_index():
    return
  partial = path.with_name(path.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  token_files.write_json(partial / "adapter_config.json", contents)
  safetensors.numpy.save_file(
      arrays, partial / "adapter_model.safetensors", {"format": "pt"})
  partial.rename(path)
