"""A released model as a GGUF file, read here, against transformers itself.

The file is written by llama.cpp's rules (see `tests.interop.convert_gguf`)
from a tiny model of transformers with random weights. Sequences are longer
than the sliding windows.
"""

import jax
import numpy as np
import pytest

from posttrain import sharding
from posttrain.interop import gguf
from tests.interop import convert_gguf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = dict(
    vocab_size=130, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=True,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
    attn_implementation="eager")
ROPE = dict(rope_type="default", rope_theta=1e4)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=8192)
GEMMA3 = dict(
    full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    sliding_attention=ROPE)

# Architecture, transformers' name of the family, what differs.
CASES = {
    "llama": ("Llama", dict(rope_parameters=ROPE, tie_word_embeddings=False)),
    "llama3": ("Llama", dict(
        rope_parameters=LLAMA3, max_position_embeddings=16_384)),
    "qwen2": ("Qwen2", dict(rope_parameters=ROPE, head_dim=None,
                            num_attention_heads=2)),
    "qwen3": ("Qwen3", dict(rope_parameters=ROPE)),
    "gemma2": ("Gemma2", dict(
        rope_parameters=ROPE, sliding_window=8, query_pre_attn_scalar=16,
        attn_logit_softcapping=0.5, final_logit_softcapping=1.0)),
    "gemma3": ("Gemma3", dict(rope_parameters=GEMMA3, sliding_window=8,
                              query_pre_attn_scalar=16)),
    "olmo2": ("Olmo2", dict(rope_parameters=ROPE, head_dim=None,
                            num_attention_heads=2)),
    "smollm3": ("SmolLM3", dict(rope_parameters=ROPE)),
}
TEXT_CONFIG = {"Gemma3": "Gemma3TextConfig"}


def reference(name: str):
  family, changes = CASES[name]
  options = {key: value for key, value in (SHAPE | changes).items()
             if value is not None}
  config = getattr(
      transformers, TEXT_CONFIG.get(family, f"{family}Config"))(**options)
  torch.manual_seed(0)
  torch.set_num_threads(1)
  model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():  # Norms and biases too.
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


@jax.jit
def model_logits(model, tokens, positions, segment_ids):
  return model.logits(model(tokens, positions, segment_ids))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(tmp_path, name):
  model = reference(name)
  config = model.config.to_dict() | dict(head_dim=getattr(
      model.config, "head_dim", None))
  tensors = {key: value.detach().numpy()
             for key, value in model.state_dict().items()}
  path = tmp_path / "a.gguf"
  architecture = "llama" if name == "llama3" else name
  convert_gguf.convert(path, architecture, config, tensors)
  tokens = np.random.default_rng(0).integers(3, 130, (2, 40))
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.numpy()
  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    file = gguf.read(path)
    ours = gguf.load(file, gguf.model_config(file))
    put = lambda x: sharding.put(x.astype(np.int32), "batch", "length")
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    got = sharding.fetch(model_logits(
        ours, put(tokens), put(positions), put(np.ones_like(tokens))))
  worst = np.abs(got[..., :130] - want).max()
  print(f"{name}: largest difference in logits {worst:.1e}, "
        f"of up to {np.abs(want).max():.1f}")
  assert worst < 1e-4
