"""A real model. Oracle: a NumPy Llama in llama.cpp's own conventions.

The oracle reads the same 4-bit file; Hugging Face's reader of it agreed with
ours to 1.2e-4 in logits of up to 38 (transformers 5.23, float32, by hand).
"""

import importlib.util
import types

import jax
import numpy as np
import pytest

from posttrain import sharding
from posttrain.interop import gguf, smollm2
from posttrain.model.presets import PRESETS
from posttrain.sampler import budget_tables, sampler, token_sampling
from posttrain.text import render, thinking, tokenizer

QUESTIONS = (
    "What is the capital of France?",
    "What is 3 + 4?",
    "Write a haiku about autumn leaves.",
    "Translate to French: the cat sleeps. 中文 🙂 1234",
)
GREEDY = sampler.Limits(max_tokens=32)


@pytest.fixture(scope="module")
def renderer(smollm2_tokenizer):
  return render.make_renderer(smollm2_tokenizer)


@pytest.fixture(scope="module")
def prompts(renderer):
  return [renderer.prompt_tokens({"prompt": text}) for text in QUESTIONS]


@pytest.fixture(scope="module")
def tables(smollm2_tokenizer):
  return budget_tables.BudgetTables.of_ids(
      thinking.ThinkingIds(), smollm2_tokenizer.stop_ids,
      tokenizer.newline_ends(smollm2_tokenizer))


def make_sampler(tables, temperature: float, chunk: int, max_num_seqs: int = 0):
  return sampler.Sampler(
      tables=tables,
      params=token_sampling.SamplingParams(temperature=temperature),
      max_prompt_tokens=64, chunk=chunk, max_num_seqs=max_num_seqs)


@jax.jit
def model_logits(model, tokens, positions, segment_ids):
  return model.logits(model(tokens, positions, segment_ids))


def logits_of(model, tokens: list[int], length: int) -> np.ndarray:
  """[T, V]; padded to `length`, so that one compilation serves all."""
  row = np.zeros((1, length), np.int32)
  row[0, :len(tokens)] = tokens
  put = lambda x: sharding.put(x.astype(np.int32), "batch", "length")
  positions = np.arange(length)[None]
  segment_ids = positions < len(tokens)
  out = model_logits(model, put(row), put(positions), put(segment_ids))
  return sharding.fetch(out)[0, :len(tokens)]


def test_the_file_holds_the_preset(smollm2_file):
  assert gguf.model_config(smollm2_file) == PRESETS[smollm2.PRESET]


def test_a_prompt_is_what_the_template_says(renderer, prompts):
  assert renderer.tokenizer.decode(prompts[0]) == (
      "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
      "trained by Hugging Face<|im_end|>\n<|im_start|>user\n"
      "What is the capital of France?<|im_end|>\n<|im_start|>assistant\n")


def test_an_answer_and_its_end_of_turn_are_in_the_loss(renderer):
  tokens, mask = renderer.example_tokens(
      {"prompt": "Say <|im_end|>.", "completion": "No, 42."})
  assert renderer.tokenizer.decode(tokens[mask]) == "No, 42.<|im_end|>"
  assert (tokens == renderer.tokenizer.eos_id).sum() == 3  # One each turn.


def test_logits_equal_the_oracle(
    smollm2_model, smollm2_oracle, one_device, prompts):
  worst = 0.0
  for tokens in prompts:
    smollm2_oracle.reset()
    want = smollm2_oracle(tokens)
    with jax.set_mesh(one_device):
      got = logits_of(smollm2_model, tokens, 96)
    worst = max(worst, np.abs(got - want).max())
    np.testing.assert_array_equal(got[-1].argmax(), want[-1].argmax())
  print(f"largest difference in logits: {worst:.2e}")
  # Measured: 1.2e-4 where logits reach 38. A wrong permutation of the q and k
  # rows, or another RoPE base, gives differences above 1.
  assert worst < 5e-4


def test_every_greedy_choice_is_the_oracles(
    smollm2_model, smollm2_oracle, one_device, prompts, tables, renderer):
  """The argmax at each position, given the oracle's 32 tokens before it."""
  for tokens in prompts[0], prompts[2]:
    greedy = smollm2_oracle.greedy(tokens, 32, tables.stop_ids)
    with jax.set_mesh(one_device):
      logits = logits_of(smollm2_model, tokens + greedy, 96)
    choices = logits[len(tokens) - 1:-1].argmax(axis=-1)
    assert choices.tolist() == greedy
    print(renderer.tokenizer.decode(greedy))


