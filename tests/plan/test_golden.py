"""Programs that libtpu compiles here, for slices that are not here.

The bounds are those of jax 0.10.2 and libtpu 0.0.42.1: a layout that needs
another collective in a layer, or a gradient that is made in another layout
than its weight's, is seen here.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed; `make plan-deps` does it")

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = "tests/plan/golden_config.py"
LAYERS, MICROBATCHES, CHUNKS = 3, 2, 2


def plan(*flags, config=GOLDEN):
  """Exit status and output; in a process of its own, as JAX is set up."""
  found = subprocess.run(
      [sys.executable, "-m", "posttrain", "plan", f"--config={config}",
       *map(str, flags)],
      cwd=ROOT, capture_output=True, text=True,
      env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"})
  return found.returncode, found.stdout + found.stderr


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
  folder = tmp_path_factory.mktemp("plan")
  status, output = plan(
      "--topology=v5e:2x2", f"--json={folder}/plan.json",
      f"--html={folder}/plan.html")
  assert status == 0, output
  page = (folder / "plan.html").read_text()
  [figures] = re.findall(r'id="plan">(.*?)</script>', page, re.S)
  return json.loads((folder / "plan.json").read_text()), json.loads(figures)


def collectives(program):
  found: dict = {}
  for each in program["collectives"]:
    key = each["kind"], each["axis"]
    found[key] = found.get(key, 0) + each["count"]
  return found


def test_the_json_is_as_promised(golden):
  short, _ = golden
  assert list(short) == ["topology", "devices", "programs"]
  assert (short["topology"], short["devices"]) == ("v5e:2x2", 4)
  assert [program["name"] for program in short["programs"]] == [
      "cold_start/update", "reason/unstack", "reason/empty[rows=16 S=32]",
      "reason/done", "reason/empty[rows=4 S=16]",
      "reason/prefill[rows=4 S=16]", "reason/place[rows=4 S=16 to 32]",
      "reason/place[rows=4 S=16 to 64]", "reason/begin",
      "reason/resize[S=32 to 64]", "reason/decode[S=32]",
      "reason/decode[S=64]", "reason/ref_logprobs", "reason/update"]
  for program in short["programs"]:
    assert list(program) == [
        "name", "fits", "bytes_per_device", "hbm_bytes_available",
        "dot_flops", "collectives", "roofline_s"]
    assert program["fits"] and program["roofline_s"] > 0
    assert program["bytes_per_device"] < program["hbm_bytes_available"]


def test_collectives_of_a_layer(golden):
  short, _ = golden
  found = collectives(short["programs"][0])
  runs = LAYERS * MICROBATCHES
  # Seven weights forward, and seven for what is computed again; a table for
  # the tokens and one for the head, whatever the chunks.
  assert found["all-gather", "fsdp"] <= 14 * runs + 2 * MICROBATCHES
  # Two sums forward and three backward; of the head, six in each chunk.
  assert found["all-reduce", "tensor"] <= 5 * runs + MICROBATCHES * (
      6 * CHUNKS + 1)
  # Gradients: one scatter and one sum of the others, and one of the norms.
  assert found["reduce-scatter", "fsdp"] <= runs + MICROBATCHES
  assert found["all-reduce", "fsdp"] <= 2 * runs + 3 * MICROBATCHES
  assert {kind for kind, _ in found} <= {
      "all-gather", "all-reduce", "reduce-scatter"}


def test_transposes_beside_weight_gradients(golden):
  """Of seven weights three accumulators are turned, once an update."""
  _, figures = golden
  found = figures["programs"][0]["measured"]["counts"]["transposes"]
  assert sum(each["count"] for each in found) <= 3


def test_decode_reads_little_more_than_weights_and_cache(golden):
  """Nothing is gathered or summed but what a layer and the head need."""
  short, _ = golden
  found = collectives(next(
      each for each in short["programs"]
      if each["name"] == "reason/decode[S=32]"))
  steps = 16
  assert found["all-reduce", "tensor"] <= steps * (2 * LAYERS + 1)
  assert ("all-gather", "fsdp") not in found


def test_what_is_beside_is_counted(golden):
  """Adam's two moments, and the reference, while the sampler runs."""
  _, figures = golden
  memory = {p["name"]: p["measured"]["memory"] for p in figures["programs"]}
  beside = memory["reason/prefill[rows=4 S=16]"]["beside"]
  assert beside["optimizer"] - 4 == 2 * beside["reference"]
  assert set(memory["reason/ref_logprobs"]["beside"]) == {
      "policy", "optimizer"}
  for each in memory.values():
    assert each["arguments"] < each["padded_arguments"]


