"""Qwen3-MoE against transformers: logits, experts, balance and its gradient.

The weights are copied over here, tensor by tensor, so that no reader of files
stands between the two definitions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.model.config import ModelConfig
from posttrain.objectives import load_balancing
from tests import meshes
from tests.model import build
from tests.parity import releases

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
COEF = 0.3
VOCAB = 640


@functools.cache
def reference(normalize: bool):
  model = releases.model("qwen3-moe", stops=[0])
  for layer in model.model.layers:
    layer.mlp.gate.norm_topk_prob = normalize
  return model


def config_of(model, normalize: bool, form: str) -> ModelConfig:
  c = model.config
  return ModelConfig(
      vocab_size=VOCAB, embed=c.hidden_size, mlp=c.moe_intermediate_size,
      layers=c.num_hidden_layers, heads=c.num_attention_heads,
      kv_heads=c.num_key_value_heads, head_dim=c.head_dim, qk_norm="head",
      rope_theta=1e4, norm_eps=c.rms_norm_eps, tied_embeddings=False,
      num_experts=c.num_experts, experts_per_token=c.num_experts_per_tok,
      normalize_router=normalize, moe=form)


def as_ours(tensors, config: ModelConfig) -> dict:
  """transformers' names and layouts -> ours, of weights or gradients."""
  c = config
  def stack(name, *shape):  # [out, in] -> [L, in, out], folded.
    found = np.stack([tensors[f"model.layers.{layer}.{name}"]
                      for layer in range(c.layers)])
    found = found.swapaxes(-1, -2) if found.ndim > 2 else found
    return found.reshape(c.layers, *shape) if shape else found

  gate_up = stack("mlp.experts.gate_up_proj")  # [L, E, D, 2 F]
  return {
      "embedding": tensors["model.embed_tokens.weight"],
      "final_norm": tensors["model.norm.weight"],
      "head": tensors["lm_head.weight"].T,
      "blocks": {
          "attn_norm": stack("input_layernorm.weight"),
          "mlp_norm": stack("post_attention_layernorm.weight"),
          "q": stack("self_attn.q_proj.weight", c.embed, c.kv_heads, c.groups,
                     c.head_dim),
          "k": stack("self_attn.k_proj.weight", c.embed, c.kv_heads,
                     c.head_dim),
          "v": stack("self_attn.v_proj.weight", c.embed, c.kv_heads,
                     c.head_dim),
          "o": stack("self_attn.o_proj.weight", c.kv_heads, c.groups,
                     c.head_dim, c.embed),
          "q_norm": stack("self_attn.q_norm.weight"),
          "k_norm": stack("self_attn.k_norm.weight"),
          "router": stack("mlp.gate.weight"),
          "gate": gate_up[..., :c.mlp], "up": gate_up[..., c.mlp:],
          "down": stack("mlp.experts.down_proj")}}


def rows():
  """Two rows of 40 ids; the second has 29 and padding."""
  tokens = np.random.default_rng(0).integers(3, VOCAB, (2, 40))
  real = np.arange(40) < np.array([[40], [29]])
  return tokens, np.tile(np.arange(40), (2, 1)), real.astype(int)


@functools.cache
def theirs(normalize: bool):
  """Logits, chosen experts [L, B, T, k], balance, and the whole gradient."""
  model = reference(normalize)
  model.zero_grad()
  tokens, _, real = rows()
  labels = np.where(real > 0, tokens, -100)
  found = model(
      torch.tensor(tokens), attention_mask=torch.tensor(real),
      output_router_logits=True)
  # The same mean over targets as ours: the first of a row is none.
  cross_entropy = torch.nn.functional.cross_entropy(
      found.logits[:, :-1].reshape(-1, VOCAB),
      torch.tensor(labels[:, 1:]).reshape(-1))
  (cross_entropy + COEF * found.aux_loss).backward()
  k = model.config.num_experts_per_tok
  choice = np.stack([
      logits.detach().topk(k)[1].numpy().reshape(2, 40, k)
      for logits in found.router_logits])
  gradient = {name: p.grad.numpy() for name, p in model.named_parameters()}
  return (found.logits.detach().numpy(), choice, found.aux_loss.item(),
          cross_entropy.item(), gradient)


def objective(model, tokens, positions, segment_ids):
  hidden, traffic = model.routed(tokens, positions, segment_ids)
  logits = model.logits(hidden)
  logprobs = jax.nn.log_softmax(logits)[:, :-1]
  hot = jax.nn.one_hot(tokens[:, 1:], VOCAB) * segment_ids[:, 1:, None]
  cross_entropy = -jnp.sum(logprobs * hot) / jnp.sum(segment_ids[:, 1:])
  aux = load_balancing.balance_loss(traffic.load, traffic.mass, traffic.tokens)
  return cross_entropy + COEF * aux, (
      logits, traffic.choice, aux, cross_entropy)


@pytest.mark.parametrize("form,normalize", [
    ("dense", True), ("grouped", True), ("grouped", False)])
def test_everything_is_transformers(form, normalize):
  model = reference(normalize)
  config = config_of(model, normalize, form)
  state = {name: w.detach().numpy() for name, w in model.state_dict().items()}
  with jax.set_mesh(meshes.one()):
    ours = build.load(config, as_ours(state, config))
    (_, (logits, choice, aux, cross_entropy)), grads = jax.jit(
        jax.value_and_grad(objective, has_aux=True))(
            ours, *build.put_rows(*rows()))
    logits, choice, grads = sharding.fetch((logits, choice, grads))
  want, want_choice, want_aux, want_loss, gradient = theirs(normalize)
  real = rows()[2] > 0
  worst = np.abs(logits - want)[real].max()
  print(f"logits differ by {worst:.1e}, of up to {np.abs(want).max():.1f}")
  assert worst < 1e-4
  np.testing.assert_array_equal(
      np.sort(choice[:, real]), np.sort(want_choice[:, real]))
  assert float(aux) == pytest.approx(want_aux, rel=1e-5)
  assert float(cross_entropy) == pytest.approx(want_loss, rel=1e-5)
  build.assert_same_leaves(
      build.transformer.to_dict(grads), as_ours(gradient, config),
      tolerance=1e-4)
