"""What is modelled before anything compiles: an order, not a measurement."""

import copy
import dataclasses
import pathlib

import jax
import pytest

from posttrain import config as config_lib
from posttrain import sharding
from posttrain.model import presets, transformer
from posttrain.plan import estimate, measure, plan, sweep, topology
from posttrain.programs import program as program_lib

GOLDEN = pathlib.Path(__file__).parent / "golden_config.py"
MODEL = dataclasses.replace(presets.PRESETS["llama3.2-1b"], dtype="bfloat16")
V5E = topology.parse("v5e:2x4")


@pytest.fixture(scope="module")
def stages():
  """The golden stages at the shapes of a 1B model."""
  config = config_lib.load(str(GOLDEN), [
      "cold_start.rows=64", "cold_start.sequence_length=4096",
      "compute.remat=none", "mesh.fsdp=-1", "mesh.tensor=1"])
  return estimate.of_config(config, MODEL)


def sizes(fsdp, tensor):
  return sharding.MeshSizes(fsdp=fsdp, expert=1, tensor=tensor)


def test_candidates_are_the_meshes_that_the_model_accepts(stages):
  found = {(c.fsdp, c.tensor)
           for c in estimate.candidates(stages, V5E)}
  for fsdp, tensor in ((8, 1), (4, 2), (2, 4), (1, 8)):
    mesh = jax.sharding.AbstractMesh((fsdp, tensor), ("fsdp", "tensor"))
    with jax.sharding.use_abstract_mesh(mesh):
      transformer.check_mesh(MODEL)  # Does not raise.
    assert (fsdp, tensor) in found
  assert len(found) == 4
  odd = dataclasses.replace(  # Three kv heads, embed 576.
      stages, model=presets.PRESETS["smollm2-135m"])
  assert {c.tensor for c in estimate.candidates(odd, V5E)} == {1}


def test_more_is_recomputed_for_less_memory(stages):
  for mesh in ((8, 1), (4, 2)):
    by_remat = {
        c.remat: c for c in estimate.candidates(stages, V5E)
        if (c.fsdp, c.tensor) == mesh}
    none, dots, full = (by_remat[r] for r in ("none", "dots", "full"))
    assert none.bytes > dots.bytes > full.bytes
    assert full.seconds >= dots.seconds


def test_bounds_shrink_with_the_slice(stages):
  seconds = [
      min(c.seconds for c in estimate.candidates(
          stages, topology.parse(f"v5e:{size}")))
      for size in ("2x2", "2x4", "4x4")]
  assert seconds == sorted(seconds, reverse=True)


def test_another_slice_costs_the_network_between(stages):
  one, two = (next(iter(estimate.candidates(
      stages, topology.parse(name, slices))))
      for name, slices in (("v5e:4x4", 1), ("v5e:2x4", 2)))
  assert (one.fsdp, one.tensor) == (two.fsdp, two.tensor) == (16, 1)
  assert two.seconds >= one.seconds


def test_replicas_spare_the_network_between(stages):
  """And hold more, as they split no parameter."""
  config = copy.deepcopy(stages.config)
  config.mesh.data = 2
  slices = topology.parse("v5e:2x4", 2)
  split, copied = (
      {(c.fsdp * c.tensor, c.tensor, c.remat): c
       for c in estimate.candidates(each, slices)}
      for each in (stages, dataclasses.replace(stages, config=config)))
  assert {devices for devices, *_ in split} == {16}
  assert {devices for devices, *_ in copied} == {8}
  for _, tensor, remat in copied:
    a, b = split[16, tensor, remat], copied[8, tensor, remat]
    assert b.bytes > a.bytes
    if tensor == 1:  # One eighth of each gradient, for half of each weight.
      assert b.seconds < a.seconds


def test_the_ranking_has_what_fits_first(stages):
  ranked = sweep.rank(stages, V5E)
  fits = [c.fits for c in ranked]
  assert fits == sorted(fits, reverse=True) and {True, False} == set(fits)
  cost = [c.chip_seconds for c in ranked if c.fits]
  assert cost == sorted(cost)
  [table] = sweep.tables(ranked, [])
  assert table.rows[0][0] == str(ranked[0].topology)


def result(kind, needed, beside=0):
  program = program_lib.Program("cold_start", kind, lambda: None, ())
  return measure.Result(program, measure.Memory(
      arguments=0, padded_arguments=None, temporaries=None, peak=needed,
      beside={"reference": beside} if beside else {},
      available=V5E.chip.hbm_bytes), None, None, 1.0)


def test_advice_names_keys_and_what_fits(stages):
  needed = estimate.peak_bytes(stages, "none", sizes(8, 1))
  lines = "\n".join(plan.advise(
      result("update", needed), stages, V5E, sizes(8, 1)))
  assert "cold_start.num_microbatches=2 (more parts" in lines
  assert "compute.loss_chunk=128" in lines
  assert "cold_start.moments_dtype=float32 (bfloat16 halves" in lines
  assert "The smallest slice that fits: v5e:" in lines
  assert "compute.remat=" in lines


def test_advice_is_scaled_by_what_the_compiler_said(stages):
  """Where the estimate was too low, a larger slice is named."""
  needed = estimate.peak_bytes(stages, "none", sizes(8, 1))
  lines = [
      plan.advise(result("update", scale * needed), stages, V5E,
                    sizes(8, 1))[-1] for scale in (1, 4)]
  chips = [topology.parse(line.split(": ")[1].split(" ")[0]).num_chips
           for line in lines]
  assert chips[0] < chips[1]


def test_what_is_beside_a_program_counts():
  available = V5E.chip.hbm_bytes
  assert result("update", available).memory.fits
  assert not result("update", available, beside=1).memory.fits