def test_a_program_that_is_too_large_is_advised(tmp_path):
  status, output = plan(
      "--topology=v5e:2x2", "--only=cold_start/update",
      f"--json={tmp_path}/plan.json",
      "--config.cold_start.sequence_length=32768",
      "--config.cold_start.rows=64", "--config.compute.remat=none")
  assert status == 3, output
  [program] = json.loads((tmp_path / "plan.json").read_text())["programs"]
  assert not program["fits"] and program["dot_flops"] is None
  assert program["bytes_per_device"] > program["hbm_bytes_available"]
  assert "cold_start.num_microbatches=2 (more parts" in output
  assert "remat" in output and "slice" in output


ROLES = (
    "--topology=v5e:2x2", "--config.mesh.roles=split",
    "--config.mesh.fsdp=2", "--config.mesh.tensor=1",
    "--config.mesh.sampling.devices=2", "--config.mesh.sampling.tensor=2",
    "--config.mesh.sampling.fsdp=1", "--config.reason.rollout.max_num_seqs=8")


@pytest.mark.slow
def test_a_role_is_compiled_on_its_own_devices(tmp_path):
  """Two of four chips, where slots are refilled."""
  status, output = plan(
      *ROLES, "--only=reason/decode", f"--json={tmp_path}/plan.json")
  assert status == 0, output
  assert "training on fsdp=2, tensor=1; sampling on fsdp=1, tensor=2" in output
  found = json.loads((tmp_path / "plan.json").read_text())["programs"]
  assert [each["name"] for each in found] == [
      "reason/decode[S=32]", "reason/decode[S=64]"]
  for each in found:
    assert {(c["axis"], c["group_size"]) for c in each["collectives"]} == {
        ("tensor", 2)}


