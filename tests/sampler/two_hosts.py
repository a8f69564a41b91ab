"""A program for `launch/local.py`: one engine on all hosts.

  python launch/local.py --processes=2 --devices-per-process=2 \
      --module=tests.sampler.two_hosts -- DIRECTORY

Every process writes what it saw and decided to a file of its own.
"""

import dataclasses
import json
import pathlib
import sys

from posttrain import distributed

if __name__ == "__main__":
  distributed.initialize()

import jax
import numpy as np

from posttrain import sharding
from posttrain.sampler.continuations import continuation, fork
from tests.sampler import engine_scene as scene

FACTS = ("tokens", "finish_reason", "think_end", "think_length", "wait_count",
         "surplus", "draws", "error")


TABLE = scene.table_of([chr(97 + token % 26) for token in range(scene.V)])


def serve() -> dict:
  """Completions, and the requests in each row after each step.

  Some go on from others that were kept, in a cache that has no room for all.
  """
  rng = np.random.default_rng(11)
  asked = [dataclasses.replace(
      scene.random_request(rng, i, longest=40),
      stop_strings=((), ("qr", "s"), ("t",))[i % 3], keep=i % 2 == 0)
           for i in range(20)]
  asked.append(dataclasses.replace(asked[0], prompt=()))  # An error.
  mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
  admitted = []
  with jax.set_mesh(mesh):
    busy = scene.make_engine(symbols=TABLE, prefix_cache_tokens=300)
    numbers = [busy.submit(request) for request in asked]
    results = {}
    for done in busy.results():
      results[done.id] = done
      admitted.append([row.number if row else -1 for row in busy._active])
      if len(results) == 5:
        busy.abort(numbers[-2])
    kept = [results[n] for n in numbers[::2] if not results[n].error]
    busy.release(kept[0].id)
    more = [make(done) for done in kept for make in (
        lambda done: continuation(done, (12, 13), max_tokens=60,
                                  keep=done.id % 4 == 0),
        lambda done: fork(done, 1, max_tokens=60),
        lambda done: fork(done, 2, max_tokens=60))]
    numbers += [busy.submit(request) for request in more]
    for done in busy.results():
      results[done.id] = done
      admitted.append([row.number if row else -1 for row in busy._active])
  return {
      "admitted": admitted, "host_syncs": busy.stats.host_syncs,
      "counted": [busy.stats.prefilled_tokens, busy.stats.reused_tokens,
                  busy.stats.evicted_tokens],
      "cached": sorted(entry.tokens for entry in busy._prefill.cache.entries),
      "programs": sorted(map(str, busy.stats.programs)),
      "results": [
          {name: getattr(results[n], name) for name in FACTS}
          | {"logprobs": results[n].logprobs.tolist()} for n in numbers]}


if __name__ == "__main__":
  found = serve()
  path = pathlib.Path(sys.argv[1], f"{jax.process_index()}.json")
  path.write_text(json.dumps(found))
