"""Counts against hand counts, on HLO that libtpu 0.0.42.1 has compiled.

`recorded/` holds the texts, without backend settings:
  update      cold_start/update of golden_config.py on v5e:2x2, made by hand
              with a constant schedule
  two_slices  cold_start/update of configs/tiny.py:debug on two v5e:2x2, with
              mesh.tensor=2
  splash      forward and backward of splash attention, [2, 4, 1024, 128]
              queries against 2 heads of keys
  one_row     measure/decode[G=1 S=32] of configs/quickstart.py:debug on
              v6e:4x8: one row on each device, 24 steps
  ragged      gradients of the sum of squares of jax.lax.ragged_dot, bfloat16
              [1024, 256] rows with [8, 256, 384] weights, on one v5e
  grouped     the same of model.grouped_kernel.product
"""

import lzma
import pathlib

import numpy as np
import pytest

from posttrain.plan import (
  dots,
  hlo,
  kernels,
  measure,
  traffic,
  transposes,
  walk,
)

RECORDED = pathlib.Path(__file__).parent / "recorded"
LAYOUT = traffic.Layout(("fsdp", "tensor"), (2, 2))


def recorded(name):
  return lzma.open(RECORDED / f"{name}.hlo.xz", "rt").read()


@pytest.fixture(scope="module")
def update():
  module = hlo.parse(recorded("update"))
  return module, list(walk.walk(module, unknown_trips=2))


def test_products_are_those_of_a_hand_count(update):
  """Four passes of a layer with everything computed again, but its last.

  A pass is 2 x tokens x weights; the product with `down` is not needed again.
  """
  _, visits = update
  layers, embed, mlp, heads, kv, head, vocab, length = (
      3, 256, 512, 4, 2, 64, 512, 256)
  tokens = 8 * length
  attention_weights = embed * head * 2 * (heads + kv)
  weights = 4 * (attention_weights + 2 * embed * mlp) + 3 * embed * mlp
  scores = 4 * 4 * tokens * length * heads * head
  by_hand = layers * (2 * tokens * weights + scores) + (
      4 * 2 * tokens * embed * vocab)
  found = sum(visit.times * dots.flops(
      visit.scope.computation, visit.instruction) for visit in visits)
  assert found == by_hand / 4  # Devices.


def test_the_head_takes_six_passes(update):
  _, visits = update
  passes = {
      visit.instruction.op_name.split("/")[-2]: dots.passes(
          visit.scope.computation, visit.instruction)
      for visit in visits
      if dots.flops(visit.scope.computation, visit.instruction)}
  assert passes.pop("...d,dv->...v") == 6
  assert set(passes.values()) == {1}


def test_products_of_one_row_are_counted():
  """The compiler writes most as a multiplication and a sum, not as a dot."""
  layers, embed, mlp, heads, kv, head, vocab, slots, steps = (
      3, 128, 384, 4, 2, 32, 128, 32, 24)
  weights = layers * (embed * head * 2 * (heads + kv) + 3 * embed * mlp)
  scores = layers * 2 * heads * head * slots
  counts = measure.count(
      recorded("one_row"), traffic.Layout(("fsdp", "tensor"), (32, 1)),
      set(), None)
  assert counts.dot_flops == steps * 2 * (weights + scores + embed * vocab)
  # Each weight is copied to the core in every step, which two rows of the
  # same program need once: the compiler's choice, and so it is counted.
  assert counts.hbm_bytes > steps * 4 * weights


def test_trip_counts_are_the_layers_and_chunks(update):
  """Two scans over 3 layers and two over 256 / 128 chunks, in microbatches."""
  _, visits = update
  trips = [walk.trip_count(v.scope, v.instruction) for v in visits
           if v.instruction.opcode == "while"]
  assert sorted(trips, key=str) == [2, 2, 3, 3, None]


def test_an_unknown_bound_has_to_be_given():
  with pytest.raises(ValueError, match="argument of the program"):
    list(walk.walk(hlo.parse(recorded("update"))))


def test_collectives_by_axis(update):
  """Each of 7 weights is gathered forward and again backward."""
  _, visits = update
  found = {(c.kind, c.axis): c for c in traffic.collect(visits, LAYOUT)}
  layers_times_microbatches = 3 * 2
  gathers = found["all-gather", "fsdp"]
  assert gathers.count - 14 * layers_times_microbatches == 8  # The tables.
  weight = 2 * (256 * 64 * 2 * (4 + 2) + 3 * 256 * 512) // 2  # bf16, split.
  table = 512 // 2 * 256
  # The embedding in bfloat16 once a microbatch; the head in float32 once
  # forward and in each of two chunks backward.
  assert gathers.bytes == layers_times_microbatches * 2 * weight + 2 * (
      2 * table + 3 * 4 * table)
  assert {axis for _, axis in found} == {"fsdp", "tensor", "fsdp+tensor"}
  # Two sums over "tensor" forward and three backward, in every layer.
  stream = 2 * 2 * 256 * 256
  assert found["all-reduce", "tensor"].bytes > 30 * stream


