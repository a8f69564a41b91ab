"""The meshes that tests compare: one device, four by two, two by two by two."""

import jax
import pytest

from posttrain import sharding


def mesh(
    fsdp: int, tensor: int, expert: int = 1, **more: int,
) -> jax.sharding.Mesh:
  """A mesh over the first so many devices; skips where they lack."""
  sizes = dict(fsdp=fsdp, tensor=tensor, expert=expert, **more)
  needed, here = 1, jax.devices()
  for size in sizes.values():
    needed *= size
  if len(here) < needed:
    pytest.skip(f"needs {needed} devices, and {len(here)} are here")
  return sharding.make_mesh(devices=here[:needed], **sizes)


def one() -> jax.sharding.Mesh:
  return mesh(1, 1)


def eight() -> jax.sharding.Mesh:
  return mesh(4, 2)


def with_experts() -> jax.sharding.Mesh:
  return mesh(2, 2, 2)


def with_context() -> jax.sharding.Mesh:
  return mesh(2, 2, context=2)


def with_data() -> jax.sharding.Mesh:
  return mesh(2, 2, data=2)
