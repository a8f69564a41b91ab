"""Both ways of forcing a budget end in the same completions' lengths."""

import jax

from benchmarks import budget, ours
from tests import meshes
from tests.benchmarks.test_works import MINIATURE


def test_restarting_computes_more_for_as_many_tokens():
  with jax.set_mesh(meshes.one()):
    model = ours.random_model(ours.model_config(MINIATURE))
    line = budget.restart(
        model, budget.parse(["--prompts=3", "--new=32", "--repeats=1"]))
  # In the loop each token goes through the model once: prompts, then the rest.
  # Each wait feeds the token before it once more.
  assert line["in_loop_tokens_computed"] == 3 * (64 + 32 + budget.WAITS)
  tasks = budget.make_tasks(model.config, 3, 32)
  # Three stretches of thinking and the answer: each begins with its text.
  more = 0
  for task in tasks:
    first, second = task.stops[0] + 1, sum(task.stops) + 2
    more += 3 * 64 + first + second + task.think + len(budget.CLOSING)
  assert line["restarting_tokens_computed"] > line["in_loop_tokens_computed"]
  drawn = 3 * 32
  assert line["restarting_tokens_computed"] <= 3 * 64 + drawn + more


def test_a_script_stops_behind_each_stretch():
  task = budget.Task(prompt=(9,), stops=(2, 3), think=8, new=10)
  script = task.script(*task.stops).tolist()
  # The step behind each delimiter forces the wait in its place.
  assert script == [-1, -1, budget.END, -1, *[-1] * 3, budget.END, *[-1] * 4]
