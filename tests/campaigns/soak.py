"""Soak: requests, continuations, forks, aborts and evictions, all at random.

  python -m tests.campaigns.soak --requests=2000 --seed=0

Several engines, with tight and wide budgets of the prefix cache and chunks of
their own, serve what is drawn. Every completion is compared with that of its
whole prompt alone, in an engine that caches nothing. The bytes of live device
arrays stay below what the settings foresee.
"""

import argparse
import collections
import dataclasses
import time

import jax
import numpy as np

from posttrain.sampler.continuations import continuation, fork
from tests import meshes
from tests.sampler import engine_scene as scene
from tests.sampler.test_continuations import TABLE, whole_prompts

# Budget of the prefix cache, decode chunk, tokens and rows of a prefill.
ENGINES = [(9000, 8, 16, 1), (600, 5, 8, 2), (150, 13, 16, 3), (1, 3, 32, 1)]
LONGEST = 128  # Slots of a row: some continuations do not fit.


def live_bytes() -> int:
  return sum(x.nbytes for x in jax.live_arrays())


class Soak:
  """One engine, what it was asked for, and what came out."""

  def __init__(self, seed: int, budget: int, chunk: int, tokens: int,
               rows: int):
    self.rng = np.random.default_rng([seed, budget])
    self.engine = scene.make_engine(
        symbols=TABLE, prefix_cache_tokens=budget, chunk=chunk,
        prefill_chunk=tokens, prefill_rows=rows, min_seq_len=64)
    self.asked, self.done, self.kept = {}, {}, []
    self.counts = collections.Counter()
    self.bytes = live_bytes()

  @property
  def most_bytes(self) -> int:
    """What live arrays may have: a ring, the cache, and prompts beside it."""
    engine, settings = self.engine, self.engine.settings
    ring = engine._batch.rows.cache
    slot = sum(x.nbytes for x in jax.tree.leaves(ring)) / (
        settings.rows * ring.slots)
    prompts = settings.prefill_rows * settings.prefill_sizes(LONGEST)[-1]
    return self.bytes + int(slot * (
        settings.rows * settings.sizes[-1] + settings.prefix_cache_tokens
        + prompts)) + 2**16  # And what is counted in rows, not in slots.

  def submit(self, kind: str) -> None:
    """Submits a request of a kind, with most of its fields at random."""
    rng, number = self.rng, len(self.asked)
    request = scene.random_request(rng, number, longest=40)
    if kind != "request" and self.kept:
      parent = self.kept[rng.integers(len(self.kept))]
      new = rng.integers(12, scene.V, rng.integers(0, 10)).tolist()
      change = {name: getattr(request, name) for name in (
          "max_tokens", "max_thinking_tokens", "min_thinking_tokens",
          "num_waits", "truncate", "params")}
      request = (fork(parent, int(rng.integers(-3, 4)), new, **change)
                 if kind == "fork" else continuation(parent, new, **change))
    elif rng.random() < 0.05:
      request = dataclasses.replace(request, parent=int(rng.integers(-2, 99)))
    request = dataclasses.replace(
        request, keep=bool(rng.random() < 0.6),
        stop_strings=((), ("ab", "lm"), ("f",))[rng.integers(3)])
    self.asked[self.engine.submit(request)] = request
    self.counts[kind] += 1

  def run(self, count: int) -> None:
    """Goes on until `count` requests have ended."""
    rng, most = self.rng, self.most_bytes
    self.submit("request")
    for done in self.engine.results():
      self.done[done.id] = done
      self.counts[done.finish_reason] += 1
      if done.request.keep and not done.error:
        self.kept.append(done)
      while len(self.kept) > 12 or (self.kept and rng.random() < 0.1):
        gone = self.kept[rng.integers(len(self.kept))]
        self.engine.release(gone.id)
        if rng.random() < 0.9:  # Else somebody goes on from it all the same.
          self.kept.remove(gone)
        self.counts["released"] += 1
      if rng.random() < 0.1:
        running = [n for n in self.asked if n not in self.done]
        if running:
          self.engine.abort(int(rng.choice(running)))
      waiting = len(self.asked) - len(self.done)
      for _ in range(min(int(rng.integers(0, 4)) + (waiting < 3),
                         count - len(self.asked))):
        self.submit(str(rng.choice(
            ["request", "continuation", "fork"], p=[0.3, 0.4, 0.3])))
      assert live_bytes() <= most, f"{live_bytes()} bytes, {most} foreseen"

  def compare(self) -> tuple[int, int]:
    """Compares with solo runs; returns near-ties that part, and tokens."""
    ran = [done for done in self.done.values() if done.finish_reason != "error"]
    alone = whole_prompts(max_num_seqs=1, symbols=TABLE)
    flips = tokens = 0
    for done, want in zip(
        ran, scene.take(alone, map(scene.alone, ran)), strict=True):
      tokens += len(done.tokens)
      if done.finish_reason == "abort":
        cut = want.tokens[:len(done.tokens)]
        if done.tokens == cut:
          continue
      flips += scene.flips(done, want)
    return flips, tokens


def soak(requests: int, seed: int, engines=ENGINES) -> str:
  """Runs the soak; returns a line about it, and raises where a check fails."""
  started = time.monotonic()
  total, flips, tokens = collections.Counter(), 0, 0
  count = requests // len(engines)
  for options in engines:
    run = Soak(seed, *options)
    run.run(count)
    assert len(run.done) == len(run.asked) == count
    assert len(run.engine.stats.programs) <= run.engine.most_programs
    parted, compared = run.compare()
    flips, tokens = flips + parted, tokens + compared
    total += run.counts
    total.update({name: getattr(run.engine.stats, name) for name in (
        "prefilled_tokens", "reused_tokens", "evicted_tokens")})
  assert flips <= 1 + tokens / 50_000, f"{flips} flips in {tokens} tokens"
  counts = ", ".join(f"{name} {n}" for name, n in sorted(total.items()))
  return (f"{requests} requests, seed {seed}: {tokens} tokens, {flips} near-"
          f"ties; {counts}; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--requests", type=int, default=2000)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  with jax.set_mesh(meshes.one()):
    print(soak(arguments.requests, arguments.seed), flush=True)
