"""Directories in and out. Oracles: tensors under their released names, turned
by hand, and files that the `safetensors` package writes and reads.
"""

import json
import pathlib

import hypothesis
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from posttrain import sharding
from posttrain.interop import hugging_face, safetensors_file
from posttrain.model import transformer
from posttrain.model.presets import PRESETS
from tests.interop import releases
from tests.text import build

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16,
          "float16": np.float16}


def release(path, name: str, dtype="float32", shards=1):
  """The directory of a family; its shape and tensors."""
  family, data, config, tensors = releases.released(name)
  family = {"gemma3": "gemma3_text"}.get(family, family)
  releases.write(path, data | dict(model_type=family), tensors,
                 DTYPES[dtype], shards)
  return config, tensors


def load(path, dtype="float32"):
  files = hugging_face.read(path)
  return hugging_face.load(
      files, hugging_face.model_config(files), dtype=dtype)


def host(model) -> dict:
  return sharding.fetch(transformer.to_dict(model))


def bits(array: np.ndarray) -> bytes:
  return np.ascontiguousarray(array).tobytes()


@pytest.fixture(scope="module")
def tokenizer():
  return build.byte_level(["<|end|>"], eos="<|end|>")


@pytest.fixture
def mesh(one_device):
  with jax.set_mesh(one_device):
    yield