@pytest.mark.slow
def test_every_program_of_split_roles_compiles(tmp_path):
  status, output = plan(
      *ROLES, "--only=reason/", f"--html={tmp_path}/plan.html")
  assert status == 0, output
  [figures] = re.findall(
      r'id="plan">(.*?)</script>', (tmp_path / "plan.html").read_text(), re.S)
  figures = json.loads(figures)
  [moved] = figures["transfers"]
  # Matrices in bfloat16, halved; the norms and the table stay float32.
  matrices = LAYERS * 2 * (256 * 64 * 2 * (4 + 2) + 3 * 256 * 512) // 2
  assert moved["received"] == moved["received_first"] == (
      matrices + 4 * (512 * 256 // 2 + (2 * LAYERS + 1) * 256))
  roles = {each["name"]: each["modelled"]["role"]
           for each in figures["programs"]}
  assert {name for name, role in roles.items() if role == "training"} == {
      name for name in roles if name.startswith((
          "reason/gather", "reason/fingerprints_sent", "reason/ref_logprobs",
          "reason/update"))}
  for each in figures["programs"]:
    beside = each["measured"]["memory"]["beside"]
    assert ("optimizer" in beside) == (
        roles[each["name"]] == "training" and "update" not in each["name"])


def by_hand(model, *, rows, length, remat, layers=2):
  """FLOPs of one microbatch, forward and backward, over all devices."""
  tokens, width = rows * length, model["heads"] * model["head_dim"]
  kv = model["kv_heads"] * model["head_dim"]
  again = {"none": 3, "dots": 3, "full": 4}[remat]
  weights = model["embed"] * (2 * width + 2 * kv + 2 * model["mlp"])
  weights = again * weights + 3 * model["embed"] * model["mlp"]
  # Scores and values; computed again unless everything is kept.
  pairs = (3 if remat == "none" else 4) * 2 * length * width
  # In parts of bfloat16: three products forward, three again, two backward.
  head = 8 * model["embed"] * -(-model["vocab_size"] // 128) * 128
  return 2 * tokens * (layers * (weights + pairs) + head)


GQA = dict(embed=256, mlp=512, heads=8, kv_heads=2, head_dim=32)
MHA = dict(embed=128, mlp=640, heads=4, kv_heads=4, head_dim=64)
SHAPES = {
    "grouped, full": (GQA, "full", (2, 2), "vocab_size=512"),
    "untied, none": (MHA, "none", (4, 1), "tied_embeddings=False"),
    "bias and norms, dots": (MHA, "dots", (1, 4), "qk_norm=head"),
    "windows, full": (GQA, "full", (2, 2), "sliding_window=32"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_within_two_percent_of_a_hand_count(name, tmp_path):
  shape, remat, (fsdp, tensor), extra = SHAPES[name]
  fields = shape | dict(layers=2, vocab_size=384)
  key, _, value = extra.partition("=")
  fields[key] = {"512": 512, "32": 32, "False": False}.get(value, value)
  if key == "sliding_window":
    fields |= dict(layer_pattern=("local", "global"), final_softcap=30.0)
  if key == "qk_norm":
    fields |= dict(qkv_bias=True)
  config = tmp_path / "config.py"
  config.write_text((ROOT / GOLDEN).read_text().replace(
      "  config.mesh = ", f"  config.model_overrides = {fields!r}\n"
      "  config.mesh = "))
  status, output = plan(
      "--topology=v5e:2x2", "--only=cold_start/update",
      f"--json={tmp_path}/plan.json", f"--config.mesh.fsdp={fsdp}",
      f"--config.mesh.tensor={tensor}", f"--config.compute.remat={remat}",
      config=config)
  assert status == 0, output
  [program] = json.loads((tmp_path / "plan.json").read_text())["programs"]
  expected = MICROBATCHES * by_hand(
      fields, rows=4, length=256, remat=remat) / 4
  assert program["dot_flops"] == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_mosaic_accepts_the_splash_kernel(tmp_path):
  """It is counted by hand: of nine products and two that are made again."""
  status, output = plan(
      "--topology=v5e:2x2", "--only=cold_start/update",
      f"--html={tmp_path}/plan.html", "--config.model_overrides.head_dim=128",
      "--config.compute.attention=splash",
      "--config.reason.rollout.max_prompt_tokens=128",
      "--config.reason.sequence_length=256")
  assert status == 0, output
  page = (tmp_path / "plan.html").read_text()
  [figures] = re.findall(r'id="plan">(.*?)</script>', page, re.S)
  [program] = json.loads(figures)["programs"]
  counts = program["measured"]["counts"]
  rows, heads = 2, 2  # On one of two by two devices.
  one = 2 * rows * heads * 256**2 * 128
  assert not counts["uncounted"]
  assert counts["kernel_flops"] == LAYERS * MICROBATCHES * one * (
      2 + 2 + 4 + 3) / 2


@pytest.mark.slow
def test_replicas_on_two_slices_exchange_gradients_only(tmp_path):
  status, output = plan(
      "--topology=v5e:2x2", "--num_slices=2", "--only=cold_start/update",
      "--config.mesh.data=2", f"--json={tmp_path}/plan.json")
  assert status == 0, output
  assert "2 x v5e:2x2: 8 chips" in output
  [program] = json.loads((tmp_path / "plan.json").read_text())["programs"]
  across = [each for each in program["collectives"] if each["across_slices"]]
  assert {(each["kind"], each["axis"]) for each in across} == {
      ("all-reduce", "data")}
  # A device sends its part of each gradient, in the dtype it was made in:
  # those of matrices in bfloat16, of the tables and norms in float32.
  matrices = 3 * (256 * 64 * 2 * (4 + 2) + 3 * 256 * 512)
  most = MICROBATCHES * (2 * matrices + 2 * 4 * 512 * 256) / 4
  assert sum(each["bytes"] for each in across) < 1.1 * most


@pytest.mark.slow
def test_a_split_length_is_exchanged_for_heads(tmp_path):
  """Of each layer: q, k, v and what is attended, forward, again, backward."""
  status, output = plan(
      "--topology=v5e:2x2", "--only=cold_start/update",
      "--config.mesh.tensor=1", "--config.mesh.context=2",
      f"--json={tmp_path}/plan.json")
  assert status == 0, output
  [program] = json.loads((tmp_path / "plan.json").read_text())["programs"]
  found = collectives(program)
  assert 0 < found["all-to-all", "context"] <= 12 * LAYERS * MICROBATCHES
