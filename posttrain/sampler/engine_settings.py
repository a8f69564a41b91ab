"""The shapes of an engine, and how the ring of its slots grows and shrinks.

  B: slots  S: cache slots of each  N: steps of a chunk
"""

import dataclasses
from collections.abc import Iterator, Sequence

from posttrain.sampler import decode, logits_processors

# A TPU keeps bfloat16 in tiles of 16 slots, and int8 in tiles of 32. Where the
# last is not whole, the compiler copies the cache beside itself for a chunk.
TILE = 32


@dataclasses.dataclass(frozen=True)
class Settings:
  """Shapes and programs of an engine; another one compiles anew.

  Attributes:
    slots: B, requests decoded together.
    max_slots: S at most: prompt and completion of the longest request.
    min_slots: S to begin with; it doubles, up to `max_slots`, when a row
      needs more. On a TPU choose a multiple of 32, see `TILE`.
    chunk: N, tokens between two looks of the host at most.
    refill: the host looks as soon as this share of the slots waits to be
      refilled.
    prefill_rows: prompts prefilled together; more than one helps where a
      chunk of one does not fill the chip, and costs where one alone is new.
    prefill_chunk: tokens of a prompt fed at once.
    prefixes: shared prefixes kept on the device.
    max_ids: stop ids, banned ids and wait texts in order that a request may
      have.
    cache_dtype, weights_dtype: of the cache, and of the decode loop's
      matrices: "compute", or "int8" with scales.
    recorded: what a completion holds besides tokens and logprobs. Counts are
      always recorded.
    hook: changes the logits of every step, see `hooks`.
    policy: changes the budgets of every step, see `decode.Policy`.
  """

  slots: int
  max_slots: int
  min_slots: int = 64
  chunk: int = 32
  refill: float = 0.125
  prefill_rows: int = 1
  prefill_chunk: int = 64
  prefixes: int = 8
  max_ids: int = 4
  cache_dtype: str = "compute"
  weights_dtype: str = "compute"
  recorded: decode.Recorded = decode.PLAIN
  hook: logits_processors.Hook | None = None
  policy: decode.Policy | None = None

  def __post_init__(self):
    # A row that a stop string cuts has the counts of its last token.
    object.__setattr__(self, "recorded", dataclasses.replace(
        self.recorded, counts=True))

  @property
  def rows(self) -> int:
    """Of the arrays: B, of which one may never be filled.

    Of an array of one element jax 0.11 forgets the sharding.
    """
    return max(2, self.slots)

  @property
  def sizes(self) -> list[int]:
    """What S may be, the smallest first; the last in whole tiles."""
    last = -(-self.max_slots // TILE) * TILE
    return [min(size, last)
            for size in doublings(self.min_slots, self.max_slots)]


def fitting(sizes: Sequence[int], size: int, needed: int) -> Iterator[int]:
  """The sizes that S takes in turn, from `size`, for rows with `needed` slots.
  """
  at = sizes.index(size)
  while sizes[at] < needed:
    at += 1
    yield sizes[at]
  # Not at once: the next request may need the room again.
  while at and needed <= sizes[at] // 4:
    at -= 1
    yield sizes[at]


def doublings(first: int, last: int) -> list[int]:
  """From `first`, doubled until one is `last` or more."""
  sizes = [first]
  while sizes[-1] < last:
    sizes.append(sizes[-1] * 2)
  return sizes