def test_transposes_of_gradients(update):
  """Three accumulators are turned once, after the loop over microbatches."""
  _, visits = update
  weights = {(3, 128, 256), (3, 256, 256)}
  found = transposes.beside_gradients(visits, weights)
  assert [(each.shape, each.count) for each in found] == [
      ("f32[3,256,128]", 1), ("f32[3,128,256]", 1), ("f32[3,128,256]", 1)]
  assert not transposes.beside_gradients(visits, {(7, 11)})


def test_traffic_is_bounded_by_what_is_there(update):
  """Parameters and two moments are read and written once, or nearly twice."""
  _, visits = update
  shard = 4 * (3 * (256 * 64 * 2 * 6 + 3 * 256 * 512) + 512 * 256) / 4
  found = traffic.hbm_bytes(visits)
  assert 6 * shard < found < 12 * shard


def test_collectives_between_slices():
  """What hosts send between slices, next to what a slice does itself."""
  visits = list(walk.walk(hlo.parse(recorded("two_slices")), 1))
  found = traffic.collect(visits, traffic.Layout(
      ("fsdp", "tensor"), (2, 2), num_slices=2))
  across = {c.kind: c for c in found if c.across_slices}
  within = {(c.kind, c.axis): c for c in found if not c.across_slices}
  assert set(across) == {"all-gather", "all-reduce"}
  assert {c.axis for c in across.values()} == {"fsdp"}
  assert {c.group_size for c in across.values()} == {2}
  assert within["all-gather", "fsdp"].bytes > across["all-gather"].bytes


def test_attention_kernels_are_counted_by_hand():
  """Nine products of all pairs, half of which a causal mask shows."""
  counts = measure.count(recorded("splash"), traffic.Layout(
      ("fsdp", "tensor"), (1, 1)), set(), None)
  batch, heads, length, head = 2, 4, 1024, 128
  one = 2 * batch * heads * length**2 * head
  assert counts.kernel_flops == one * (2 + 4 + 3) / 2
  assert counts.dot_flops == 0 and not counts.uncounted


def test_the_decode_kernel_is_counted_against_all_slots():
  """Two products of 2 x 3 x 4 queries with 40 keys of width 128."""
  counts = measure.count("""HloModule jit_decode, entry_computation_layout={}

ENTRY %main (blocks: s32[2,1], q: bf16[2,3,4,128], k: s8[2,3,40,128], scale: f32[2,3,40]) -> bf16[2,3,4,128] {
  %blocks = s32[2,1]{1,0} parameter(0)
  %q = bf16[2,3,4,128]{3,2,1,0} parameter(1)
  %k = s8[2,3,40,128]{3,2,1,0} parameter(2)
  %scale = f32[2,3,40]{2,1,0} parameter(3)
  ROOT %decode_attention.1 = bf16[2,3,4,128]{3,2,1,0} custom-call(%blocks, %q, %k, %k, %scale, %scale), custom_call_target="tpu_custom_call"
}
""", traffic.Layout(("fsdp", "tensor"), (1, 1)), set(), None)  # noqa: E501
  assert counts.kernel_flops == 2 * 2 * (2 * 3 * 4) * 40 * 128
  assert not counts.uncounted


@pytest.mark.parametrize("name, num_kernels, num_dense", [
    ("ragged", 2, 8), ("grouped", 3, 0)])
def test_products_by_expert_are_counted_by_hand(name, num_kernels, num_dense):
  """The product and two gradients, each row by one expert.

  That of the weights is none of XLA's kernels. It makes it a dense product of
  all rows with each of the eight experts, masked.
  """
  one = 2 * 1024 * 256 * 384
  for experts, share in ((8, 1), (32, 1 / 4)):  # All here; a fourth of them.
    counts = measure.count(
        recorded(name), traffic.Layout(("fsdp", "tensor"), (1, 1)),
        set(), None, experts=experts)
    assert counts.kernel_flops == num_kernels * one * share
    assert counts.dot_flops == num_dense * one and not counts.uncounted


def test_another_kernel_is_named():
  counts = measure.count(
      recorded("splash").replace("splash_mha", "paged_mha"),
      traffic.Layout(("fsdp", "tensor"), (1, 1)), set(), None)
  assert len(counts.uncounted) == 3 and counts.kernel_flops == 0


@pytest.mark.parametrize("text, groups", [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 2, 1, 3]]),
    ("replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}",
     [[0, 1], [2, 3]]),
    ("source_target_pairs={{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("replica_groups={}", [[0, 1, 2, 3]]),
])
def test_replica_groups(text, groups):
  instruction = hlo.Instruction(
      "x", "all-gather", (), (), f"channel_id=1, {text}, dimensions={{0}}")
  found = traffic.parse_groups(instruction, 4)
  assert sorted(sorted(g) for g in found.tolist()) == sorted(
      sorted(g) for g in groups)


