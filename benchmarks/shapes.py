"""Shapes of the benchmarks: sizes of models and works, for every system.

Standard library only: peers read it in environments of their own.
"""

import dataclasses
import random

INIT_STD = 0.02  # Of the random weights.
LEARNING_RATE = 1e-4
WORKS = ("generate", "sft", "grpo")


@dataclasses.dataclass(frozen=True)
class Size:
  """A Llama-like decoder with tied embeddings, in float32."""

  layers: int
  embed: int
  mlp: int
  heads: int
  kv_heads: int
  head_dim: int
  vocab_size: int


SIZES = {
    "10m": Size(layers=8, embed=256, mlp=1024, heads=8, kv_heads=8,
                head_dim=32, vocab_size=4096),
    # SmolLM2-135M's.
    "135m": Size(layers=30, embed=576, mlp=1536, heads=9, kv_heads=3,
                 head_dim=64, vocab_size=49_152)}


@dataclasses.dataclass(frozen=True)
class Shape:
  """Shape of a work; 0 for numbers that it does not have.

  Attributes:
    rows, length: full rows of an SFT step; all but the first token of each
      are in the loss.
    prompts, prompt: number of prompts, and tokens of each.
    samples: completions of each prompt.
    new: tokens of each completion; none ends early.
  """

  rows: int = 0
  length: int = 0
  prompts: int = 0
  prompt: int = 0
  samples: int = 0
  new: int = 0

  @property
  def tokens(self) -> int:
    """Number of tokens that a run counts as: trained on, or drawn."""
    return self.rows * self.length or self.prompts * self.samples * self.new

  def __str__(self) -> str:
    if self.rows:
      return f"{self.rows} x {self.length}"
    samples = f" x {self.samples}" if self.samples > 1 else ""
    return f"{self.prompts} of {self.prompt}{samples}, {self.new} new"


def shape_of(work: str, *, rows: int = 8) -> Shape:
  return {
      "sft": Shape(rows=rows, length=512),
      "generate": Shape(prompts=32, prompt=64, samples=1, new=128),
      "grpo": Shape(prompts=8, prompt=64, samples=8, new=128)}[work]


def tokens(count: int, length: int, vocab_size: int, *, seed: int = 0,
           ) -> list[list[int]]:
  """Draws [count, length] ids, uniformly."""
  drawn = random.Random(seed)
  return [[drawn.randrange(vocab_size) for _ in range(length)]
          for _ in range(count)]


def rule_reward(completion: list[int]) -> float:
  """Scores the share of even ids: a rule that every completion half follows."""
  return sum(token % 2 == 0 for token in completion) / len(completion)


def word(token: int) -> str:
  """Writes a token as text, for systems that know prompts as text only."""
  return f"t{token}"


def text(ids: list[int]) -> str:
  return " ".join(map(word, ids))


def ids(words: str) -> list[int]:
  return [int(found[1:]) for found in words.split()]
