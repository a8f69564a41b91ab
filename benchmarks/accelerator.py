"""`python -m benchmarks.accelerator`: shares of an accelerator's limits.

A training step and the decode loop of a 1B-class model in bfloat16, with random
weights: the step's model FLOPs per second as a share of the chip's peak (MFU),
and the bytes that a decode step has to read, weights and the cache in use, per
second as a share of the memory's bandwidth. Peak and bandwidth are measured in
the same run, by a large product and a copy; where the chip's published peak is
known, the share of that is given too. A line of JSON for each.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import machine, ours, shapes, sides
from benchmarks.shapes import Shape
from posttrain import distributed, sharding
from posttrain.model import presets, transformer
from posttrain.model.config import ModelConfig
from posttrain.objectives import supervised
from posttrain.sampler import decode
from posttrain.sampler.engine import Engine
from posttrain.sampler.requests import Request, Settings
from posttrain.stages import memory_estimate
from posttrain.telemetry import flops, memory
from posttrain.telemetry import hardware as machine_lib
from posttrain.text import thinking
from posttrain.train import step

SIDE = 8192  # Of the square matrices that the peak is measured with.


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      prog="python -m benchmarks.accelerator", description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="llama3.2-1b", help="a preset")
  parser.add_argument("--json", help="file for the lines")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument(
      "--train", nargs="*", default=["8x2048:remat=full"],
      metavar="ROWSxLENGTH:FIELD=VALUE,...",
      help="steps to time; fields are ModelConfig's")
  parser.add_argument(
      "--decode", nargs="*", default=["64x512"],
      metavar="ROWSxPROMPT:FIELD=VALUE,...",
      help="loops to time; cache_dtype and weights_dtype are the sampler's")
  parser.add_argument("--steps", type=int, default=64, help="of a chunk")
  return parser.parse_args(argv)


def variant(text: str) -> tuple[int, int, dict[str, Any]]:
  """Parses `8x2048:remat=full,unroll=4` -> 8, 2048, fields."""
  sizes, _, fields = text.partition(":")
  rows, _, length = sizes.partition("x")
  pairs = [field.split("=") for field in fields.split(",") if field]
  return int(rows), int(length), {
      name: int(value) if value.isdecimal() else value
      for name, value in pairs}


def seconds(run: Callable[[], Any], repeats: int) -> float:
  """Median of the seconds; the first two calls compile and warm up."""
  for _ in range(2):
    jax.block_until_ready(run())
  taken = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    taken.append(time.perf_counter() - start)
  return statistics.median(taken)


def matrix_rate() -> float:
  """Measures bfloat16 FLOPs per second of a large product of random matrices.
  """
  key = jax.random.key(0)
  x = jax.random.normal(key, (SIDE, SIDE), jnp.bfloat16)
  multiply = jax.jit(lambda x: x @ x)
  return 2 * SIDE**3 / machine.seconds_of(lambda: multiply(x), 20)


def train(
    config: ModelConfig, rows: int, length: int, repeats: int,
) -> dict[str, float]:
  """Measures an SFT update on full rows, each of them one example."""
  batch = ours.full_rows(Shape(rows=rows, length=length), config.vocab_size)
  state, update = ours.trainer(
      transformer.init(config, 0),
      functools.partial(
          step.evaluate, supervised.cross_entropy, chunk=ours.LOSS_CHUNK))

  def run():
    nonlocal state
    state, metrics = update(state, batch, 1)
    return metrics

  taken = seconds(run, repeats)
  work = flops.update(
      config, rows * length, (length + 1) / 2, logits=rows * length)
  return {"seconds": taken, "tokens_per_s": rows * length / taken,
          "model_flops_per_s": work / taken}


def decode_loop(
    config: ModelConfig, rows: int, prompt: int, steps: int, repeats: int, *,
    cache_dtype: str = "compute", weights_dtype: str = "compute",
) -> dict[str, float]:
  """Measures chunks of the decode loop: rows that never end, one cache size."""
  chunks = repeats + 2
  slots = prompt + (chunks + 1) * steps
  model = transformer.init(config, 0)
  engine = Engine(
      model, sides.tables(config, thinking.ThinkingIds()), Settings(
          max_num_seqs=rows, max_seq_len=slots, min_seq_len=slots, chunk=steps,
          prefill_chunk=prompt, max_ids=0, cache_dtype=cache_dtype,
          weights_dtype=weights_dtype))
  for i, tokens in enumerate(shapes.tokens(rows, prompt, config.vocab_size)):
    engine.submit(Request(
        prompt=tuple(tokens), max_tokens=(chunks + 1) * steps, prompt_id=i,
        stage="benchmark"))
  per_slot = memory.cache_bytes(config, rows=rows, slots=1, dtype=cache_dtype)
  whole, blocks = decode.unstacked.eval_shape(
      model, weights_dtype=weights_dtype)
  weights = memory_estimate.bytes_of(
      (blocks, getattr(whole, whole.head_name)))
  run = engine.step  # The first one prefills, and is not measured.
  taken = seconds(run, repeats) / steps
  in_use = per_slot * (prompt + chunks * steps / 2)  # As they are measured.
  return {"seconds": taken, "tokens_per_s": rows / taken,
          "weights_bytes": weights, "cache_bytes": in_use,
          "bytes_per_s": (weights + in_use) / taken}


def main(argv: list[str] | None = None) -> None:
  arguments = parse(argv)
  distributed.initialize()
  lines: list[dict[str, Any]] = []

  def put(**line: Any) -> None:
    lines.append(line)
    print(json.dumps(line), flush=True)

  with jax.set_mesh(sharding.make_mesh()):
    found, peak, moved = machine_lib.find(), matrix_rate(), machine.bandwidth(5)
    put(device=found.kind, jax=jax.__version__, matrix_flops_per_s=peak,
        published_flops_per_s=found.peak, memory_bytes_per_s=moved)
    base = dataclasses.replace(
        presets.PRESETS[arguments.model], dtype="bfloat16")
    for text in arguments.train:
      rows, length, fields = variant(text)
      line = train(dataclasses.replace(base, **fields), rows, length,
                   arguments.repeats)
      rate = line["model_flops_per_s"]
      put(work="train", variant=text, **line, share_of_measured=rate / peak,
          **found.mfu("mfu", rate, 1.0))
    for text in arguments.decode:
      rows, prompt, fields = variant(text)
      dtypes = {name: fields.pop(name) for name in (
          "cache_dtype", "weights_dtype") if name in fields}
      line = decode_loop(
          dataclasses.replace(base, **fields), rows, prompt, arguments.steps,
          arguments.repeats, **dtypes)
      put(work="decode", variant=text, **line,
          share_of_bandwidth=line["bytes_per_s"] / moved)
  if arguments.json:
    with open(arguments.json, "w") as file:
      file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
  main()