@pytest.mark.parametrize("text, logical, padded, space", [
    ("f32[30,576]{1,0:T(8,128)}", 69_120, 81_920, 0),  # tpu: 32 x 640.
    ("f32[]{:T(128)}", 4, 512, 0),
    ("bf16[3,128,1,64]{1,3,2,0:T(8,128)(2,1)S(1)}", 49_152, 49_152, 1),
    ("pred[2,256]{1,0}", 512, 512, 0),
])
def test_bytes_with_tiles(text, logical, padded, space):
  [array] = hlo.parse_arrays(text)
  assert (array.bytes, array.padded_bytes, array.space) == (
      logical, padded, space)


def loops(start, bound, step, direction):
  """A module whose loop adds `step` to its counter."""
  return f"""
body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {{
  %p = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4]{{1,0}} get-tuple-element(%p), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %y = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}
  ROOT %t = (s32[], f32[4,4]{{1,0}}) tuple(%next, %y)
}}
cond (p: (s32[], f32[4,4])) -> pred[] {{
  %p = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] constant({bound})
  ROOT %c = pred[] compare(%i, %bound), direction={direction}
}}
ENTRY main (x: f32[4,4]) -> f32[4,4] {{
  %x = f32[4,4]{{1,0}} parameter(0)
  %start = s32[] constant({start})
  %t = (s32[], f32[4,4]{{1,0}}) tuple(%start, %x)
  %w = (s32[], f32[4,4]{{1,0}}) while(%t), condition=%cond, body=%body
  ROOT %r = f32[4,4]{{1,0}} get-tuple-element(%w), index=1
}}
"""


@pytest.mark.parametrize("start, bound, step, direction", [
    (0, 7, 1, "LT"), (0, 7, 2, "LT"), (3, 10, 3, "LE"), (8, 0, -2, "GT"),
    (5, 5, 1, "LT"), (0, 6, 3, "NE"), (6, 0, -1, "GE")])
def test_a_loop_is_counted_as_python_would(start, bound, step, direction):
  runs, i = 0, start
  while {"LT": i < bound, "LE": i <= bound, "GT": i > bound,
         "GE": i >= bound, "NE": i != bound}[direction]:
    runs, i = runs + 1, i + step
  module = hlo.parse(loops(start, bound, step, direction))
  found = sum(visit.times * dots.flops(
      visit.scope.computation, visit.instruction)
      for visit in walk.walk(module))
  assert found == runs * 2 * 4**3


def convolve(x, kernel, *, stride, low, high, dilated, spread):
  """Pairs that meet, one output and one kernel position at a time."""
  size = (x - 1) * dilated + 1
  span = (kernel - 1) * spread + 1
  out = (low + size + high - span) // stride + 1
  real = np.zeros(low + size + high + span, bool)
  real[low:low + size:dilated] = True
  return out, sum(real[o * stride + k * spread]
                  for o in range(out) for k in range(kernel))


@pytest.mark.parametrize("setting", [
    dict(x=5, kernel=3, stride=1, low=0, high=0, dilated=1, spread=1),
    dict(x=5, kernel=3, stride=2, low=1, high=1, dilated=1, spread=1),
    dict(x=4, kernel=4, stride=1, low=3, high=3, dilated=1, spread=2),
    # A batch of two as a TPU writes it: each meets its own.
    dict(x=2, kernel=2, stride=1, low=0, high=0, dilated=2, spread=1)])
def test_only_real_pairs_of_a_convolution_count(setting):
  out, pairs = convolve(**setting)
  window = (f"size={setting['kernel']} stride={setting['stride']} "
            f"pad={setting['low']}_{setting['high']} "
            f"lhs_dilate={setting['dilated']} rhs_dilate={setting['spread']}")
  module = hlo.parse(f"""
ENTRY main (a: f32[{setting['x']},3,7], b: f32[{setting['kernel']},7,2]) -> f32[1] {{
  %a = f32[{setting['x']},3,7]{{2,1,0}} parameter(0)
  %b = f32[{setting['kernel']},7,2]{{2,1,0}} parameter(1)
  ROOT %c = f32[{out},3,2]{{2,1,0}} convolution(%a, %b), window={{{window}}}, dim_labels=0bf_0io->0bf
}}
""")  # noqa: E501
  main = module["main"]
  assert dots.flops(main, main["c"]) == 2 * 3 * 7 * 2 * pairs


def test_kernels_leave_other_calls_alone():
  module = hlo.parse("""
ENTRY main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} custom-call(%a), custom_call_target="AllocateBuffer"
}
""")
  main = module["main"]
  assert kernels.flops(main, main["c"]) == 0
  assert traffic.hbm_bytes(walk.walk(module)) == 0


def test_a_slice_that_is_fetched_early_moves_its_own_bytes():
  """As a TPU prefetches a part of a weight into on-chip memory, S(1)."""
  module = hlo.parse("""
ENTRY main (w: bf16[512,128]) -> bf16[128,128] {
  %w = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(0)
  %s = ((bf16[512,128]{1,0:T(8,128)(2,1)}), bf16[128,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:128], [0:128]}
  ROOT %d = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%s)
}
""")  # noqa: E501
  assert traffic.hbm_bytes(walk.walk(module)) == 128 * 128 * 2
