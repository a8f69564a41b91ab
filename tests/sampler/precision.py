"""How far a coarser sampler is from the float32 model, token by token.

  python -m tests.sampler.precision     # SmolLM2-135M, 2,000 tokens a case

Both decode side by side and are fed the same tokens, which are drawn from the
coarser one at temperature 1, as in sampling.

  B: rows  N: steps  V: vocabulary
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from posttrain import sharding
from posttrain.model import cache as kv
from posttrain.model import lora
from posttrain.model.transformer import Transformer
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


@functools.partial(jax.jit, static_argnames=(
    "steps", "dtype", "cache_dtype", "weights_dtype"))
def decode_beside(
    model: Transformer, prompts: jax.Array, seed: jax.Array, *, steps: int,
    dtype: str = "float32", cache_dtype: str = "compute",
    weights_dtype: str = "compute",
) -> tuple[jax.Array, jax.Array]:
  """Differences of the drawn token's logprob, and KL(coarse || exact).

  Args:
    model: whose config is of float32. prompts: [B, T] int32, all of length T.

  Returns:
    Both [N, B] float32.
  """
  length = prompts.shape[1]
  models = model, lora.with_config(model, dtype=dtype)
  dtypes = ("compute", "compute"), (cache_dtype, weights_dtype)
  order = jnp.broadcast_to(jnp.arange(length), prompts.shape)
  blocks = [m.unstacked(weights) for m, (_, weights) in zip(
      models, dtypes, strict=True)]

  def begin(model, cache_dtype):
    hidden, cache = model.prefill(
        prompts, sharding.shard(order, "batch", None),
        jnp.ones_like(prompts), cache_dtype)
    return hidden[:, -1], kv.resize(cache, length + steps)

  def step(carry, number):
    exact, coarse = (
        jax.nn.log_softmax(sharding.shard(model.logits(hidden), "batch", None))
        for model, (hidden, _) in zip(models, carry, strict=True))
    key = jax.random.fold_in(jax.random.key(seed), number)
    noise = jax.random.gumbel(key, coarse.shape)
    token = jnp.argmax(coarse + sharding.shard(noise, "batch", None), axis=1)
    gaps = coarse - exact
    gap = jnp.take_along_axis(gaps, token[:, None], axis=1)[:, 0]
    position = jnp.full_like(token, length) + number
    carry = [
        model.decode(token, position, cache, own)[:2]
        for model, own, (_, cache) in zip(models, blocks, carry, strict=True)]
    return carry, (gap, jnp.sum(jnp.exp(coarse) * gaps, axis=1))

  carry = [begin(m, cache) for m, (cache, _) in zip(
      models, dtypes, strict=True)]
  return jax.lax.scan(step, carry, jnp.arange(steps))[1]


def measure(model: Transformer, prompts: np.ndarray, steps: int, **case):
  """Mean and largest difference of a logprob, and the mean KL, in nats."""
  gaps, kl = sharding.fetch(decode_beside(
      model, sharding.put(prompts.astype(np.int32), "batch", "length"),
      np.uint32(0), steps=steps, **case))
  found = dict(mean=np.abs(gaps).mean(), max=np.abs(gaps).max(), kl=kl.mean())
  print(case, f"{gaps.size} tokens:", ", ".join(
      f"{name} {value:.2e}" for name, value in found.items()), flush=True)
  return found


def smollm2() -> tuple[Transformer, np.ndarray]:
  """SmolLM2-135M-Instruct, and `TEXTS`, as long as the shortest."""
  from posttrain.interop import gguf, gguf_tokenizer
  from posttrain.interop import smollm2 as release
  from posttrain.model.presets import PRESETS
  tokenizer = gguf_tokenizer.load(release.read())
  tokens = [tokenizer.encode(text) for text in TEXTS]
  prompts = np.array([row[:min(map(len, tokens))] for row in tokens])
  return gguf.load(release.read(), PRESETS[release.PRESET]), prompts


if __name__ == "__main__":
  with jax.set_mesh(meshes.one()):
    weights, texts = smollm2()
    for each in CASES.values():
      measure(weights, texts, 200, **each)
