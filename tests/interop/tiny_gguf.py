"""Writes a tiny Llama as a GGUF file, in llama.cpp's conventions."""

import dataclasses

import gguf
import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
  vocab: int = 200  # Padded to 256 in the model.
  embed: int = 64
  mlp: int = 96
  layers: int = 3
  heads: int = 4
  kv_heads: int = 2
  head_dim: int = 32  # Not embed / heads.
  tied: bool = False


def random_tensors(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
  """Names and row-major float32 arrays; the values are already permuted."""
  rng = np.random.default_rng(seed)
  s = shape
  draw = lambda *size: (
      rng.normal(size=size).astype(np.float32) * size[-1] ** -0.5)
  norm = lambda: 1 + 0.1 * rng.normal(size=s.embed).astype(np.float32)
  q_rows, kv_rows = s.heads * s.head_dim, s.kv_heads * s.head_dim
  tensors = {
      "token_embd.weight": draw(s.vocab, s.embed),
      "output_norm.weight": norm()}
  if not s.tied:
    tensors["output.weight"] = draw(s.vocab, s.embed)
  for layer in range(s.layers):
    tensors |= {f"blk.{layer}.{name}.weight": value for name, value in {
        "attn_norm": norm(), "ffn_norm": norm(),
        "attn_q": draw(q_rows, s.embed), "attn_k": draw(kv_rows, s.embed),
        "attn_v": draw(kv_rows, s.embed), "attn_output": draw(s.embed, q_rows),
        "ffn_gate": draw(s.mlp, s.embed), "ffn_up": draw(s.mlp, s.embed),
        "ffn_down": draw(s.embed, s.mlp)}.items()}
  return tensors


def write(
    path, shape: Shape, tensors: dict[str, np.ndarray], *, quantised=(),
    architecture: str = "llama", metadata: dict[str, int] | None = None,
) -> None:
  """`quantised` names tensors to store as Q8_0; `metadata` adds integers."""
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_block_count(shape.layers)
  writer.add_embedding_length(shape.embed)
  writer.add_feed_forward_length(shape.mlp)
  writer.add_head_count(shape.heads)
  writer.add_head_count_kv(shape.kv_heads)
  writer.add_key_length(shape.head_dim)
  writer.add_value_length(shape.head_dim)
  writer.add_rope_dimension_count(shape.head_dim)
  writer.add_rope_freq_base(10_000.0)
  writer.add_layer_norm_rms_eps(1e-5)
  for key, value in (metadata or {}).items():
    writer.add_uint32(key, value)
  for name, value in tensors.items():
    if name in quantised:
      kind = gguf.GGMLQuantizationType.Q8_0
      writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    else:
      writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