@pytest.mark.slow
def test_greedy_sampling_gives_the_oracles_tokens(
    smollm2_model, smollm2_oracle, one_device, prompts, tables, renderer):
  with jax.set_mesh(one_device):
    rollouts = make_sampler(tables, 0.0, 32).generate(
        smollm2_model, prompts, GREEDY, prompt_id=range(len(prompts)), seed=0,
        stage="test")
  for row, tokens in enumerate(prompts):
    assert rollouts.completion(row) == smollm2_oracle.greedy(
        tokens, 32, tables.stop_ids)
  answer = renderer.tokenizer.decode(rollouts.completion(0))
  assert answer == "The capital of France is Paris.<|im_end|>"
  assert rollouts.finish_name(0) == "eos"


def test_a_missing_package_names_the_command(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="make smollm2"):
    smollm2.find()


def test_the_package_is_found_without_importing_it(tmp_path, monkeypatch):
  spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
  with pytest.raises(ValueError, match="0 GGUF files"):
    smollm2.find()
  (tmp_path / "__init__.py").write_text("raise ImportError('imported')")
  (tmp_path / "model.gguf").write_bytes(b"")
  assert smollm2.find() == tmp_path / "model.gguf"


@pytest.mark.slow
def test_eight_devices_hold_the_same_model(
    smollm2_file, smollm2_oracle, prompts):
  with jax.set_mesh(sharding.make_mesh(fsdp=8, tensor=1)):
    model = gguf.load(smollm2_file, PRESETS[smollm2.PRESET])
    assert str(jax.typeof(model.blocks.q[...])) == (
        "float32[30,576@fsdp,3@tensor,3,64]")
    tokens = np.tile(np.array(prompts[0], np.int32), (8, 1))
    put = lambda x: sharding.put(x.astype(np.int32), "batch", "length")
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    got = sharding.fetch(model_logits(
        model, put(tokens), put(positions), put(np.ones_like(tokens))))
  smollm2_oracle.reset()
  want = smollm2_oracle(prompts[0])
  np.testing.assert_allclose(got[0], want, atol=5e-4)
  np.testing.assert_array_equal(got, np.broadcast_to(got[:1], got.shape))


def test_a_mesh_that_splits_a_head_is_an_error(smollm2_file):
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  match = r"kv_heads=3.*mesh\.tensor"
  with jax.set_mesh(mesh), pytest.raises(ValueError, match=match):
    gguf.load(smollm2_file, PRESETS[smollm2.PRESET])


@pytest.mark.slow
@pytest.mark.parametrize("max_num_seqs", [0, 5], ids=["together", "refilled"])
def test_sampler_logprobs_equal_teacher_forced_ones(
    smollm2_model, one_device, renderer, tables, max_num_seqs):
  """Over 2,000 sampled tokens: a correct float32 program is within 4e-5."""
  stories = [
      renderer.prompt_tokens({"prompt": f"Write a long story about {topic}."})
      for topic in ("a dragon and a lighthouse", "the history of bread")]
  with jax.set_mesh(one_device):
    rollouts = make_sampler(tables, 1.0, 256, max_num_seqs).generate(
        smollm2_model, stories, sampler.Limits(max_tokens=256),
        prompt_id=[0, 1], group_size=6, seed=0, stage="test")
    differences = []
    for row, prompt in enumerate(rollouts.prompts):
      completion = rollouts.completion(row)
      logits = logits_of(smollm2_model, prompt + completion, 64 + 256)
      logits = logits[len(prompt) - 1:-1].astype(np.float64)
      normaliser = np.log(np.exp(
          logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
      chosen = logits[np.arange(len(completion)), completion]
      sampled = rollouts.logprobs[row, :len(completion)]
      differences.append(np.abs(chosen - normaliser - sampled))
  differences = np.concatenate(differences)
  print(f"{differences.size} tokens: largest {differences.max():.1e}, "
        f"mean {differences.mean():.1e}")
  assert rollouts.loss_mask.sum() == differences.size >= 2000
  assert differences.max() < 2e-4
  assert differences.mean() < 2e-5


def test_a_closing_is_seen_where_it_merges(smollm2_tokenizer):
  strings = thinking.Thinking(start="<think>", end="</think>")
  ids = thinking.resolve(strings, smollm2_tokenizer)
  tokens = smollm2_tokenizer.encode("so 18 </think> 18")
  assert smollm2_tokenizer.encode(" </")[0] in tokens
  found = thinking.split(tokens, [1] * len(tokens), ids, in_thinking=True)
  assert found.closed and found.thinking.after == (32,)
  assert smollm2_tokenizer.decode(tokens[found.answer.tokens]) == " 18"
