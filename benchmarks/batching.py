"""`python -m benchmarks.batching`: continuous against static batching.

Completions of lognormal lengths, the longest at least `--tail` times the mean,
are drawn twice by the same model with the same number of rows decoded together:
in batches, each of which waits for its longest row (static batching), and in
one queue, where a row that ends makes room for the next request (continuous
batching). Both are the engine. Both sides take turns, so that other load meets
both. A line of JSON has medians and their ratio, on the wall and in process CPU
seconds.
"""

import argparse
import json

import jax
import numpy as np

from benchmarks import ours, shapes, sides
from posttrain import distributed, sharding
from posttrain.sampler.engine import Engine, Settings
from posttrain.sampler.requests import Request
from posttrain.text import thinking


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      prog="python -m benchmarks.batching", description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  sides.add_arguments(parser)
  parser.add_argument("--requests", type=int, default=256)
  parser.add_argument("--rows", type=int, default=32)
  parser.add_argument("--prompt", type=int, default=16)
  parser.add_argument("--mean", type=float, default=48)
  parser.add_argument("--tail", type=float, default=8)
  return parser.parse_args(argv)


def lognormal_lengths(count: int, mean: float, tail: float) -> np.ndarray:
  """Draws [count] int lengths, spread until longest / mean is `tail`."""
  normal = np.random.default_rng(0).normal(size=count)
  for sigma in np.arange(0.2, 3, 0.05):
    shape = np.exp(sigma * normal)
    lengths = np.maximum(1, np.round(shape * mean / shape.mean())).astype(int)
    if lengths.max() >= tail * lengths.mean():
      return lengths
  raise ValueError(f"{count} lengths do not reach a tail of {tail}.")


class Drawing:
  """Draws all lengths with an engine, `batch` requests at a time.

  A batch of as many requests as there are rows is static batching: it waits
  for its longest row. One of all requests is continuous batching.
  """

  def __init__(self, model, tables, prompts, lengths, *, rows, batch):
    longest = len(prompts[0]) + int(lengths.max())
    self._batch = batch
    self._engine = Engine(model, tables, Settings(
        max_num_seqs=rows, max_seq_len=longest, chunk=32,
        prefill_chunk=len(prompts[0]), prefill_rows=max(1, rows // 8)))
    self._asked = [
        Request(prompt=tuple(prompt), max_tokens=int(length), prompt_id=i,
                stage="benchmark")
        for i, (prompt, length) in enumerate(
            zip(prompts, lengths, strict=True))]
    self.steps = 0

  def __call__(self) -> int:
    before, tokens = self._engine.stats.steps, 0
    for start in range(0, len(self._asked), self._batch):
      for request in self._asked[start:start + self._batch]:
        self._engine.submit(request)
      tokens += sum(len(done.tokens) for done in self._engine.results())
    self.steps = self._engine.stats.steps - before
    return tokens

  @property
  def occupancy(self) -> float:
    return self._engine.occupancy


def measure(model, arguments: argparse.Namespace) -> dict:
  """Measures both ways of drawing the same lengths."""
  config = model.config
  lengths = lognormal_lengths(
      arguments.requests, arguments.mean, arguments.tail)
  prompts = shapes.tokens(len(lengths), arguments.prompt, config.vocab_size)
  tables = sides.tables(config, thinking.ThinkingIds())
  ways = {name: Drawing(
      model, tables, prompts, lengths, rows=arguments.rows, batch=batch)
          for name, batch in (
              ("static", arguments.rows), ("continuous", len(lengths)))}
  total = int(lengths.sum())
  found = sides.take(
      dict(ways), total, repeats=arguments.repeats, locks=arguments.lock)
  return {
      "benchmark": "batching", "size": arguments.size,
      "requests": len(lengths), "rows": arguments.rows, "tokens": total,
      "longest_to_mean": lengths.max() / lengths.mean(),
      "occupancy": ways["continuous"].occupancy,
      **{f"{name}_steps": way.steps for name, way in ways.items()},
      **{f"{name}_tokens_per_{clock}_sec": total / found[name][clock]
         for name in ways for clock in ("wall", "cpu")},
      **{f"ratio_{clock}": found["static"][clock] / found[
          "continuous"][clock] for clock in ("wall", "cpu")}}


def main(argv: list[str] | None = None) -> None:
  arguments = parse(argv)
  distributed.initialize(cpu_devices=1)
  with jax.set_mesh(sharding.make_mesh()):
    model = ours.random_model(ours.model_config(shapes.SIZES[arguments.size]))
    print(json.dumps(measure(model, arguments)), flush=True)


if __name__ == "__main__":
  main()
