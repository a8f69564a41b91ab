"""Work that cannot be avoided, in FLOPs and bytes, from shapes alone.

A multiply-add is two FLOPs. Counted is what the mathematics needs: causal
attention within a segment, true vocabulary, a backward pass of twice the
forward; not what the program computes beyond that (masked scores, padding,
recomputation). So a share of the limit tells how much is lost to anything.

  N: parameters  L: layers  D: embed  V: vocabulary  K: kv heads  H: head_dim
"""

import dataclasses

from posttrain.model.config import ModelConfig
from posttrain.train import memory

FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Work:
  """FLOPs and bytes to and from memory."""

  flops: float
  bytes: float

  def __add__(self, other: "Work") -> "Work":
    return Work(self.flops + other.flops, self.bytes + other.bytes)

  def __mul__(self, times: float) -> "Work":
    return Work(self.flops * times, self.bytes * times)

  def seconds(self, flops_per_sec: float, bytes_per_sec: float) -> float:
    """The least time: arithmetic and traffic overlap at best."""
    return max(self.flops / flops_per_sec, self.bytes / bytes_per_sec)


def forward_flops(
    config: ModelConfig, tokens: int, context: float, *, logits: int,
) -> float:
  """Of one forward pass.

  Args:
    tokens: that go through the layers.
    context: keys that a token attends to, on the average, itself included.
    logits: tokens whose logits are computed.
  """
  attention = 4 * context * config.heads * config.head_dim
  layer = attention + 2 * memory.layer_parameters(
      config, config.experts_per_token)
  head = 2 * config.embed * config.vocab_size
  return tokens * config.layers * layer + logits * head


def update(
    config: ModelConfig, *, segments: int, length: int, times_forward: int = 3,
) -> Work:
  """A pass over packed examples, and the optimizer's if there is one.

  Bytes: parameters are read forward and backward; gradients are written and
  read; AdamW reads and writes the parameters and two moments. Activations are
  left out, as they may stay in caches.

  Args:
    segments, length: examples, and tokens of each.
    times_forward: 3 with a backward pass and an update, 1 for logprobs alone.
  """
  flops = times_forward * forward_flops(
      config, segments * length, (length + 1) / 2, logits=segments * length)
  accesses = 1 if times_forward == 1 else 2 + 2 + 3 + 3
  return Work(flops, accesses * FLOAT32 * memory.parameters(config))


def prefill(config: ModelConfig, *, prompts: int, length: int) -> Work:
  """Each prompt once; the cache is written."""
  flops = forward_flops(
      config, prompts * length, (length + 1) / 2, logits=prompts)
  cache = memory.cache_bytes(config, rows=prompts, slots=length)
  return Work(flops, FLOAT32 * memory.parameters(config) + cache)


def decode_step(config: ModelConfig, *, rows: int, context: int) -> Work:
  """One token for each row, over a cache of `context` earlier tokens.

  Bytes: layers in the compute dtype and the float32 head are read once for
  all rows, the cache is read once and has one slot written. Of experts, as
  many as the rows can choose at most.
  """
  flops = forward_flops(config, rows, context + 1, logits=rows)
  size = memory.BYTES[config.dtype]
  experts = min(config.num_experts, rows * config.experts_per_token)
  weights = (
      config.layers * memory.layer_parameters(config, experts) * size
      + config.vocab_size * config.embed * FLOAT32)
  cache = memory.cache_bytes(config, rows=rows, slots=context + 1)
  return Work(flops, weights + cache)
