"""Adapters in transformers and peft: the live model, and the merged one.

The base goes to transformers as a state dict that is made here, name by name:
what is tested is the adapter.
"""

import json

import jax
import numpy as np
import pytest

from posttrain import convert, sharding
from posttrain import workdir as workdir_lib
from posttrain.interop import peft_adapter
from posttrain.model import lora, transformer
from posttrain.model.config import INPUT_AXES, LoraConfig
from tests import meshes, pipeline_run
from tests.model import build

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CONFIG = build.make_config(vocab_size=128, norm_eps=1e-5)
TOKENS = np.random.default_rng(0).integers(0, 128, (4, 20))


def adapted(how):
  model = lora.add(
      build.load(CONFIG, build.random_params(CONFIG)), how, jax.random.key(0))
  rng = np.random.default_rng(1)
  return jax.tree_util.tree_map_with_path(
      lambda path, w: w + 0.2 * rng.normal(size=w.shape).astype(np.float32)
      if "_lora_b" in jax.tree_util.keystr(path) else w, model)


def to_torch(model):
  """The same Llama in transformers."""
  tree = jax.tree.map(np.asarray, transformer.to_dict(model))
  blocks, names = tree["blocks"], {
      "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
  weights = {"model.embed_tokens.weight": tree["embedding"],
             "model.norm.weight": tree["final_norm"],
             "lm_head.weight": tree["embedding"]}
  for layer in range(CONFIG.layers):
    prefix = f"model.layers.{layer}"
    for ours, theirs in names.items():
      weights[f"{prefix}.{theirs}.weight"] = blocks[ours][layer]
    for name, module in peft_adapter.MODULES.items():
      w = blocks[name][layer]
      inputs = int(np.prod(w.shape[:INPUT_AXES[name]]))
      weights[f"{prefix}.{module}.weight"] = w.reshape(inputs, -1).T
  found = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=128, hidden_size=CONFIG.embed, intermediate_size=CONFIG.mlp,
      num_hidden_layers=CONFIG.layers, num_attention_heads=CONFIG.heads,
      num_key_value_heads=CONFIG.kv_heads, head_dim=CONFIG.head_dim,
      rms_norm_eps=CONFIG.norm_eps, tie_word_embeddings=True,
      rope_parameters=dict(
          rope_type="default", rope_theta=CONFIG.rope_theta),
      attn_implementation="eager")).eval()
  found.load_state_dict(
      {name: torch.tensor(np.array(w)) for name, w in weights.items()})
  return found


def ours(model, tokens=TOKENS):
  positions = np.tile(np.arange(20), (4, 1))
  return sharding.fetch(build.full_logits(
      model, *build.put_rows(tokens, positions, np.ones_like(tokens))))


def theirs(model, tokens=TOKENS):
  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("how", [
    LoraConfig(rank=3, alpha=6.0),
    LoraConfig(rank=4, alpha=5.5, targets=("q", "o", "down"), rslora=True)])
def test_peft_computes_the_live_adapter_and_merges_it_as_we_do(how, tmp_path):
  with jax.set_mesh(meshes.one()):
    model = adapted(how)
    peft_adapter.save(model, tmp_path / "adapter", "base")
    live, plain = ours(model), ours(lora.without(model))
    merged = to_torch(lora.merged(model))
    base = to_torch(lora.without(model))
  np.testing.assert_allclose(theirs(base), plain, rtol=0, atol=1e-4)
  loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
  found = theirs(loaded.eval())
  print(f"worst against peft {np.abs(found - live).max():.1e}, merged "
        f"{np.abs(theirs(merged) - live).max():.1e}; the adapter moves logits "
        f"by up to {np.abs(live - plain).max():.1f}")
  assert np.abs(live - plain).max() > 1
  np.testing.assert_allclose(found, live, rtol=0, atol=1e-4)
  np.testing.assert_allclose(theirs(merged), live, rtol=0, atol=1e-4)
  np.testing.assert_allclose(
      theirs(loaded.merge_and_unload()), theirs(merged), rtol=0, atol=1e-4)


def test_runs_that_train_adapters_are_handed_on(tmp_path):
  """SFT, then GRPO on the same adapters; what the export verb writes."""
  path, outputs = tmp_path / "run", {
      name: tmp_path / name for name in ("base", "merged", "adapter")}
  assignments = ["stages=cold_start,reason", "cold_start.lora.rank=4",
                 "reason.lora.rank=4", "cold_start.learning_rate=0.05"]
  pipeline_run.train(path, assignments)
  config = workdir_lib.open_existing(path).config()
  for name, flags in {
      "base": dict(stage="init"), "merged": {},
      "adapter": dict(adapter_of=str(outputs["base"]))}.items():
    convert.export(config, str(outputs[name]), workdir=str(path), **flags)
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(path, assignments)
    model = run.weights_of("reason")
    assert model.config.lora.rank == 4
    tokens = TOKENS % run.model.vocab_size
    live, plain = ours(model, tokens), ours(run.weights_of("init"), tokens)
  read = lambda name: transformers.AutoModelForCausalLM.from_pretrained(
      outputs[name], dtype=torch.float32).eval()
  base, merged = read("base"), theirs(read("merged"), tokens)
  np.testing.assert_allclose(theirs(base, tokens), plain, rtol=0, atol=1e-4)
  np.testing.assert_allclose(merged, live, rtol=0, atol=1e-4)
  loaded = theirs(peft.PeftModel.from_pretrained(
      base, str(outputs["adapter"])).eval(), tokens)
  print(f"a run's merged export differs by {np.abs(merged - live).max():.1e} "
        f"from the live adapter, that adapter in peft by "
        f"{np.abs(loaded - live).max():.1e}; training moved logits by up to "
        f"{np.abs(live - plain).max():.1f}")
  assert np.abs(live - plain).max() > 0.1
  np.testing.assert_allclose(loaded, live, rtol=0, atol=1e-4)


def test_the_directory_is_whole_and_says_what_it_is_for(tmp_path):
  with jax.set_mesh(meshes.one()):
    model = adapted(LoraConfig(rank=2, targets=("v", "gate")))
    peft_adapter.save(model, tmp_path / "a", "some/base")
    with pytest.raises(ValueError, match="another directory"):
      peft_adapter.save(model, tmp_path / "a", "some/base")
    with pytest.raises(ValueError, match="have no adapters"):
      peft_adapter.save(lora.without(model), tmp_path / "b", "some/base")
  assert [path.name for path in tmp_path.iterdir()] == ["a"]
  found = json.loads((tmp_path / "a/adapter_config.json").read_text())
  assert found["base_model_name_or_path"] == "some/base"
  assert found["target_modules"] == ["v_proj", "gate_proj"]
  assert (found["r"], found["lora_alpha"], found["use_rslora"]) == (
      2, 16, False)
