"""The transformer in NumPy float64, one row and one head at a time.

Written from the formulas and not from the package, whose parameter names and
shapes are all that it shares. RMSNorm: arXiv 1910.07467; rotary positions in
the half-split form: arXiv 2104.09864; grouped queries: arXiv 2305.13245, query
head n reading the keys of head n // G; gated SiLU: arXiv 2002.05202; soft caps,
local layers and norms on both sides: Gemma 2, arXiv 2408.00118; norms over all
heads and after: OLMo 2, arXiv 2501.00656; layers without rotary positions:
arXiv 2501.18795; stretched frequencies: arXiv 2306.15595 (linear) and the Llama
3.1 release; experts: arXiv 2101.03961, k of them as in arXiv 2505.09388.

  T: length  D: embed  H: head_dim  V: vocabulary (true)
"""

import numpy as np


def rms_norm(x, scale, config):
  """Over the last axis, which `scale` flattened has."""
  rms = np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps)
  return x / rms * (config.norm_offset + scale.ravel())


def frequencies(config, kind):
  half = config.head_dim // 2
  theta = config.rope_theta
  if kind == "local" and config.rope_local_theta:
    return config.rope_local_theta ** (-np.arange(half) / half)
  found = theta ** (-np.arange(half) / half)
  scaling = config.rope_scaling
  for i in range(half if scaling else 0):
    if scaling.kind == "linear":
      found[i] /= scaling.factor
      continue
    wavelength = 2 * np.pi / found[i]
    longest = scaling.original_context / scaling.low_freq_factor
    shortest = scaling.original_context / scaling.high_freq_factor
    if wavelength > longest:
      found[i] /= scaling.factor
    elif wavelength > shortest:
      smooth = (scaling.original_context / wavelength
                - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor)
      found[i] *= (1 - smooth) / scaling.factor + smooth
  return found


def cap(x, most):
  return most * np.tanh(x / most) if most else x


def rotate(x, positions, frequencies):
  """[T, H]: the pair (i, i + H/2) as a complex number, turned."""
  half = x.shape[-1] // 2
  turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(
      1j * positions[:, None] * frequencies)
  return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax(x):
  weights = np.exp(x - x.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def attention(block, config, kind, x, positions, visible):
  """[T, D] -> [T, D]; `visible` [T, T] says which keys a query may read."""
  def project(name, *head):
    weight = block[name]
    whole = x @ weight.reshape(len(weight), -1)
    if config.qkv_bias:
      whole = whole + block[f"{name}_bias"].ravel()
    if config.qk_norm == "full" and name != "v":
      whole = rms_norm(whole, block[f"{name}_norm"], config)
    projected = whole.reshape(len(x), *weight.shape[1:])[:, *head]
    if config.qk_norm == "head" and name != "v":
      projected = rms_norm(projected, block[f"{name}_norm"], config)
    if name == "v" or kind == "nope":
      return projected
    return rotate(projected, positions, frequencies(config, kind))

  scale = config.query_scale or 1 / config.head_dim**0.5
  if kind == "local":
    order = np.arange(len(x))
    visible = visible & (
        order[:, None] - order < config.sliding_window)
  out = 0
  groups = config.heads // config.kv_heads
  for n in range(config.heads):
    k, g = divmod(n, groups)
    scores = project("q", k, g) @ project("k", k).T * scale
    scores = cap(scores, config.attention_softcap)
    weights = softmax(np.where(visible, scores, -np.inf))
    out = out + weights @ project("v", k) @ block["o"][k, g]
  return out


def experts(block, config, x):
  """Token by token: [T, D], and the k chosen experts of each."""
  out, chosen = np.zeros_like(x), []
  for token, row in enumerate(x):
    probs = softmax(row @ block["router"])
    best = np.argsort(-probs)[:config.experts_per_token]
    total = probs[best].sum() if config.normalize_router else 1.0
    for expert in best:
      one = {name: block[name][expert] for name in ("gate", "up", "down")}
      out[token] += probs[expert] / total * mlp(one, config, row)
    chosen.append(best)
  return out, np.array(chosen)


def mlp(block, config, x):
  gate = x @ block["gate"]
  if config.activation == "silu":
    gate = gate / (1 + np.exp(-gate))
  else:  # GELU, arXiv 1606.08415, the tanh form.
    gate = gate / 2 * (1 + np.tanh(
        np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
  return (gate * (x @ block["up"])) @ block["down"]


def logits(params, config, tokens, positions=None, segment_ids=None,
           routes=None):
  """Logits [T, V] of one row without padding.

  Args:
    params: nested dict of arrays, see `transformer.to_dict`.
    tokens, positions, segment_ids: [T]; by default one segment from 0.
    routes: a list that is given the chosen experts [T, k] of each layer.
  """
  tokens = np.asarray(tokens)
  order = np.arange(len(tokens))
  positions = order if positions is None else np.asarray(positions)
  segments = order * 0 if segment_ids is None else np.asarray(segment_ids)
  visible = (segments[:, None] == segments) & (order[:, None] >= order)
  params = float64(params)
  x = params["embedding"][tokens]
  if config.embedding_scale:
    x = x * np.sqrt(config.embed)
  for layer in range(config.layers):
    block = {name: w[layer] for name, w in params["blocks"].items()}
    kind = config.layer_pattern[layer % len(config.layer_pattern)]

    def norm(name, x, block=block):
      placed = "post" if "post" in name else "pre"
      if config.norm_placement not in (placed, "both"):
        return x
      return rms_norm(x, block[name], config)

    x = x + norm("attn_post_norm", attention(
        block, config, kind, norm("attn_norm", x), positions, visible))
    read = norm("mlp_norm", x)
    if config.num_experts:
      fed, chosen = experts(block, config, read)
      if routes is not None:
        routes.append(chosen)
    else:
      fed = mlp(block, config, read)
    x = x + norm("mlp_post_norm", fed)
  x = rms_norm(x, params["final_norm"], config)
  head = params["embedding"].T if config.tied_embeddings else params["head"]
  return cap((x @ head)[:, :config.vocab_size], config.final_softcap)


def log_softmax(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def float64(params):
  return {
      name: float64(value) if isinstance(value, dict)
      else np.asarray(value, np.float64) for name, value in params.items()}
