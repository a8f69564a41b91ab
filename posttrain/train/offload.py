"""Host offload: keeps arrays in the hosts' memory while they are not needed.

A sharding says which devices hold the parts of an array; its memory kind says
if they are in the devices' own memory or, pinned, in that of their hosts.
Each host keeps the parts of its own devices. Moving changes no bit.
"""

from collections.abc import Collection
from typing import Any

import jax

HOST = "pinned_host"


def check(names: Collection[str]) -> None:
  """Raises ValueError if the backend cannot keep arrays on the host.

  Args:
    names: content of `compute.offload`; empty if nothing is offloaded.
  """
  device = jax.local_devices()[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if names and HOST not in kinds:
    raise ValueError(
        f"compute.offload={tuple(names)} needs memory of the kind {HOST!r}; "
        f"{device.device_kind} ({device.platform}) has {', '.join(kinds)}. "
        "Leave compute.offload out.")


def to_host(tree: Any, *, but: Any = ()) -> Any:
  """Copies arrays to the hosts' memory.

  Args:
    tree: any tree of arrays.
    but: arrays of this tree are left where they are.
  """
  # By identity: a reference shares its frozen weights with the policy, which
  # needs them on the devices.
  shared = {id(x) for x in jax.tree.leaves(but)}
  return jax.tree.map(
      lambda x: x if id(x) in shared else _moved(x, HOST), tree)


def to_devices(tree: Any) -> Any:
  """Copies arrays to the devices' memory, unless they are there."""
  return jax.tree.map(
      lambda x: _moved(x, "device") if x.sharding.memory_kind == HOST else x,
      tree)


def _moved(x: jax.Array, kind: str) -> jax.Array:
  return jax.device_put(x, x.sharding.with_memory_kind(kind))
