"""A released model as a GGUF file, by the rules of llama.cpp's converter.

Tensors come under Hugging Face's names and are stored under those that the
`gguf` package's own table gives them. What the converter does besides:

* Llama and SmolLM3: it permutes the rows of the q and k projections;
* Gemma: it adds 1 to every weight whose name ends in "norm.weight";
* Llama 3's RoPE scaling becomes a tensor, other scalings are metadata;
* a head that is the embedding table is left out.
"""

import math

import gguf
import numpy as np

ARCHITECTURES = {
    "llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma2": "GEMMA2",
    "gemma3": "GEMMA3", "olmo2": "OLMO2", "smollm3": "SMOLLM3",
    "qwen3moe": "QWEN3MOE"}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
  """Rows of a head: the two halves, interleaved."""
  rows = weights.shape[0]
  halves = weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:])
  return halves.swapaxes(1, 2).reshape(weights.shape)


def llama3_divisors(head_dim: int, rope: dict) -> np.ndarray:
  """One frequency at a time, as Meta's `apply_scaling` decides."""
  divisors = []
  low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
  high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
  for i in range(0, head_dim, 2):
    wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
    if wavelength < high:
      divisors.append(1.0)
    elif wavelength > low:
      divisors.append(rope["factor"])
    else:
      smooth = (rope["original_max_position_embeddings"] / wavelength
                - rope["low_freq_factor"]) / (
                    rope["high_freq_factor"] - rope["low_freq_factor"])
      divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
  return np.array(divisors, np.float32)


def convert(
    path, architecture: str, config: dict, tensors: dict[str, np.ndarray], *,
    kinds: dict[str, str] | None = None, metadata: dict | None = None,
) -> None:
  """Writes a file.

  Args:
    path: of the file.
    architecture: llama.cpp's name.
    config: as config.json has it, with `rope_parameters` as in version 5.
    tensors: float32, by Hugging Face's names.
    kinds: stored types of tensors, by the file's names; otherwise F32.
    metadata: further integers.
  """
  writer = gguf.GGUFWriter(path, architecture)
  heads, kv_heads = (
      config["num_attention_heads"], config["num_key_value_heads"])
  head_dim = config.get("head_dim") or config["hidden_size"] // heads
  writer.add_context_length(config["max_position_embeddings"])
  writer.add_embedding_length(config["hidden_size"])
  writer.add_block_count(config["num_hidden_layers"])
  writer.add_feed_forward_length(config["intermediate_size"])
  writer.add_head_count(heads)
  writer.add_head_count_kv(kv_heads)
  writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
  if config.get("head_dim") or architecture.startswith("gemma"):
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
  rope = config["rope_parameters"]
  rope = rope.get("full_attention", rope)
  if architecture != "gemma2":
    writer.add_rope_freq_base(rope["rope_theta"])
  if rope.get("rope_type") == "linear":
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(rope["factor"])
  if rope.get("rope_type") == "llama3":
    writer.add_tensor("rope_freqs.weight", llama3_divisors(head_dim, rope))
  if architecture in ("llama", "smollm3"):
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim)
  if architecture.startswith("gemma"):
    writer.add_sliding_window(config["sliding_window"])
  if architecture == "gemma2":
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
  for key, value in (metadata or {}).items():
    writer.add_uint32(key, value)
  names = gguf.get_tensor_name_map(
      getattr(gguf.MODEL_ARCH, ARCHITECTURES[architecture]),
      config["num_hidden_layers"])
  for name, weights in tensors.items():
    if name == "lm_head.weight" and config["tie_word_embeddings"]:
      continue
    if architecture in ("llama", "smollm3"):
      if name.endswith("q_proj.weight"):
        weights = permute(weights, heads)
      if name.endswith("k_proj.weight"):
        weights = permute(weights, kv_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
      weights = weights + 1
    stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert stored is not None, name
    kind = gguf.GGMLQuantizationType[(kinds or {}).get(stored, "F32")]
    writer.add_tensor(
        stored, gguf.quantize(np.ascontiguousarray(weights), kind),
        raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
