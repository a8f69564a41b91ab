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
from tests.sampler import engine_scene as scene

FACTS = ("tokens", "finish_reason", "think_end", "think_length", "wait_count",
         "surplus", "error")


TABLE = scene.table_of([chr(97 + token % 26) for token in range(scene.V)])


def serve() -> dict:
  """Completions, and the requests in each row after each step."""
  rng = np.random.default_rng(11)
  asked = [dataclasses.replace(
      scene.random_request(rng, i, longest=40),
      stop_strings=((), ("qr", "s"), ("t",))[i % 3]) for i in range(20)]
  asked.append(dataclasses.replace(asked[0], prompt=()))  # An error.
  mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
  admitted = []
  with jax.set_mesh(mesh):
    busy = scene.make_engine(symbols=TABLE)
    numbers = [busy.submit(request) for request in asked]
    results = {}
    for done in busy.results():
      results[done.id] = done
      admitted.append([row.number if row else -1 for row in busy._active])
      if len(results) == 5:
        busy.abort(numbers[-2])
  return {
      "admitted": admitted, "host_syncs": busy.stats.host_syncs,
      "programs": sorted(map(str, busy.stats.programs)),
      "results": [
          {name: getattr(results[n], name) for name in FACTS}
          | {"logprobs": results[n].logprobs.tolist()} for n in numbers]}


if __name__ == "__main__":
  found = serve()
  path = pathlib.Path(sys.argv[1], f"{jax.process_index()}.json")
  path.write_text(json.dumps(found))
