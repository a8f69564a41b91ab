"""Oracle: reshaping by hand; the layout is in the type."""

import jax
import numpy as np

from posttrain.train import step
from tests import meshes


def test_rows_are_cut_padded_and_sharded():
  tokens = np.arange(1, 31, dtype=np.int32).reshape(10, 3)
  with jax.set_mesh(meshes.eight()):
    found = step.stack({"tokens": tokens, "id": tokens[:, 0]}, 2)
    assert str(jax.typeof(found["tokens"])) == "int32[2,8@fsdp,3]"
    assert str(jax.typeof(found["id"])) == "int32[2,8@fsdp]"
  flat = np.asarray(found["tokens"]).reshape(16, 3)
  np.testing.assert_array_equal(flat[:10], tokens)
  np.testing.assert_array_equal(flat[10:], 0)


def test_nothing_is_padded_without_need():
  tokens = np.ones((6, 3), np.int32)
  with jax.set_mesh(meshes.one()):
    found = step.stack({"tokens": tokens}, 3)
  assert found["tokens"].shape == (3, 2, 3)
