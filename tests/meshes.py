"""The two meshes that tests compare: one device, and four by two."""

import jax
import pytest

from posttrain import sharding


def mesh(fsdp: int, tensor: int) -> jax.sharding.Mesh:
  """A mesh over the first `fsdp * tensor` devices; skips where they lack."""
  needed, here = fsdp * tensor, jax.devices()
  if len(here) < needed:
    pytest.skip(f"needs {needed} devices, and {len(here)} are here")
  return sharding.make_mesh(fsdp, tensor, devices=here[:needed])


def one() -> jax.sharding.Mesh:
  return mesh(1, 1)


def eight() -> jax.sharding.Mesh:
  return mesh(4, 2)