@pytest.mark.parametrize("name", releases.CASES)
def test_the_released_numbers_come_in(tmp_path, name, mesh):
  config, tensors = release(tmp_path / "in", name, shards=3)
  files = hugging_face.read(tmp_path / "in")
  assert hugging_face.model_config(files) == config
  found = releases.host_tensors(
      host(hugging_face.load(files, config)), config)
  assert found.keys() == tensors.keys()
  for key, want in tensors.items():
    np.testing.assert_array_equal(found[key], want, err_msg=key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", releases.CASES)
def test_out_and_in_again_is_bit_exact(
    tmp_path, name, dtype, mesh, tokenizer):
  config, tensors = release(tmp_path / "in", name, dtype)
  model = load(tmp_path / "in")  # Trained as float32 whatever the file's.
  hugging_face.save(
      model, tmp_path / "out", tokenizer=tokenizer, dtype=dtype,
      shard_bytes=20_000)
  written = {}
  for file in (tmp_path / "out").glob("*.safetensors"):
    written |= safetensors.numpy.load_file(file)
  assert written.keys() == tensors.keys()
  for key, want in tensors.items():
    assert bits(written[key]) == bits(want.astype(DTYPES[dtype])), key
  again = hugging_face.read(tmp_path / "out")
  assert hugging_face.model_config(again) == config
  for one, two in zip(
      jax.tree.leaves(host(model)),
      jax.tree.leaves(host(hugging_face.load(again, config))), strict=True):
    assert bits(one) == bits(two)


def test_float16_is_exact_in_float32(tmp_path, mesh):
  config, tensors = release(tmp_path / "in", "llama", "float16")
  found = releases.host_tensors(host(load(tmp_path / "in")), config)
  for key, want in tensors.items():
    np.testing.assert_array_equal(found[key], want.astype(np.float16))


def test_frozen_parameters_in_bfloat16(tmp_path, mesh):
  config, tensors = release(tmp_path / "in", "llama")
  found = releases.host_tensors(
      host(load(tmp_path / "in", "bfloat16")), config)
  for key, want in tensors.items():
    assert bits(found[key]) == bits(want.astype(ml_dtypes.bfloat16)), key


@pytest.mark.parametrize("name, sizes", [
    ("llama", dict(fsdp=4, tensor=2)), ("gemma3", dict(fsdp=4, tensor=2)),
    ("qwen3_moe", dict(fsdp=2, tensor=2, expert=2))])
def test_a_mesh_of_eight_reads_and_writes_the_same(
    tmp_path, name, sizes, tokenizer):
  release(tmp_path / "in", name)
  meshes = {
      "one": sharding.make_mesh(1, 1, devices=jax.devices()[:1]),
      "eight": sharding.make_mesh(**sizes)}
  for key, mesh in meshes.items():
    with jax.set_mesh(mesh):
      model = load(tmp_path / "in")
      born = transformer.to_dict(transformer.init(model.config, 0))
      assert jax.tree.map(jax.typeof, transformer.to_dict(model)) == (
          jax.tree.map(jax.typeof, born))
      hugging_face.save(model, tmp_path / key, tokenizer=tokenizer)
  files = [(tmp_path / key / "model.safetensors").read_bytes()
           for key in meshes]
  assert files[0] == files[1]


def test_the_text_model_of_a_release_that_sees(tmp_path, mesh):
  """Both spellings of the prefix; what belongs to the images is left."""
  for prefix, head in (("language_model.model.", "language_model.lm_head."),
                       ("model.language_model.", "lm_head.")):
    config, tensors = release(tmp_path / prefix, "gemma3")
    (tmp_path / prefix / "model.safetensors").unlink()
    renamed = {
        name.replace("model.", prefix, 1).replace("lm_head.", head, 1): value
        for name, value in tensors.items()}
    safetensors.numpy.save_file(
        renamed | {"vision_tower.a": np.ones(3, np.float32),
                   "multi_modal_projector.b": np.ones(3, np.float32)},
        tmp_path / prefix / "model.safetensors")
    file = tmp_path / prefix / "config.json"
    text = json.loads(file.read_text())
    file.write_text(json.dumps(dict(
        model_type="gemma3", text_config=text, mm_tokens_per_image=256,
        vision_config=dict(hidden_size=8))))
    found = releases.host_tensors(host(load(tmp_path / prefix)), config)
    for key, want in tensors.items():
      np.testing.assert_array_equal(found[key], want)
    file.write_text(json.dumps(dict(
        model_type="gemma3", text_config=text, quantization_config={"a": 1})))
    with pytest.raises(ValueError, match="quantization_config"):
      hugging_face.model_config(hugging_face.read(tmp_path / prefix))


def test_every_faulty_tensor_is_listed(tmp_path, mesh):
  _, tensors = release(tmp_path / "in", "llama")
  del tensors["model.layers.1.self_attn.k_proj.weight"]
  del tensors["model.norm.weight"]
  tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(16, np.float32)
  tensors["model.layers.0.mlp.down_proj.weight"] = np.ones((32, 8), np.float32)
  safetensors.numpy.save_file(tensors, tmp_path / "in/model.safetensors")
  with pytest.raises(ValueError) as error:
    load(tmp_path / "in")
  for part in ("missing: model.layers.1.self_attn.k_proj.weight [32, 32]",
               "missing: model.norm.weight [32]",
               "unexpected: model.layers.0.self_attn.q_proj.bias [16]",
               "mis-shaped: model.layers.0.mlp.down_proj.weight is [32, 8] "
               "and should be [32, 48]"):
    assert part in str(error.value)


def test_a_tensor_of_another_type_is_an_error(tmp_path, mesh):
  _, tensors = release(tmp_path / "in", "llama")
  tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)
  safetensors.numpy.save_file(tensors, tmp_path / "in/model.safetensors")
  with pytest.raises(ValueError, match=r"model\.norm\.weight \(I32\)"):
    load(tmp_path / "in")


def test_another_model_is_named_field_by_field(tmp_path, mesh):
  release(tmp_path / "in", "llama")
  with pytest.raises(ValueError) as error:
    hugging_face.load(
        hugging_face.read(tmp_path / "in"), PRESETS["smollm2-135m"])
  for part in ("vocab_size is 130 in the file and 49152 in the config",
               "tied_embeddings is False", "model_overrides"):
    assert part in str(error.value)


