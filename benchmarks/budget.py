"""`python -m benchmarks.budget`: cost and gain of budget forcing in the loop.

Two comparisons, the sides of each in turns:

- plain sampling against sampling as many tokens with a thinking budget; and
  plain sampling against itself, which is the noise;
- the budget inside the loop against the method for an engine that has none:
  stop at the delimiter or the limit, edit the text, and start again from it as
  a new prompt. Each row tries to stop twice, is told to wait, and is closed at
  its limit. A row starts again as soon as it stopped, while others go on.

A line of JSON for each.
"""

import argparse
import dataclasses
import json

import jax
import numpy as np

from benchmarks import ours, shapes, sides
from posttrain import distributed, sharding
from posttrain.sampler import sampler, token_sampling
from posttrain.sampler.engine import Engine, Settings
from posttrain.sampler.requests import Completion, Request
from posttrain.text import thinking

END, WAIT, NEWLINE, ANSWER = 1, 2, 3, (4, 5, 6, 7)
IDS = thinking.ThinkingIds(
    end=(END,), newline=(NEWLINE,), final_answer=ANSWER, wait=(WAIT,))
CLOSING = (NEWLINE, END, *ANSWER)
WAITS = 2


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      prog="python -m benchmarks.budget", description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--prompts", type=int, default=32)
  parser.add_argument("--new", type=int, default=128)
  sides.add_arguments(parser)
  return parser.parse_args(argv)


