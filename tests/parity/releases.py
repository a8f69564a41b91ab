"""Tiny releases of every family, written by transformers itself.

Random weights in transformers' own classes, saved by `save_pretrained` in
several shards, with the family's tokenizer and chat template beside them.
Sequences of 40 tokens are longer than every sliding window (8) and than the
first context of every stretched RoPE (16).
"""

import json
import pathlib

import pytest

from tests.text import families

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=True,
    attn_implementation="eager")
ROPE = dict(rope_type="default", rope_theta=1e4)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=16)
# From 4B on, Gemma 3 stretches the RoPE of its global layers.
GEMMA3 = dict(
    full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    sliding_attention=ROPE)

# Our name of the family (and of its tokenizer) -> transformers' class, and
# what its shape has beside `SHAPE`. Widths are the smallest that show every
# option of the family, and a gap leaves a key to the family's default.
CASES = {
    "llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "smollm2": ("Llama", dict(rope_parameters=ROPE | dict(rope_theta=1e5))),
    "qwen2.5": ("Qwen2", dict(
        rope_parameters=ROPE, head_dim=None, tie_word_embeddings=False)),
    "qwen3": ("Qwen3", dict(rope_parameters=ROPE)),
    "qwen3-moe": ("Qwen3Moe", dict(
        rope_parameters=ROPE, moe_intermediate_size=32, num_experts=6,
        num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[], tie_word_embeddings=False)),
    "gemma2": ("Gemma2", dict(
        rope_parameters=ROPE, sliding_window=8, query_pre_attn_scalar=32,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": ("Gemma3", dict(
        rope_parameters=GEMMA3, sliding_window=8, query_pre_attn_scalar=32,
        num_hidden_layers=7)),
    "mistral": ("Mistral", dict(
        rope_parameters=ROPE, sliding_window=8, tie_word_embeddings=False)),
    "olmo2": ("Olmo2", dict(
        rope_parameters=ROPE, head_dim=None, num_attention_heads=2,
        tie_word_embeddings=False)),
    "smollm3": ("SmolLM3", dict(
        rope_parameters=ROPE, num_hidden_layers=5,
        no_rope_layers=[1, 1, 1, 0, 1], no_rope_layer_interval=4)),
}
TEXT_CONFIG = {"Gemma3": "Gemma3TextConfig"}
TOKENIZERS = {"qwen3-moe": "qwen3"}


def model(name: str, stops: list[int]):
  """A model of transformers' own, float32, every parameter drawn at random."""
  family, changes = CASES[name]
  options = {key: value for key, value in (SHAPE | changes).items()
             if value is not None}
  config = getattr(
      transformers, TEXT_CONFIG.get(family, f"{family}Config"))(
          vocab_size=640, pad_token_id=None, bos_token_id=None,
          eos_token_id=stops[0], **options)
  torch.manual_seed(0)
  torch.set_num_threads(1)
  found = getattr(transformers, f"{family}ForCausalLM")(config).eval()
  with torch.no_grad():
    for parameter in found.parameters():
      # Norms and biases too; matrices wide enough for attention that is not
      # flat and logits that are not all alike.
      scale = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
      parameter.add_(scale * torch.randn_like(parameter))
  found.generation_config.eos_token_id = stops
  return found


def write(directory: pathlib.Path, name: str):
  """The release as a directory; returns the model that was saved."""
  families.write(directory, TOKENIZERS.get(name, name))
  found = model(name, json.loads(
      (directory / "generation_config.json").read_text())["eos_token_id"])
  found.save_pretrained(directory, max_shard_size="100KB")
  return found


def read(directory: pathlib.Path):
  """Reads a directory with transformers, float32, on eager attention."""
  return transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation="eager").eval()


def logits(found, tokens) -> "torch.Tensor":
  """[B, T, V] of [B, T] ids."""
  return found(torch.tensor(tokens)).logits
