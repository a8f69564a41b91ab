"""The soak of the engine, its short form."""

import jax

from tests import meshes
from tests.campaigns import soak


def test_a_hundred_requests_are_what_they_are_alone():
  with jax.set_mesh(meshes.one()):
    line = soak.soak(requests=100, seed=1, engines=soak.ENGINES[2:3])
  print(line)
  for word in ("abort", "error", "stop", "eos", "length", "fork",
               "continuation", "released"):
    assert f" {word} " in line
