"""FLOPs against XLA's own count, bytes against real arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks import limits
from benchmarks.limits import Product
from benchmarks.shapes import Shape, shape_of
from posttrain import sharding
from posttrain.model import cache as kv
from posttrain.model import transformer
from posttrain.model.presets import PRESETS

CONFIG = dataclasses.replace(
    PRESETS["tiny"], vocab_size=512, embed=256, mlp=1024,
    layers=2, head_dim=64, unroll=2)


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
    yield


def xla_flops(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def flops(products):
  return limits.Work(products, 0.0).flops


@pytest.mark.parametrize("tied, length", [(True, 32), (False, 128)])
def test_forward_flops_are_those_that_xla_counts(tied, length):
  """The program computes all T x T scores: all keys are seen then."""
  config = dataclasses.replace(CONFIG, tied_embeddings=tied)
  tokens = jax.ShapeDtypeStruct((4, length), jnp.int32)
  counted = xla_flops(
      lambda model, x: model.logits(model(x, x, x)),
      transformer.abstract(config), tokens)
  ours = flops(limits.forward(
      config, rows=4, queries=length, keys=length, logits=4 * length))
  # XLA also counts what is not a product: softmax, norms, rotations.
  assert ours == pytest.approx(counted, rel=0.05) and ours < counted


def test_the_backward_products_are_those_of_a_gradient():
  """XLA counts both of them, of a product with shapes that all differ."""
  product = Product(batch=3, m=16, k=32, n=8)
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((3, 16, 32), (3, 32, 8), (3, 16, 8))]
  counted = xla_flops(
      lambda x, y, dz: jax.vjp(jnp.matmul, x, y)[1](dz), *arrays)
  assert sum(p.flops for p in product.backward) == counted


def test_a_decode_step_reads_the_cache_and_the_weights_once():
  model = transformer.abstract(CONFIG)
  cache = jax.eval_shape(lambda: kv.empty(CONFIG, 6, 32))
  size = lambda tree: sum(4 * x.size for x in jax.tree.leaves(tree))
  norms = size([model.blocks.attn_norm, model.blocks.mlp_norm,
                model.final_norm])
  step = limits.decode_step(CONFIG, rows=6, context=31)
  assert step.bytes == size(cache.layers) + size(model) - norms


def test_an_update_is_three_forward_passes_over_causal_attention():
  update = limits.update(CONFIG, rows=5, length=9)
  # 1 + 2 + ... + 9 = 45 keys for 9 queries, one token at a time.
  forward = sum(flops(limits.forward(
      CONFIG, rows=5, queries=1, keys=keys, logits=5)) for keys in range(1, 10))
  assert update.flops == pytest.approx(3 * forward)


def test_the_middle_step_stands_for_all():
  """Contexts grow by one each step: their mean is the middle one's."""
  shape = Shape(prompts=3, prompt=4, samples=1, new=6)
  _, decode = limits.of(CONFIG, shape)
  steps = [limits.decode_step(CONFIG, rows=3, context=4 + fed)
           for fed in range(5)]
  assert decode.flops == pytest.approx(sum(step.flops for step in steps))
  assert decode.bytes == pytest.approx(sum(step.bytes for step in steps))


def test_a_grpo_step_prefills_a_prompt_once_and_learns_from_each_sample():
  shape = shape_of("grpo")
  prefill, decode, update = limits.of(CONFIG, shape)
  assert prefill.flops == limits.prefill(CONFIG, prompts=8, length=64).flops
  assert decode.flops == pytest.approx(127 * limits.decode_step(
      CONFIG, rows=64, context=127).flops)
  # Every prompt once, and of each completion all but the last token.
  fed, c = 8 * 64 + 64 * 127, CONFIG
  heads = 2 * (c.heads + c.kv_heads) * c.head_dim
  matrices = c.layers * fed * c.embed * (heads + 3 * c.mlp)
  head = (8 + 64 * 127) * c.embed * c.vocab_size
  seen = 8 * sum(range(1, 65)) + 64 * sum(range(65, 192))
  attention = c.layers * 2 * seen * c.heads * c.head_dim
  assert update.flops == pytest.approx(
      3 * 2 * (matrices + head + attention))


def test_the_limit_is_the_slower_of_arithmetic_and_traffic():
  slow, fast = Product(1, 1, 5, 1), Product(1, 2, 5, 1)  # 10 and 20 FLOPs.
  work = limits.Work({slow: 2.0}, 10.0) + limits.Work({fast: 3.0}, 5.0) * 2
  assert work.flops == 2 * 10 + 6 * 20 and work.bytes == 20
  rates = {slow: 10.0, fast: 40.0}
  assert work.seconds(rates, 100.0) == 2 * 1 + 6 * 0.5
  assert work.seconds(rates, 1.0) == 20
