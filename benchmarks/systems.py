"""Who takes part in which work, and how much faster we mean to be."""

import dataclasses

OURS = "posttrain"


@dataclasses.dataclass(frozen=True)
class System:
  """Attributes: its script, the environment of that, and what it does."""

  module: str
  environment: str
  works: tuple[str, ...]


_TORCH = "benchmarks.peers.transformers_torch"
PEERS = {
    "transformers": System(_TORCH, "torch", ("generate",)),
    "torch": System(_TORCH, "torch", ("sft",)),
    "trl": System("benchmarks.peers.trl_torch", "trl", ("sft", "grpo")),
    "tunix": System("benchmarks.peers.tunix_jax", "tunix",
                    ("generate", "sft", "grpo"))}

# (size, work, peer): times its tokens per second.
TARGETS = {
    ("10m", "generate", "transformers"): 3.5,
    ("10m", "generate", "tunix"): 2.0,
    ("135m", "generate", "transformers"): 2.5,
    ("135m", "generate", "tunix"): 1.5,
    ("10m", "sft", "torch"): 1.5,
    ("10m", "sft", "trl"): 1.7,
    ("10m", "sft", "tunix"): 2.2,
    ("135m", "sft", "trl"): 1.7,
    ("10m", "grpo", "trl"): 2.5,
    ("10m", "grpo", "tunix"): 2.5}
# Of the peer's peak of memory, at most.
MEMORY = {("135m", "sft", "trl"): 0.5, ("10m", "grpo", "trl"): 0.5,
          ("10m", "grpo", "tunix"): 0.5}
LIMIT = 0.5  # Share of the machine's limit, at least.


def peers_of(size: str, work: str) -> list[str]:
  """Those that there is a target against."""
  return [name for name in PEERS if (size, work, name) in TARGETS]
