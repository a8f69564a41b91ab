"""Settings of an engine, and how its ring of KV cache slots grows and shrinks.

  B: sequences that decode together  S: cache slots of each  N: steps of a chunk
"""

import dataclasses
from collections.abc import Iterator, Sequence

from posttrain.sampler import decode, logits_processors

# A TPU keeps bfloat16 in tiles of 16 slots, and int8 in tiles of 32. Where the
# last tile is not whole, the compiler makes a second copy of the cache for each
# chunk, which doubles its memory.
TILE = 32


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of continuous batching; any change of them compiles anew.

  Attributes:
    max_num_seqs: B, sequences that decode together at most.
    max_seq_len: S at most, in tokens: prompt and completion of the longest
      request.
    min_seq_len: S to begin with; it doubles, up to `max_seq_len`, when a
      sequence needs more. On a TPU choose a multiple of 32, see `TILE`.
    chunk: N, decode steps before the host syncs, at most.
    admit_fraction: the host syncs before a chunk's end when this share of
      `max_num_seqs` is free for requests that wait.
    prefill_rows: prompts prefilled together. More than one helps where a
      chunk of one prompt does not fill the chip; it costs where a prompt
      comes alone.
    prefill_chunk: tokens of a prompt in one forward pass (chunked prefill).
    prefixes: shared prefixes kept on the device (prefix caching).
    max_ids: the most stop ids, banned ids, and entries of `wait_order` that
      a request may have, of each.
    cache_dtype, weights_dtype: dtype of the KV cache, and of the decode
      loop's matrices: "compute", or "int8" with scales.
    recorded: what a completion holds besides tokens and logprobs. Counts are
      always recorded.
    logits_processor: changes the logits of every step.
    budget_schedule: changes the budgets of every step.
  """

  max_num_seqs: int
  max_seq_len: int
  min_seq_len: int = 64
  chunk: int = 32
  admit_fraction: float = 0.125
  prefill_rows: int = 1
  prefill_chunk: int = 64
  prefixes: int = 8
  max_ids: int = 4
  cache_dtype: str = "compute"
  weights_dtype: str = "compute"
  recorded: decode.Recorded = decode.PLAIN
  logits_processor: logits_processors.LogitsProcessor | None = None
  budget_schedule: decode.BudgetSchedule | None = None

  def __post_init__(self):
    # A stop string is found after the device went on: the counts must then be
    # those of the last token that is kept, so each step's are recorded.
    object.__setattr__(self, "recorded", dataclasses.replace(
        self.recorded, counts=True))

  @property
  def rows(self) -> int:
    """Rows of the device arrays: B, and at least 2."""
    # jax 0.11 drops the sharding of an array of one element. The second row
    # is then never given a request.
    return max(2, self.max_num_seqs)

  @property
  def sizes(self) -> list[int]:
    """Sizes that S takes: doublings, the last rounded up to whole tiles."""
    last = -(-self.max_seq_len // TILE) * TILE
    return [min(size, last)
            for size in doublings(self.min_seq_len, self.max_seq_len)]


def fitting(sizes: Sequence[int], size: int, needed: int) -> Iterator[int]:
  """Yields the sizes to resize through, from `size`, to hold `needed` slots.

  Args:
    sizes: all sizes, ascending.
    size: the present one.
    needed: slots that the longest active sequence needs for its next chunk.
  """
  at = sizes.index(size)
  while sizes[at] < needed:
    at += 1
    yield sizes[at]
  # It shrinks at a quarter, not at a half: between the two a ring would grow
  # and shrink by turns, and a resize copies the whole cache.
  while at and needed <= sizes[at] // 4:
    at -= 1
    yield sizes[at]


def doublings(first: int, last: int) -> list[int]:
  """Lists `first` and its doublings, up to the first that reaches `last`."""
  sizes = [first]
  while sizes[-1] < last:
    sizes.append(sizes[-1] * 2)
  return sizes
