"""Memory of reading a large release, in a process of its own.

The bound: peak resident memory, less what importing the libraries takes, is at
most 1.3 times the largest shard and the parameters of this host.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from posttrain.interop import hugging_face_models, parameters, safetensors_file
from posttrain.model.config import ModelConfig

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ModelConfig(
    vocab_size=32_000, embed=1024, mlp=4096, layers=32, heads=16, kv_heads=4,
    head_dim=64, tied_embeddings=False)
SHARDS = 4

READ = """
import sys
import jax
from posttrain import sharding
from posttrain.interop import hugging_face
from posttrain.model import transformer

status = lambda key: int(next(
    line for line in open("/proc/self/status") if line.startswith(key)
).split()[1]) * 1024
before = status("VmRSS")
with jax.set_mesh(sharding.make_mesh(tensor=int(sys.argv[3]))):
  files = hugging_face.read(sys.argv[1])
  model = jax.block_until_ready(hugging_face.load(
      files, hugging_face.model_config(files), dtype=sys.argv[2]))
  size = sum(shard.data.nbytes for leaf in jax.tree.leaves(model)
             for shard in leaf.addressable_shards)
  print("MEASURED", before, status("VmHWM"), size)
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory):
  """1.1 GB of random bfloat16 in four shards, tensors in a mixed order."""
  path = tmp_path_factory.mktemp("large")
  (path / "config.json").write_text(
      json.dumps(hugging_face_models.to_json(CONFIG)))
  shapes = parameters.shapes(hugging_face_models.table(CONFIG), CONFIG.layers)
  rng = np.random.default_rng(0)
  names = rng.permutation(list(shapes))
  index = {}
  kind = safetensors_file.DTYPES["BF16"]
  for shard, part in enumerate(np.array_split(names, SHARDS)):
    file = f"model-{shard}.safetensors"
    writer = safetensors_file.Writer(
        path / file, {name: shapes[name] for name in part}, kind)
    for name in part:
      writer.write(rng.standard_normal(
          shapes[name], np.float32).astype(kind))
      index[str(name)] = file
    writer.close()
  (path / "model.safetensors.index.json").write_text(
      json.dumps({"weight_map": index}))
  return path


@pytest.mark.slow
@pytest.mark.parametrize("dtype, devices", [
    ("float32", 1), ("bfloat16", 1), ("float32", 4)])
def test_host_memory_stays_near_one_shard(release, dtype, devices):
  sizes = [file.stat().st_size for file in release.glob("*.safetensors")]
  assert sum(sizes) > 1e9
  done = subprocess.run(
      [sys.executable, "-c", READ, release, dtype, str(min(devices, 2))],
      cwd=ROOT, text=True, capture_output=True, check=False,
      env=os.environ | {
          "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS":
          f"--xla_force_host_platform_device_count={devices}"})
  assert done.returncode == 0, done.stderr[-4000:]
  found = re.search(r"MEASURED (\d+) (\d+) (\d+)", done.stdout)
  before, peak, parameters_size = map(int, found.groups())
  taken, bound = peak - before, 1.3 * max(sizes) + parameters_size
  print(f"{dtype} on {devices}: {sum(sizes) / 1e9:.2f} GB in shards of up to "
        f"{max(sizes) / 1e9:.2f} GB: {taken / 1e9:.2f} GB taken, of which "
        f"parameters {parameters_size / 1e9:.2f}; bound {bound / 1e9:.2f}")
  assert taken <= bound