def cost(model, arguments: argparse.Namespace) -> dict:
  """Compares the same rows and tokens with and without a budget."""
  config, new = model.config, arguments.new
  prompts = shapes.tokens(arguments.prompts, 64, config.vocab_size)

  def side(ids: thinking.ThinkingIds, limits: sampler.Limits):
    draws = sampler.Sampler(
        tables=sides.tables(config, ids),
        params=token_sampling.SamplingParams(), max_prompt_tokens=64, chunk=new)
    return lambda: int(draws.generate(
        model, prompts, limits, prompt_id=range(len(prompts)), seed=0,
        stage="benchmark").lengths.sum())

  plain = sampler.Limits(new)
  found = sides.take({
      "plain": side(thinking.ThinkingIds(), plain),
      "plain_again": side(thinking.ThinkingIds(), plain),
      "forced": side(IDS, dataclasses.replace(
          plain, max_thinking_tokens=new // 2, num_waits=WAITS))},
      len(prompts) * new, repeats=arguments.repeats, locks=arguments.lock)
  share = lambda name, clock: found[name][clock] / found["plain"][clock] - 1
  return {
      "benchmark": "budget_cost", "size": arguments.size,
      "rows": len(prompts), "new": new,
      **{f"{name}_{clock}_seconds": found[name][clock]
         for name in found for clock in ("wall", "cpu")},
      **{f"{what}_{clock}": share(name, clock)
         for what, name in (("cost", "forced"), ("noise", "plain_again"))
         for clock in ("wall", "cpu")}}


@dataclasses.dataclass(frozen=True)
class Task:
  """One row: where it would stop, and its limits of thinking and of all tokens.
  """

  prompt: tuple[int, ...]
  stops: tuple[int, ...]  # Tokens of each stretch of thinking.
  think: int
  new: int

  def script(self, *stretches: int) -> np.ndarray:
    """Makes a choice for each step: a delimiter after each stretch, others
    drawn (-1).
    """
    choices = np.full(self.new + WAITS, -1, np.int32)
    at = 0
    for stretch in stretches:
      at += stretch
      choices[at] = END
      at += 2  # A step takes it back, and the next one forces the wait.
    return choices


def make_tasks(config, count: int, new: int) -> list[Task]:
  draw = np.random.default_rng(0)
  return [
      Task(tuple(prompt), tuple(draw.integers(new // 8, new // 3, WAITS)),
           3 * new // 4, new)
      for prompt in shapes.tokens(count, 64, config.vocab_size)]


class InLoop:
  """Forces the budget inside the engine's loop."""

  def __init__(self, model, tasks: list[Task]):
    self._tasks, self.computed = tasks, 0
    self._engine = _engine(model, tasks)

  def __call__(self) -> int:
    before = _computed(self._engine)
    for i, task in enumerate(self._tasks):
      self._engine.submit(Request(
          prompt=task.prompt, max_tokens=task.new, prompt_id=i,
          max_thinking_tokens=task.think, num_waits=WAITS,
          script=task.script(*task.stops)))
    done = list(self._engine.results())
    self.computed = _computed(self._engine) - before
    assert all(row.wait_count == WAITS for row in done)
    return sum(len(row.tokens) for row in done)


class Restarting:
  """Stops, edits and starts again, on an engine that knows stop ids only."""

  def __init__(self, model, tasks: list[Task]):
    self._tasks, self.computed = tasks, 0
    self._engine = _engine(model, tasks, thinking.ThinkingIds())
    self._running: dict[int, tuple[Task, list[int], int]] = {}

  def __call__(self) -> int:
    before = _computed(self._engine)
    for task in self._tasks:
      self._think(task, [], 0)
    total = 0
    for row in self._engine.results():
      total += self._go_on(row)
    self.computed = _computed(self._engine) - before
    return total

  def _think(self, task: Task, said: list[int], waits: int) -> None:
    """Requests a stretch of thinking, to the delimiter or the limit."""
    stretch = task.stops[waits:waits + 1]
    number = self._engine.submit(Request(
        prompt=task.prompt + tuple(said), max_tokens=task.think - len(said),
        stop_ids=(END,), script=task.script(*stretch)))
    self._running[number] = task, said, waits

  def _go_on(self, row: Completion) -> int:
    """Goes on after a stretch; returns the completion's tokens if it was the
    last.
    """
    task, said, waits = self._running.pop(row.id)
    said = said + list(row.tokens)
    if waits > WAITS:  # That was the answer.
      return len(said)
    if said[-1] == END:
      self._think(task, [*said[:-1], WAIT], waits + 1)
      return 0
    said += CLOSING
    number = self._engine.submit(Request(
        prompt=task.prompt + tuple(said), max_tokens=task.new - len(said)))
    self._running[number] = task, said, WAITS + 1
    return 0


def _engine(model, tasks: list[Task], ids=IDS) -> Engine:
  longest = max(len(task.prompt) + task.new for task in tasks)
  return Engine(model, sides.tables(model.config, ids), Settings(
      max_num_seqs=len(tasks), max_seq_len=longest + len(CLOSING) + 1,
      min_seq_len=longest + len(CLOSING) + 1, prefill_chunk=64))


def _computed(engine: Engine) -> int:
  """Counts the tokens that went through the model so far."""
  return engine.stats.row_steps + engine.stats.prefilled_tokens


def restart(model, arguments: argparse.Namespace) -> dict:
  """Compares the budget in the loop with stop, edit and restart."""
  tasks = make_tasks(model.config, arguments.prompts, arguments.new)
  ways = {"in_loop": InLoop(model, tasks),
          "restarting": Restarting(model, tasks)}
  found = sides.take(dict(ways), arguments.prompts * arguments.new,
               repeats=arguments.repeats, locks=arguments.lock)
  return {
      "benchmark": "budget_restart", "size": arguments.size,
      "rows": len(tasks), "new": arguments.new,
      **{f"{name}_{clock}_seconds": found[name][clock]
         for name in ways for clock in ("wall", "cpu")},
      **{f"{name}_tokens_computed": side.computed
         for name, side in ways.items()},
      **{f"ratio_{clock}": found["restarting"][clock] / found[
          "in_loop"][clock] for clock in ("wall", "cpu")}}


def main(argv: list[str] | None = None) -> None:
  arguments = parse(argv)
  distributed.initialize(cpu_devices=1)
  with jax.set_mesh(sharding.make_mesh()):
    model = ours.random_model(ours.model_config(shapes.SIZES[arguments.size]))
    for benchmark in (cost, restart):
      print(json.dumps(benchmark(model, arguments)), flush=True)


if __name__ == "__main__":
  main()
