"""Mesh of the tests of episodes."""

import jax
import pytest

from tests import meshes


@pytest.fixture
def one_device():
  """One device, whatever the process has."""
  with jax.set_mesh(meshes.one()):
    yield