def test_a_head_beside_a_tied_table_must_be_that_table(tmp_path, mesh):
  config, tensors = release(tmp_path / "in", "llama3")
  table = tensors["model.embed_tokens.weight"]
  file = tmp_path / "in/model.safetensors"
  # And a buffer of old releases, which config.json implies.
  old = {"model.layers.0.self_attn.rotary_emb.inv_freq":
         np.ones(8, np.float32)}
  safetensors.numpy.save_file(
      tensors | old | {"lm_head.weight": table}, file)
  found = releases.host_tensors(host(load(tmp_path / "in")), config)
  assert found.keys() == tensors.keys()
  safetensors.numpy.save_file(tensors | {"lm_head.weight": table + 1}, file)
  with pytest.raises(ValueError, match="tie_word_embeddings"):
    load(tmp_path / "in")


@pytest.mark.parametrize("name, message", [
    ("../model.safetensors", "not a file in its own directory"),
    ("/etc/passwd", "not a file in its own directory"),
    ("sub/model.safetensors", "not a file in its own directory"),
    ("..", "not a file in its own directory"),
    ("pytorch_model.bin", "pickled Python"),
    ("gone.safetensors", "names gone.safetensors, which is not there"),
])
def test_an_index_names_files_beside_it(tmp_path, name, message):
  release(tmp_path / "in", "llama")
  (tmp_path / "in/model.safetensors").rename(tmp_path / "model.safetensors")
  (tmp_path / "in/model.safetensors.index.json").write_text(
      json.dumps({"weight_map": {"model.norm.weight": name}}))
  with pytest.raises(ValueError, match=message):
    hugging_face.read(tmp_path / "in")


def test_a_download_cache_is_made_of_links(tmp_path, mesh):
  config, _ = release(tmp_path / "in", "llama")
  (tmp_path / "in/model.safetensors").rename(tmp_path / "blob")
  (tmp_path / "in/model.safetensors").symlink_to("../blob")
  assert load(tmp_path / "in").config == config


def test_an_index_that_its_files_deny(tmp_path):
  release(tmp_path / "in", "llama", shards=2)
  file = tmp_path / "in/model.safetensors.index.json"
  index = json.loads(file.read_text())
  for change in (
      {"a": "model-0.safetensors"},
      {"model.norm.weight": "model-0.safetensors"}):
    file.write_text(json.dumps(
        {"weight_map": index["weight_map"] | change}))
    with pytest.raises(ValueError, match="do not agree on where 1 tensors"):
      hugging_face.read(tmp_path / "in")


