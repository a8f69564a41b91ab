"""Small models of every option, with weights that leave nothing at rest.

`transformer.init` sets norms to one and biases to zero, where a forgotten
norm or bias would not show.
"""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from posttrain import sharding
from posttrain.model import transformer
from posttrain.model.config import ModelConfig, RopeScaling

BASE = dict(
    vocab_size=87, embed=32, mlp=48, layers=2, heads=4, kv_heads=2, head_dim=8)
OPTIONS = {
    "tied": {},
    "untied": dict(tied_embeddings=False),
    "qk_norm": dict(qk_norm="head"),
    "qk_norm_full": dict(qk_norm="full"),
    "post_norms": dict(norm_placement="post"),
    "nope": dict(layer_pattern=("global", "nope")),
    "local": dict(layer_pattern=("local",), sliding_window=5),
    "llama3_rope": dict(rope_scaling=RopeScaling(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_context=16)),
    "gemma": dict(
        layers=3, layer_pattern=("local", "local", "global"), sliding_window=6,
        rope_theta=1e5, rope_local_theta=1e3,
        rope_scaling=RopeScaling("linear", factor=8.0), qk_norm="head",
        norm_placement="both", norm_offset=1.0, embedding_scale=True,
        activation="gelu", attention_softcap=3.0, final_softcap=4.0,
        query_scale=0.3),
    "experts": dict(
        num_experts=8, experts_per_token=3, normalize_router=True, mlp=24,
        qk_norm="head"),
    "experts_grouped": dict(
        num_experts=6, experts_per_token=2, mlp=24, moe="grouped"),
    "qkv_bias": dict(qkv_bias=True),
    "ungrouped": dict(kv_heads=4),
    "multi_query": dict(kv_heads=1),
    "everything": dict(
        tied_embeddings=False, qk_norm="head", qkv_bias=True, rope_theta=1e6,
        norm_eps=1e-3, head_dim=12),
}


def quick_options(*names: str) -> list:
  """All options; those that are not named are marked slow."""
  return [
      name if name in names else pytest.param(name, marks=pytest.mark.slow)
      for name in OPTIONS]


def make_config(**fields) -> ModelConfig:
  return ModelConfig(**(BASE | fields))


def random_params(config: ModelConfig, seed: int = 0) -> dict:
  """Nested dict of float32 NumPy arrays; the padding of tables included."""
  rng = np.random.default_rng(seed)

  def draw(path, like):
    name = path[-1].key
    noise = rng.normal(size=like.shape)
    if "norm" in name:
      return 1 - config.norm_offset + 0.3 * noise
    if "bias" in name:
      return 0.5 * noise
    # Twice the usual scale: attention that is not flat.
    fan_in = {"o": config.heads * config.head_dim, "down": config.mlp}
    return 2 * noise * fan_in.get(name, config.embed) ** -0.5

  params = jax.tree_util.tree_map_with_path(
      draw, transformer.to_dict(transformer.abstract(config)))
  return jax.tree.map(lambda w: w.astype(np.float32), params)


def load(config: ModelConfig, params: dict) -> transformer.Transformer:
  """A model with these parameters, in its layout on the current mesh."""
  mesh = jax.sharding.get_mesh()
  place = lambda w, like: jax.device_put(
      w, NamedSharding(mesh, like.sharding.spec))
  like = transformer.to_dict(transformer.abstract(config))
  return transformer.from_dict(config, jax.tree.map(place, params, like))


def put_rows(*arrays) -> list[jax.Array]:
  return [
      sharding.put(np.asarray(x, np.int32), "batch", "length") for x in arrays]


@jax.jit
def full_logits(model, tokens, positions, segment_ids):
  """The training program's logits, [B, T, V]."""
  hidden = model(tokens, positions, segment_ids)
  return sharding.shard(
      model.logits(hidden), "batch", None, None)[..., :model.config.vocab_size]


def assert_same_leaves(got, want, tolerance: float = 1e-5) -> None:
  """Equal trees of arrays, relative to the largest entry of each leaf."""
  for (path, a), b in zip(
      jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_allclose(
        np.asarray(b), np.asarray(a), rtol=0,
        atol=tolerance * np.abs(a).max(), err_msg=jax.tree_util.keystr(path))
