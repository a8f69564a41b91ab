"""`python -m benchmarks`: JSON lines of speed, and of its share of the limit.

  python -m benchmarks  # The shapes of the quickstart.
  python -m benchmarks --preset=smollm2-135m --dtype=bfloat16 --groups=4
  python -m benchmarks --only=generation --group-size=64

The first line is the machine. Each further line is one benchmark: the median
of `--repeats` runs after a warm-up, and `share_of_limit`, the least time that
its FLOPs and bytes need at the matrix-multiply rate and the memory bandwidth
that were measured right before it, over the time it took.
"""

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Iterator

import jax

from benchmarks import machine, runs
from posttrain import distributed, sharding
from posttrain.model.config import DTYPES, ModelConfig
from posttrain.model.presets import PRESETS

# Of a preset whose vocabulary is that of the tokenizer.
SMALL_VOCABULARY = 128


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      prog="python -m benchmarks", description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
  parser.add_argument("--dtype", default="float32", choices=DTYPES)
  parser.add_argument("--unroll", type=int, default=0,
                      help="layers per scan iteration; 0: all of them")
  parser.add_argument("--cpu-devices", type=int, default=2,
                      help="without an accelerator; 2 as in the quickstart")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--only", choices=sorted(runs.BENCHMARKS))
  for field in dataclasses.fields(runs.Shapes):
    parser.add_argument(
        f"--{field.name.replace('_', '-')}", type=int, default=field.default)
  return parser.parse_args(argv)


def model_config(arguments: argparse.Namespace) -> ModelConfig:
  preset = PRESETS[arguments.preset]
  return dataclasses.replace(
      preset, dtype=arguments.dtype,
      vocab_size=preset.vocab_size or SMALL_VOCABULARY,
      unroll=arguments.unroll or preset.layers)


def describe(config: ModelConfig) -> dict:
  """The machine, the model and the versions."""
  devices = jax.devices()
  return {
      "benchmark": "machine", "platform": devices[0].platform,
      "device": devices[0].device_kind, "devices": len(devices),
      "cores": len(os.sched_getaffinity(0))
      if hasattr(os, "sched_getaffinity") else os.cpu_count(),
      "jax": jax.__version__, "parameters": config.num_parameters,
      "dtype": config.dtype}


def measure(
    name: str, config: ModelConfig, shapes: runs.Shapes, repeats: int,
) -> dict:
  """One line: the machine's rates, then the benchmark against them."""
  rates = machine.measure(config.dtype, repeats=repeats)
  timed = runs.BENCHMARKS[name](config, shapes)
  seconds = machine.seconds_of(timed.run, repeats)
  median = statistics.median(seconds)
  limit = sum(work.seconds(*rates.values()) for work in timed.work)
  return {
      "benchmark": name, "tokens_per_sec": timed.tokens / median,
      "share_of_limit": limit / median, "seconds": median,
      "fastest": min(seconds), "slowest": max(seconds), "repeats": repeats,
      "tokens": timed.tokens, "limit_seconds": limit,
      "flops": sum(work.flops for work in timed.work),
      "bytes": sum(work.bytes for work in timed.work), **rates}


def lines(arguments: argparse.Namespace) -> Iterator[dict]:
  """The records that are printed, one after the other."""
  config = model_config(arguments)
  shapes = runs.Shapes(**{
      field.name: getattr(arguments, field.name)
      for field in dataclasses.fields(runs.Shapes)})
  with jax.set_mesh(sharding.make_mesh()):
    yield (describe(config) | dataclasses.asdict(shapes)
           | machine.measure(config.dtype, repeats=arguments.repeats))
    for name in runs.BENCHMARKS:
      if arguments.only in (None, name):
        yield measure(name, config, shapes, arguments.repeats)


def main(argv: list[str] | None = None) -> None:
  arguments = parse(argv)
  distributed.initialize(cpu_devices=arguments.cpu_devices)
  for line in lines(arguments):
    if jax.process_index() == 0:
      print(json.dumps(line), flush=True)


if __name__ == "__main__":
  main()
