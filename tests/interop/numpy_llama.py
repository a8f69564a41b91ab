"""The Llama architecture in NumPy, read from a GGUF file as llama.cpp does.

Independent of the package: it keeps the file's own tensor names, its row order
of the q and k projections, and the interleaved rotary embedding (pairs of
neighbouring dimensions) that this order is made for. Nothing is undone, so
that an import which undoes it can be compared.

  T: tokens of this call    S: tokens so far    N, K: query and kv heads
"""

import gguf
import numpy as np


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate_pairs(x: np.ndarray, positions: np.ndarray, base: float):
  """[T, heads, H]: turns (x[2i], x[2i + 1]) by positions * base ** (-2i/H)."""
  size = x.shape[-1]
  frequency = base ** (-np.arange(0, size, 2, dtype=np.float64) / size)
  angle = positions[:, None, None] * frequency  # [T, 1, H / 2]
  cos, sin = np.cos(angle), np.sin(angle)
  even, odd = x[..., 0::2], x[..., 1::2]
  out = np.empty_like(x)
  out[..., 0::2] = even * cos - odd * sin
  out[..., 1::2] = even * sin + odd * cos
  return out


class NumpyLlama:
  """Weights in float32 and a growing cache of keys and values."""

  def __init__(self, path):
    reader = gguf.GGUFReader(path)
    get = lambda key: reader.fields[f"llama.{key}"].contents()
    self.layers = get("block_count")
    self.heads = get("attention.head_count")
    self.kv_heads = get("attention.head_count_kv")
    self.base = get("rope.freq_base")
    self.eps = get("attention.layer_norm_rms_epsilon")
    self.weights = {
        tensor.name.removesuffix(".weight"):
            gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors}
    self.reset()

  def reset(self):
    self.cache = [None] * self.layers

  def project(self, x, name, heads):
    return (x @ self.weights[name].T).reshape(len(x), heads, -1)

  def attend(self, x: np.ndarray, layer: int, start: int) -> np.ndarray:
    positions = np.arange(start, start + len(x))
    q = self.project(x, f"blk.{layer}.attn_q", self.heads)
    k = self.project(x, f"blk.{layer}.attn_k", self.kv_heads)
    v = self.project(x, f"blk.{layer}.attn_v", self.kv_heads)
    q = rotate_pairs(q, positions, self.base)
    k = rotate_pairs(k, positions, self.base)
    if start:
      k = np.concatenate([self.cache[layer][0], k])
      v = np.concatenate([self.cache[layer][1], v])
    self.cache[layer] = k, v
    future = np.arange(len(k))[None] > positions[:, None]  # [T, S]
    out = []
    for head in range(self.heads):
      shared = head // (self.heads // self.kv_heads)
      scores = q[:, head] @ k[:, shared].T / np.sqrt(q.shape[-1])
      scores = np.where(future, -np.inf, scores)
      weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
      weights /= weights.sum(axis=-1, keepdims=True)
      out.append(weights.astype(np.float32) @ v[:, shared])
    return np.concatenate(out, axis=-1) @ (
        self.weights[f"blk.{layer}.attn_output"].T)

  def __call__(self, tokens, start: int = 0) -> np.ndarray:
    """Logits [T, V] of `tokens` that follow `start` tokens already seen."""
    w = self.weights
    x = w["token_embd"][np.asarray(tokens)]
    for layer in range(self.layers):
      block = f"blk.{layer}."
      x = x + self.attend(
          rms_norm(x, w[block + "attn_norm"], self.eps), layer, start)
      h = rms_norm(x, w[block + "ffn_norm"], self.eps)
      gate = h @ w[block + "ffn_gate"].T
      h = gate / (1 + np.exp(-gate)) * (h @ w[block + "ffn_up"].T)
      x = x + h @ w[block + "ffn_down"].T
    head = w.get("output", w["token_embd"])  # Tied where there is none.
    return rms_norm(x, w["output_norm"], self.eps) @ head.T

  def greedy(self, tokens, num_tokens: int, stop_ids=()) -> list[int]:
    """The argmax continuation; a stop id is kept and ends it."""
    self.reset()
    logits, seen, out = self(tokens), len(tokens), []
    while True:
      out.append(int(logits[-1].argmax()))
      if len(out) == num_tokens or out[-1] in stop_ids:
        return out
      logits, seen = self(out[-1:], seen), seen + 1
