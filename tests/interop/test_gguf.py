"""Oracle: a NumPy Llama that reads the same tiny file as llama.cpp would."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest

from posttrain import sharding
from posttrain.interop import gguf
from posttrain.model import transformer
from posttrain.model.config import ModelConfig
from posttrain.model.presets import PRESETS
from tests.interop import numpy_llama, tiny_gguf

SHAPE = tiny_gguf.Shape()
QUANTISED = ("token_embd.weight", "blk.0.attn_q.weight", "blk.2.ffn_up.weight")
CONFIG = ModelConfig(
    vocab_size=200, embed=64, mlp=96, layers=3, heads=4, kv_heads=2,
    head_dim=32, rope_theta=10_000.0, norm_eps=1e-5, tied_embeddings=False)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
  tiny_gguf.write(
      path, SHAPE, tiny_gguf.random_tensors(SHAPE), quantised=QUANTISED)
  return path


def one_device():
  return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


@jax.jit
def model_logits(model, tokens, positions, segment_ids):
  return model.logits(model(tokens, positions, segment_ids))


def logits(model, tokens: np.ndarray) -> np.ndarray:
  """[B, T] -> [B, T, V], padding of the vocabulary cut off."""
  put = lambda x: sharding.put(x.astype(np.int32), "batch", "length")
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  out = model_logits(
      model, put(tokens), put(positions), put(np.ones_like(tokens)))
  return sharding.fetch(out)[..., :model.config.vocab_size]


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_an_independent_llama(tmp_path, tied):
  shape = dataclasses.replace(SHAPE, tied=tied)
  path = tmp_path / "tiny.gguf"
  tiny_gguf.write(
      path, shape, tiny_gguf.random_tensors(shape), quantised=QUANTISED)
  tokens = np.random.default_rng(1).integers(0, SHAPE.vocab, (2, 12))
  oracle = numpy_llama.NumpyLlama(path)
  want = []
  for row in tokens:
    oracle.reset()
    want.append(oracle(row))
  with jax.set_mesh(one_device()):
    model = gguf.load(
        gguf.read(path), dataclasses.replace(CONFIG, tied_embeddings=tied))
    got = logits(model, tokens)
  # Logits are of order one; both sides are float32.
  np.testing.assert_allclose(got, want, atol=5e-6)


def test_the_oracles_cache_is_its_own_forward(path):
  tokens = np.random.default_rng(2).integers(0, SHAPE.vocab, 9)
  oracle = numpy_llama.NumpyLlama(path)
  whole = oracle(tokens)
  oracle.reset()
  parts = np.concatenate([oracle(tokens[:5]), oracle(tokens[5:], 5)])
  np.testing.assert_allclose(parts, whole, atol=5e-6)


def test_a_mesh_of_eight_holds_the_same_parameters(path):
  file = gguf.read(path)
  with jax.set_mesh(one_device()):
    one = sharding.fetch(transformer.to_dict(gguf.load(file, CONFIG)))
  with jax.set_mesh(sharding.make_mesh(fsdp=4, tensor=2)):
    model = gguf.load(file, CONFIG)
    assert str(jax.typeof(model.blocks.q[...])) == (
        "float32[3,64@fsdp,2@tensor,2,32]")
    born = transformer.to_dict(transformer.init(CONFIG, 0))
    assert jax.tree.map(jax.typeof, transformer.to_dict(model)) == (
        jax.tree.map(jax.typeof, born))
    eight = sharding.fetch(transformer.to_dict(model))
  jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_heads_are_unpermuted_one_by_one():
  """Rows 2i and 2i + 1 of a permuted head were its rows i and i + H/2."""
  heads, head_dim = 3, 8
  original = np.arange(heads * head_dim, dtype=np.float32)[:, None]
  permuted = np.empty_like(original)
  for head in range(heads):
    for i in range(head_dim // 2):
      row = head * head_dim
      permuted[row + 2 * i] = original[row + i]
      permuted[row + 2 * i + 1] = original[row + i + head_dim // 2]
  np.testing.assert_array_equal(
      gguf.undo_permutation(permuted, heads), original)


def test_padded_vocabulary_rows_are_zero(path):
  with jax.set_mesh(one_device()):
    model = gguf.load(gguf.read(path), CONFIG)
    assert model.embedding.shape == (256, 64)
    assert model.head.shape == (64, 256)
    assert model.embedding[:200].all(axis=1).any()
    assert not model.embedding[200:].any()
    assert not model.head[:, 200:].any()


def test_frozen_parameters_in_bfloat16(path):
  file = gguf.read(path)
  with jax.set_mesh(one_device()):
    model = gguf.load(file, CONFIG, dtype="bfloat16")
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(model)}
  assert dtypes == {"bfloat16"}


def test_the_config_is_in_the_metadata(path):
  assert gguf.model_config(gguf.read(path)) == CONFIG


def test_another_model_is_named_field_by_field(path):
  with pytest.raises(ValueError) as error:
    gguf.load(gguf.read(path), PRESETS["smollm2-135m"])
  for part in ("vocab_size is 200 in the file and 49152 in the config",
               "layers is 3 in the file and 30", "tied_embeddings is False",
               "model_overrides"):
    assert part in str(error.value)


def test_every_faulty_tensor_is_listed(tmp_path):
  tensors = tiny_gguf.random_tensors(SHAPE)
  del tensors["blk.1.attn_k.weight"], tensors["output_norm.weight"]
  tensors["blk.0.attn_q.bias"] = np.ones(16, np.float32)
  tensors["blk.0.ffn_down.weight"] = np.ones((64, 32), np.float32)
  path = tmp_path / "faulty.gguf"
  tiny_gguf.write(path, SHAPE, tensors)
  with pytest.raises(ValueError) as error:
    gguf.load(gguf.read(path), CONFIG)
  for part in ("missing: blk.1.attn_k.weight [64, 64]",
               "missing: output_norm.weight [64]",
               "unexpected: blk.0.attn_q.bias [16]",
               "mis-shaped: blk.0.ffn_down.weight is [64, 32] and should be "
               "[64, 96]"):
    assert part in str(error.value)


def test_what_the_model_does_not_do_is_an_error(tmp_path):
  tensors = tiny_gguf.random_tensors(SHAPE)
  path = tmp_path / "a.gguf"
  tiny_gguf.write(path, SHAPE, tensors, metadata={"llama.expert_count": 4})
  with pytest.raises(ValueError, match=r"llama\.expert_count"):
    gguf.model_config(gguf.read(path))
  path = tmp_path / "b.gguf"
  tiny_gguf.write(path, SHAPE, tensors, architecture="gemma")
  with pytest.raises(ValueError, match=r"'gemma'.*knows llama, qwen2"):
    gguf.model_config(gguf.read(path))


def test_a_file_in_another_format_is_an_error(tmp_path):
  path = tmp_path / "model.gguf"
  with pytest.raises(ValueError, match="is not a file"):
    gguf.read(path)
  path.write_bytes(b"PK\x03\x04" + bytes(64))
  with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
    gguf.read(path)


def test_a_file_that_was_cut_short_is_an_error(path, tmp_path):
  whole = path.read_bytes()
  for length in (0, 30, 3000, len(whole) - 100):
    cut = tmp_path / f"{length}.gguf"
    cut.write_bytes(whole[:length])
    with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
      gguf.read(cut)


def test_one_tensor_at_a_time_is_on_the_host(tmp_path):
  """Arrays of NumPy's, measured; those on the devices are not counted."""
  shape = dataclasses.replace(SHAPE, layers=24, mlp=1024)
  config = dataclasses.replace(CONFIG, layers=24, mlp=1024)
  path = tmp_path / "deep.gguf"
  tensors = tiny_gguf.random_tensors(shape)
  tiny_gguf.write(path, shape, tensors, quantised=tuple(
      name for name, value in tensors.items() if value.ndim == 2))
  file, largest = gguf.read(path), 1024 * 64 * 4
  with jax.set_mesh(one_device()):
    gguf.load(file, config)  # Compiles.
    tracemalloc.start()
    jax.block_until_ready(gguf.load(file, config))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  stacked = 24 * largest
  print(f"peak {peak / largest:.1f} times the largest tensor")
  assert peak < 5 * largest < stacked / 4
