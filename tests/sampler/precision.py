"""Distance of a coarser sampler from the float32 model, token by token.

  python -m tests.sampler.precision     # SmolLM2-135M, 2,000 tokens a case

Tokens that the float32 model has drawn are fed to both, through the cache and
the weights that decoding has: what a token sees of earlier ones is what the
cache holds of them.

  B: rows  T: length  V: vocabulary
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from posttrain import sharding
from posttrain.model import cache as kv
from posttrain.model import lora
from posttrain.model.transformer import Transformer
from posttrain.sampler import budget_tables, sampler, token_sampling
from posttrain.text import thinking
from tests import meshes

CASES = {
    "bfloat16": dict(dtype="bfloat16"),
    "int8 cache": dict(cache_dtype="int8"),
    "int8 weights": dict(weights_dtype="int8"),
    "int8 both": dict(cache_dtype="int8", weights_dtype="int8"),
    "bfloat16, int8 both": dict(
        dtype="bfloat16", cache_dtype="int8", weights_dtype="int8")}
TEXTS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half",
    "Explain in two sentences why the sky is blue, and then list three other",
    "Write a short story about a lighthouse keeper who finds a letter that",
    "The capital of France is Paris. The capital of Germany is Berlin. The",
    "def reverse(text):\n  return text[::-1]\n\n\ndef double(text):\n  return",
    "Dear Sir or Madam, I am writing to complain about the train that I took",
    "Once upon a time there was a small dragon that was afraid of the dark",
    "To make pancakes for four people you need flour, eggs, milk and a little",
    "In 1969 the first people walked on the moon. They stayed for less than",
    "Question: how many days are there in a leap year? Answer: there are 366")


@functools.partial(
    jax.jit, static_argnames=("dtype", "cache_dtype", "weights_dtype"))
def fed(
    model: Transformer, tokens: jax.Array, *, dtype: str = "float32",
    cache_dtype: str = "compute", weights_dtype: str = "compute",
) -> jax.Array:
  """Hidden states [B, T, D] float32 behind tokens [B, T] int32."""
  model = lora.with_config(model, dtype=dtype)
  order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, *_ = model.extend(
      tokens, sharding.shard(order, "rows", None),
      kv.empty(model.config, *tokens.shape, cache_dtype),
      model.unstacked(weights_dtype))
  return hidden.astype(jnp.float32)


@jax.jit
def differences(
    model: Transformer, exact: jax.Array, coarse: jax.Array, tokens: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes logprob differences, and KL(coarse || exact); both [T - 1, B]."""
  def step(_, column):
    exact, coarse, token = column
    logprobs = lambda hidden: jax.nn.log_softmax(
        sharding.shard(model.logits(hidden), "rows", None))
    gaps = logprobs(coarse) - logprobs(exact)
    gap = jnp.take_along_axis(gaps, token[:, None], axis=1)[:, 0]
    return None, (gap, jnp.sum(jnp.exp(logprobs(coarse)) * gaps, axis=1))

  columns = (exact[:, :-1], coarse[:, :-1], tokens[:, 1:])
  return jax.lax.scan(
      step, None, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), columns))[1]


def measure(model: Transformer, tokens: np.ndarray, new: int, **case):
  """Mean and largest difference of a logprob, and the mean KL, in nats.

  Args:
    tokens: [B, T]. new: so many of each row, its last ones, count.
  """
  tokens = sharding.put(tokens.astype(np.int32), "rows", "slots")
  gaps, kl = sharding.fetch(differences(
      model, fed(model, tokens), fed(model, tokens, **case), tokens))
  gaps, kl = np.abs(gaps[-new:]), kl[-new:]
  found = dict(mean=gaps.mean(), max=gaps.max(), kl=kl.mean())
  print(case, f"{gaps.size} tokens:", ", ".join(
      f"{name} {value:.2e}" for name, value in found.items()), flush=True)
  return found


def drawn(model: Transformer, prompts: np.ndarray, new: int) -> np.ndarray:
  """The prompts [B, P], each with `new` tokens behind that it was drawn."""
  vocab_size = model.config.vocab_size
  tables = budget_tables.BudgetTables.of_ids(
      thinking.ThinkingIds(), (), np.zeros(vocab_size, bool))
  rollouts = sampler.Sampler(
      tables=tables,
      params=token_sampling.SamplingParams(temperature=1.0),
      max_prompt_tokens=prompts.shape[1], chunk=new).generate(
          model, prompts.tolist(), sampler.Limits(max_tokens=new),
          prompt_id=range(len(prompts)), seed=0, stage="precision")
  return np.concatenate([prompts, rollouts.tokens], axis=1)


def smollm2() -> tuple[Transformer, np.ndarray]:
  """SmolLM2-135M-Instruct, and `TEXTS` with 200 tokens behind each."""
  from posttrain.interop import gguf, gguf_tokenizer
  from posttrain.interop import smollm2 as release
  from posttrain.model.presets import PRESETS
  tokenizer = gguf_tokenizer.load(release.read())
  tokens = [tokenizer.encode(text) for text in TEXTS]
  prompts = np.array([row[:min(map(len, tokens))] for row in tokens])
  model = gguf.load(release.read(), PRESETS[release.PRESET])
  return model, drawn(model, prompts, 200)


if __name__ == "__main__":
  with jax.set_mesh(meshes.one()):
    weights, sequences = smollm2()
    for each in CASES.values():
      measure(weights, sequences, 200, **each)
