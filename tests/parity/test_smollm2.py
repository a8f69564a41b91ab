"""SmolLM2-135M-Instruct: greedy tokens beside those of transformers.

transformers reads the same GGUF file with its own reader and gets our ids,
because that reader forgets that the tokenizer splits every digit.
"""

import importlib.util

import jax
import numpy as np
import pytest

from posttrain.interop import gguf, gguf_tokenizer, hugging_face, smollm2
from posttrain.model.presets import PRESETS
from posttrain.sampler import budget_tables, sampler, token_sampling
from posttrain.text import render, thinking
from posttrain.text import tokenizer as tokenizer_lib
from tests import meshes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUESTIONS = (
    "What is the capital of France?",
    "What is 3 + 4?",
    "Write a haiku about autumn leaves.",
    "Translate to French: the cat sleeps on the table.",
    "Explain in two sentences why the sky is blue.",
    "List three uses of a brick.",
    "Who wrote Romeo and Juliet?",
    "Natalia sold clips to 48 of her friends in April, and then she sold half "
    "as many clips in May. How many clips did she sell altogether?",
    "Give me a recipe for pancakes.",
    "What does HTTP stand for?",
    "Write a Python function that reverses a string.",
    "Summarise: The quick brown fox jumps over the lazy dog.",
    "What is the boiling point of water in Fahrenheit?",
    "Name the planets of the solar system.",
    "Is 17 a prime number? Answer yes or no, and say why.",
    "Tell me a joke about computers.",
    "How many days are there in a leap year?",
    "中文 🙂 1234: what do you see?",
    "What is the opposite of 'generous'?",
    "Count from 1 to 10.",
)
NEW_TOKENS = 64
NEAR = 1e-3  # Two best logits that are nearer may trade places.

pytestmark = [
    pytest.mark.xdist_group("smollm2"),
    pytest.mark.skipif(
        importlib.util.find_spec(smollm2.MODULE) is None,
        reason="SmolLM2's package is not installed: run `make smollm2`")]


@pytest.fixture(scope="module")
def prompts():
  tokenizer = gguf_tokenizer.load(smollm2.read())
  renderer = render.make_renderer(tokenizer)
  return tokenizer, [
      renderer.prompt_tokens({"prompt": text}) for text in QUESTIONS]


@pytest.fixture(scope="module")
def theirs():
  path = smollm2.find()
  return transformers.AutoModelForCausalLM.from_pretrained(
      path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours():
  with jax.set_mesh(meshes.one()):
    return gguf.load(smollm2.read(), PRESETS[smollm2.PRESET])


def reference(theirs, prompt, stops) -> tuple[np.ndarray, np.ndarray]:
  """Greedy tokens, and how far the second best logit is below each."""
  found = theirs.generate(
      torch.tensor([prompt]), attention_mask=torch.ones((1, len(prompt))),
      do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=list(stops),
      pad_token_id=0, repetition_penalty=1.0, output_logits=True,
      return_dict_in_generate=True)
  best = torch.stack(found.logits)[:, 0].topk(2).values
  return (found.sequences[0, len(prompt):].numpy(),
          (best[:, 0] - best[:, 1]).numpy())


def completions(ours, tokenizer, prompts) -> list[list[int]]:
  none = thinking.ThinkingIds()
  tables = budget_tables.BudgetTables.of_ids(
      none, tokenizer.stop_ids, tokenizer_lib.newline_ends(tokenizer))
  drawn = sampler.Sampler(
      tables=tables,
      params=token_sampling.SamplingParams(temperature=0.0),
      max_prompt_tokens=96, chunk=NEW_TOKENS).generate(
          ours, prompts, sampler.Limits(max_tokens=NEW_TOKENS),
          prompt_id=range(len(prompts)), seed=0, stage="parity")
  return [drawn.completion(row) for row in range(len(prompts))]


def test_greedy_tokens(ours, theirs, prompts):
  tokenizer, ids = prompts
  with jax.set_mesh(meshes.one()):
    got = completions(ours, tokenizer, ids)
  identical = 0
  for question, prompt, tokens in zip(QUESTIONS, ids, got, strict=True):
    want, gaps = reference(theirs, prompt, tokenizer.stop_ids)
    shared = min(len(want), len(tokens))
    differs = np.flatnonzero(want[:shared] != np.array(tokens[:shared]))
    if not differs.size:
      assert len(want) == len(tokens), question
      identical += 1
      continue
    first = differs[0]
    print(f"{question!r} differs at token {first}, where the reference's two "
          f"best logits are {gaps[first]:.1e} apart")
    assert gaps[first] < NEAR, question
  print(f"{identical} of {len(QUESTIONS)} completions are identical")
  assert identical >= 18


def test_the_export_loads_in_transformers(
    ours, theirs, prompts, tmp_path_factory):
  tokenizer, ids = prompts
  output = tmp_path_factory.mktemp("smollm2") / "export"
  with jax.set_mesh(meshes.one()):
    hugging_face.save(ours, output, tokenizer=tokenizer)
  back = transformers.AutoModelForCausalLM.from_pretrained(
      output, dtype=torch.float32).eval()
  read = transformers.AutoTokenizer.from_pretrained(output)
  messages = [{"role": "user", "content": QUESTIONS[0]}]
  assert read.apply_chat_template(
      messages, add_generation_prompt=True, return_dict=False) == ids[0]
  with torch.no_grad():
    got, want = (
        model(torch.tensor([ids[0]])).logits for model in (back, theirs))
  worst = (got - want).abs().max().item()
  print(f"exported and read by transformers: logits differ by {worst:.1e}")
  assert worst < 1e-3
