"""Systems: which takes part in which work, and the targets of our speed."""

import dataclasses

OURS = "posttrain"


@dataclasses.dataclass(frozen=True)
class System:
  """A system: its script, the script's environment, and its works."""

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

# (size, work, peer) -> our tokens per second over the peer's, at least.
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
# (size, work, peer) -> our peak of memory over the peer's, at most.
MEMORY = {("135m", "sft", "trl"): 0.5, ("10m", "grpo", "trl"): 0.5,
          ("10m", "grpo", "tunix"): 0.5}
LIMIT = 0.5  # Share of the machine's limit, at least.


def peers_of(size: str, work: str) -> list[str]:
  """Lists the peers with a target."""
  return [name for name in PEERS if (size, work, name) in TARGETS]
