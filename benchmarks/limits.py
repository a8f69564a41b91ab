"""Limits: the matrix products and bytes that a work needs, from shapes.

A multiply-add is two FLOPs. The count is what the mathematics needs: causal
attention, the true vocabulary, and a backward pass of two products for each of
the forward's. Masked scores, softmax, norms, padding and recomputation are not
counted. Each product is compared with the rate of its own shape on this
machine. So a share of the limit tells how much is lost to anything else.

  L: layers  D: embed  F: mlp  V: vocabulary  N: heads  K: kv heads
  H: head_dim
"""

import dataclasses
from collections.abc import Mapping

from benchmarks.shapes import Shape
from posttrain.model.config import ModelConfig
from posttrain.telemetry import memory

FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Product:
  """A matrix product [batch, m, k] by [batch, k, n]."""

  batch: int
  m: int
  k: int
  n: int

  @property
  def flops(self) -> int:
    return 2 * self.batch * self.m * self.k * self.n

  @property
  def backward(self) -> tuple["Product", "Product"]:
    """Returns the products that give the gradients of both factors."""
    return (Product(self.batch, self.m, self.n, self.k),
            Product(self.batch, self.k, self.m, self.n))


@dataclasses.dataclass(frozen=True)
class Work:
  """Products with their counts (a part of one is a fraction), and bytes."""

  products: Mapping[Product, float]
  bytes: float

  def __add__(self, other: "Work") -> "Work":
    return Work(_added(self.products, other.products),
                self.bytes + other.bytes)

  def __mul__(self, times: float) -> "Work":
    return Work({product: times * count
                 for product, count in self.products.items()},
                self.bytes * times)

  @property
  def flops(self) -> float:
    return sum(count * product.flops
               for product, count in self.products.items())

  def seconds(
      self, flops_per_sec: Mapping[Product, float], bytes_per_sec: float,
  ) -> float:
    """Computes the least time, if arithmetic and traffic overlap perfectly."""
    arithmetic = sum(
        count * product.flops / flops_per_sec[product]
        for product, count in self.products.items())
    return max(arithmetic, self.bytes / bytes_per_sec)


def _added(one: Mapping, other: Mapping) -> dict:
  return {product: one.get(product, 0) + other.get(product, 0)
          for product in one | other}


def forward(
    config: ModelConfig, *, rows: int, queries: int, keys: int,
    seen: float = 1.0, logits: int,
) -> dict[Product, float]:
  """Lists the products of one forward pass of a dense model.

  Args:
    rows: number of sequences.
    queries, keys: numbers of queries and keys of each.
    seen: the mean share of the keys that a query attends to.
    logits: number of tokens whose logits are computed.
  """
  tokens, products = rows * queries, {}
  batch, group = rows * config.kv_heads, queries * config.groups
  heads = config.heads * config.head_dim
  kv_heads = config.kv_heads * config.head_dim
  matrix = lambda k, n: Product(1, tokens, k, n)
  for product, count in (
      (matrix(config.embed, heads), 1), (matrix(config.embed, kv_heads), 2),
      (matrix(heads, config.embed), 1), (matrix(config.embed, config.mlp), 2),
      (matrix(config.mlp, config.embed), 1),
      (Product(batch, group, config.head_dim, keys), seen),
      (Product(batch, group, keys, config.head_dim), seen)):
    products = _added(products, {product: config.layers * count})
  return _added(products, {
      Product(1, logits, config.embed, config.vocab_size): 1})


def update(config: ModelConfig, *, rows: int, length: int) -> Work:
  """Work of an update on causal rows, with all tokens in the loss."""
  return _with_backward(config, forward(
      config, rows=rows, queries=length, keys=length,
      seen=(length + 1) / 2 / length, logits=rows * length))


def group_update(
    config: ModelConfig, *, prompts: int, samples: int, prompt: int, new: int,
) -> Work:
  """Work of an update on completions, with each prompt computed once.

  The first token of each completion is predicted by the prompt; the last one
  predicts nothing.
  """
  rows, fed = prompts * samples, new - 1
  return _with_backward(config, _added(
      forward(config, rows=prompts, queries=prompt, keys=prompt,
              seen=(prompt + 1) / 2 / prompt, logits=prompts),
      forward(config, rows=rows, queries=fed, keys=prompt + fed,
              seen=(prompt + (fed + 1) / 2) / (prompt + fed),
              logits=rows * fed)))


def _with_backward(config: ModelConfig, products: Mapping) -> Work:
  """Adds the backward pass and AdamW to a forward pass.

  Bytes: parameters are read forward and backward; gradients are written and
  read; AdamW reads and writes the parameters and two moments. Activations are
  left out, as they may stay in caches.
  """
  for product, count in dict(products).items():
    for gradient in product.backward:
      products = _added(products, {gradient: count})
  return Work(products, (2 + 2 + 3 + 3) * FLOAT32 * memory.parameters(config))


def prefill(config: ModelConfig, *, prompts: int, length: int) -> Work:
  """Work of a prefill: each prompt once; the cache is written."""
  cache = memory.cache_bytes(config, rows=prompts, slots=length)
  return Work(
      forward(config, rows=prompts, queries=length, keys=length,
              seen=(length + 1) / 2 / length, logits=prompts),
      FLOAT32 * memory.parameters(config) + cache)


def decode_step(config: ModelConfig, *, rows: int, context: int) -> Work:
  """Work of a decode step: one token for each row, over `context` cached ones.

  Bytes: layers in the compute dtype and the float32 head are read once for
  all rows, the cache is read once and has one slot written.
  """
  weights = (
      config.layers * config.matrix_parameters(config.num_experts)
      * memory.BYTES[config.dtype]
      + config.vocab_size * config.embed * FLOAT32)
  cache = memory.cache_bytes(config, rows=rows, slots=context + 1)
  products = forward(config, rows=rows, queries=1, keys=context + 1,
                     logits=rows)
  # Attention of one query is a matrix by a vector: traffic, which the cache's
  # bytes are, and no arithmetic to speak of.
  return Work({product: count for product, count in products.items()
               if product.batch == 1}, weights + cache)


def of(config: ModelConfig, shape: Shape) -> tuple[Work, ...]:
  """Lists the parts of a work, which follow one another."""
  if shape.rows:
    return (update(config, rows=shape.rows, length=shape.length),)
  rows = shape.prompts * shape.samples
  # The first token comes from the prefill's logits; the last is not fed. All
  # steps as the middle one: few shapes to measure, and the sum is the same.
  middle = shape.prompt + shape.new // 2 - 1
  parts = (
      prefill(config, prompts=shape.prompts, length=shape.prompt),
      decode_step(config, rows=rows, context=middle) * (shape.new - 1))
  if shape.samples == 1:
    return parts
  return *parts, group_update(
      config, prompts=shape.prompts, samples=shape.samples,
      prompt=shape.prompt, new=shape.new)