@pytest.mark.parametrize("name", [
    "pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_not_read(tmp_path, name):
  release(tmp_path / "in", "llama")
  (tmp_path / "in/model.safetensors").rename(tmp_path / "in" / name)
  with pytest.raises(ValueError, match=rf"{name}: pickled Python.*not read"):
    hugging_face.read(tmp_path / "in")


def test_a_directory_without_weights_or_config(tmp_path):
  with pytest.raises(ValueError, match=r"has no config\.json"):
    hugging_face.read(tmp_path)
  (tmp_path / "adapter_config.json").write_text("{}")
  with pytest.raises(ValueError, match="holds an adapter"):
    hugging_face.read(tmp_path)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ValueError, match=r"holds no \*.safetensors"):
    hugging_face.read(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="is no JSON"):
    hugging_face.read(tmp_path)


def test_two_files_without_an_index(tmp_path):
  release(tmp_path / "in", "llama", shards=2)
  (tmp_path / "in/model.safetensors.index.json").unlink()
  with pytest.raises(ValueError, match=r"2 .*files and no model\.safetensors"):
    hugging_face.read(tmp_path / "in")


def test_a_file_that_was_cut_short_or_is_another(tmp_path):
  release(tmp_path / "in", "llama")
  file = tmp_path / "in/model.safetensors"
  whole = file.read_bytes()
  header = int.from_bytes(whole[:8], "little")
  damaged = [whole[:0], whole[:5], whole[:100], whole[:8 + header],
             whole[:-1], whole + b"\0", b"PK\x03\x04" + bytes(64),
             whole[:8] + b"[" + whole[9:],
             whole.replace(b'"F32"', b'"F16"', 1),
             whole.replace(b"[0,", b"[4,", 1)]
  for content in damaged:
    file.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a safetensors"):
      hugging_face.read(tmp_path / "in")
  file.write_bytes(whole)
  hugging_face.read(tmp_path / "in")


@hypothesis.given(position=st.integers(8, 2000), byte=st.integers(0, 255))
@hypothesis.settings(deadline=None, max_examples=200)
def test_a_damaged_header_is_an_error_or_harmless(
    shared_release, position, byte):
  """Never anything but a ValueError, and never a tensor beyond the file."""
  file = shared_release / "model.safetensors"
  content = bytearray(file.read_bytes())
  content[position] = byte
  damaged = shared_release / "damaged"
  damaged.write_bytes(content)
  try:
    tensors = safetensors_file.read_header(damaged)
  except ValueError:
    return
  for tensor in tensors.values():
    if tensor.dtype in safetensors_file.DTYPES:
      values = tensor.view()
      assert tensor.offset + values.nbytes <= len(content)
      values[...].sum()  # Every byte can be read.


@pytest.fixture(scope="module")
def shared_release(tmp_path_factory):
  path = tmp_path_factory.mktemp("shared") / "in"
  release(path, "llama")
  return path


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    tmp_path, mesh, tokenizer, monkeypatch):
  release(tmp_path / "in", "llama")
  model, out = load(tmp_path / "in"), tmp_path / "out"
  out.mkdir()
  with pytest.raises(ValueError, match="exists, and is not overwritten"):
    hugging_face.save(model, out, tokenizer=tokenizer)
  out.rmdir()

  def full(*args):
    raise OSError("no space left")

  with monkeypatch.context() as patch:
    patch.setattr(hugging_face.safetensors_file.Writer, "write", full)
    with pytest.raises(OSError):
      hugging_face.save(model, out, tokenizer=tokenizer)
  assert not out.exists()
  hugging_face.save(model, out, tokenizer=tokenizer)
  assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "out"]


def test_what_cannot_be_written_is_said_first(tmp_path, mesh, tokenizer):
  release(tmp_path / "in", "llama")
  model = load(tmp_path / "in")
  with pytest.raises(ValueError, match="dtype='float16' cannot be written"):
    hugging_face.save(
        model, tmp_path / "out", tokenizer=tokenizer, dtype="float16")
  odd = transformer.init(releases.ModelConfig(
      **releases.BASE | dict(qkv_bias=True, qk_norm="head")), 0)
  with pytest.raises(ValueError, match=r"nearest, qwen., does not have q"):
    hugging_face.save(odd, tmp_path / "out", tokenizer=tokenizer)
  assert not (tmp_path / "out").exists()


def test_the_files_of_a_directory(tmp_path, mesh, tokenizer):
  release(tmp_path / "in", "llama")
  seen = []
  hugging_face.save(
      load(tmp_path / "in"), tmp_path / "out", tokenizer=tokenizer,
      dtype="bfloat16", shard_bytes=30_000,
      progress=lambda done, total: seen.append((done, total)))
  read = lambda name: json.loads((tmp_path / "out" / name).read_text())
  end = tokenizer.eos_id
  assert read("generation_config.json") == {"eos_token_id": [end]}
  config = read("config.json")
  assert config["architectures"] == ["LlamaForCausalLM"]
  assert config["torch_dtype"] == "bfloat16"
  assert config["eos_token_id"] == [end]
  assert config["pad_token_id"] is None
  index = read("model.safetensors.index.json")
  shards = sorted(set(index["weight_map"].values()))
  assert len(shards) > 3
  assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
  sizes = [(tmp_path / "out" / name).stat().st_size for name in shards]
  assert max(sizes) < 30_000 + 2_000  # The header.
  assert index["metadata"]["total_size"] == 2 * sum(
      value.size for value in releases.released("llama")[3].values())
  total = len(index["weight_map"])
  assert seen == [(done, total) for done in range(1, total + 1)]
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert pathlib.Path(tmp_path / "out" / name).exists()
