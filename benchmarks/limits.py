"""Work that cannot be avoided, in FLOPs and bytes, from shapes alone.

FLOPs are those of `posttrain.train.flops`: what the mathematics needs. So a
share of the limit tells how much is lost to anything.

  N: parameters  L: layers  D: embed  V: vocabulary  K: kv heads  H: head_dim
"""

import dataclasses

from posttrain.model.config import ModelConfig
from posttrain.train import flops, memory

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
  count = flops.forward if times_forward == 1 else flops.update
  tokens = segments * length
  work = count(config, tokens, (length + 1) / 2, logits=tokens)
  accesses = 1 if times_forward == 1 else 2 + 2 + 3 + 3
  return Work(work, accesses * FLOAT32 * memory.parameters(config))


def prefill(config: ModelConfig, *, prompts: int, length: int) -> Work:
  """Each prompt once; the cache is written."""
  work = flops.forward(
      config, prompts * length, (length + 1) / 2, logits=prompts)
  cache = memory.cache_bytes(config, rows=prompts, slots=length)
  return Work(work, FLOAT32 * memory.parameters(config) + cache)


def decode_step(config: ModelConfig, *, rows: int, context: int) -> Work:
  """One token for each row, over a cache of `context` earlier tokens.

  Bytes: layers in the compute dtype and the float32 head are read once for
  all rows, the cache is read once and has one slot written. Of experts, as
  many as the rows can choose at most.
  """
  work = flops.forward(config, rows, context + 1, logits=rows)
  size = memory.BYTES[config.dtype]
  experts = min(config.num_experts, rows * config.experts_per_token)
  weights = (
      config.layers * memory.layer_parameters(config, experts) * size
      + config.vocab_size * config.embed * FLOAT32)
  cache = memory.cache_bytes(config, rows=rows, slots=context + 1)
  return Work(work, weights + cache)
