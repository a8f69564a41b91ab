"""The transformer in NumPy float64, one row and one head at a time.

Written from the formulas and not from the package, whose parameter names and
shapes are all that it shares. RMSNorm: arXiv 1910.07467; rotary positions in
the half-split form: arXiv 2104.09864; grouped queries: arXiv 2305.13245, query
head n reading the keys of head n // G; gated SiLU: arXiv 2002.05202.

  T: length  D: embed  H: head_dim  V: vocabulary (true)
"""

import numpy as np


def rms_norm(x, scale, eps):
  return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def rotate(x, positions, theta):
  """[T, H]: the pair (i, i + H/2) as a complex number, turned."""
  half = x.shape[-1] // 2
  frequencies = theta ** (-np.arange(half) / half)
  turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(
      1j * positions[:, None] * frequencies)
  return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax(x):
  weights = np.exp(x - x.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def attention(block, config, x, positions, visible):
  """[T, D] -> [T, D]; `visible` [T, T] says which keys a query may read."""
  def project(name, *head):
    projected = x @ block[name][:, *head]
    if config.qkv_bias:
      projected = projected + block[f"{name}_bias"][head]
    if config.qk_norm and name != "v":
      projected = rms_norm(projected, block[f"{name}_norm"], config.norm_eps)
    if name == "v":
      return projected
    return rotate(projected, positions, config.rope_theta)

  out = 0
  groups = config.heads // config.kv_heads
  for n in range(config.heads):
    k, g = divmod(n, groups)
    scores = project("q", k, g) @ project("k", k).T / config.head_dim**0.5
    weights = softmax(np.where(visible, scores, -np.inf))
    out = out + weights @ project("v", k) @ block["o"][k, g]
  return out


def feed_forward(block, x):
  gate = x @ block["gate"]
  return (gate / (1 + np.exp(-gate)) * (x @ block["up"])) @ block["down"]


def logits(params, config, tokens, positions=None, segment_ids=None):
  """Logits [T, V] of one row without padding.

  Args:
    params: nested dict of arrays, see `transformer.to_dict`.
    tokens, positions, segment_ids: [T]; by default one segment from 0.
  """
  tokens = np.asarray(tokens)
  order = np.arange(len(tokens))
  positions = order if positions is None else np.asarray(positions)
  segments = order * 0 if segment_ids is None else np.asarray(segment_ids)
  visible = (segments[:, None] == segments) & (order[:, None] >= order)
  params = float64(params)
  x = params["embedding"][tokens]
  for layer in range(config.layers):
    block = {name: w[layer] for name, w in params["blocks"].items()}
    normed = rms_norm(x, block["attn_norm"], config.norm_eps)
    x = x + attention(block, config, normed, positions, visible)
    x = x + feed_forward(block, rms_norm(x, block["mlp_norm"], config.norm_eps))
  x = rms_norm(x, params["final_norm"], config.norm_eps)
  head = params["embedding"].T if config.tied_embeddings else params["head"]
  return (x @ head)[:, :config.vocab_size]


def log_softmax(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def float64(params):
  return {
      name: float64(value) if isinstance(value, dict)
      else np.asarray(value, np.float64) for name, value in params.items()}
