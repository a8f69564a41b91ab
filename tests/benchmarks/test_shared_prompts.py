"""Both ways learn from the same tokens, of which one has fewer to compute."""

import jax
import pytest

from benchmarks import shapes, shared_prompts
from tests import meshes
from tests.benchmarks.test_works import MINIATURE


def test_a_prompt_is_computed_once_for_its_group(monkeypatch):
  monkeypatch.setitem(shapes.SIZES, "10m", MINIATURE)
  with jax.set_mesh(meshes.one()):
    line = shared_prompts.compare(shared_prompts.parse(
        ["--samples=4", "--new=6", "--repeats=1"]), prompt=16)
  assert line["apart_tokens"] == 2 * 4 * (16 + 6)
  assert line["shared_tokens"] == 2 * (15 + 4 * (1 + 6))
  assert line["ratio_wall"] == pytest.approx(
      line["apart_wall_seconds"] / line["shared_wall_seconds"])
