"""A small pipeline on a toy task; a config file; and a program of its own.

  python -m tests.pipeline_run train --config=tests/pipeline_run.py ...

is `posttrain train`, but with KILL_IN_CHUNK=n in the environment it kills
itself before the nth chunk that it decodes: within a rollout, where no file
tells a watcher. With KILL_IN_WRITE=n it does so in the middle of writing its
nth line of a journal, and with KILL_IN_CALL=n:FILE the toy's calls do it. With
SLOW_CHUNKS=n:seconds a chunk takes so long from the nth on. PATIENT waits after
each chunk for all calls, so that a second turn begins at the same chunk however
long a call takes. SLOW=i makes the chunks of process i slow. SEEN=FOLDER makes
each process write what it learns from.
"""

import atexit
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import signal
import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np

from posttrain import __main__, pipeline, sharding
from posttrain import config as config_lib
from posttrain.episodes import calls as calls_lib
from posttrain.episodes import journal, workers
from posttrain.model.transformer import Transformer
from posttrain.sampler import decode
from posttrain.stages import loop, rl
from posttrain.stages.run_context import RunContext
from posttrain.train import preemption

TOY = "tests.stages.toy"
# One shape of prompts and completions, so that sampling compiles once.
ROLLOUT = dict(max_prompt_tokens=6, max_tokens=10, chunk=10)
CONFIG = dict(
    model_overrides=dict(
        layers=2, embed=32, mlp=64, heads=4, kv_heads=2, head_dim=8),
    tokenizer=dict(
        train=f"{TOY}:corpus", model_type="word",
        symbols=("<think>", "</think>")),
    chat_template="plain",
    thinking=dict(newline="", wait_text="wait"),
    stages=("reason",),
    cold_start=dict(
        kind="sft", num_steps=4, rows=8, sequence_length=24,
        learning_rate=1e-2, eps=1e-4, log_every=1,
        data=dict(sources=(dict(task=f"{TOY}:demonstrations"),))),
    # The large epsilon keeps rounding from turning into a step's sign.
    reason=dict(
        kind="rl", num_steps=4, num_groups=4, group_size=4,
        sequence_length=24, rows_per_microbatch=2, learning_rate=1e-2,
        eps=1e-4, problems=dict(task=f"{TOY}:problems"),
        rewards=(f"{TOY}:reward",), rollout=ROLLOUT,
        log_every=1, save_rollouts_every=1, show_sample_every=0),
    measure=dict(
        kind="evaluate",
        problems=dict(
            task=f"{TOY}:problems", count=6, args=dict(thinks=True)),
        reward=f"{TOY}:picky", extract=f"{TOY}:extract",
        samples_per_problem=4, pass_at=(1, 2, 4), majority=dict(max_samples=4),
        max_thinking_tokens=(0, 2, 5), num_waits=(0, 1, 2),
        rollout=ROLLOUT | dict(max_num_seqs=16)),
)
ALL = ["stages=cold_start,reason,measure"]


def get_config():
  return ml_collections.ConfigDict(CONFIG)


def make_pipeline(path, assignments=()) -> pipeline.Pipeline:
  """The run in the workdir `path`, on the current mesh."""
  return pipeline.set_up(
      config_lib.assign(CONFIG, assignments, "test"), str(path))


@functools.cache
def pool(folder: str) -> workers.WorkerPool:
  """Workers for all tests of a process whose working directory is `folder`."""
  found = workers.WorkerPool(workers.Settings())
  atexit.register(found.close)
  return found


def calls() -> calls_lib.Calls:
  """Calls that those workers make."""
  return calls_lib.Calls(pool(os.getcwd()))


class Learner(rl.Learner):
  """The stage's body, whose updates give their rows as the loop has them."""

  def __init__(self, context, start):
    super().__init__(calls(), context, start)
    self.step_health = loop.step_health(context)

  def update(self, span=contextlib.nullcontext):
    update = super().update(span)
    return loop.row_of(
        self.context, self.step_health, self.step, update,
        jax.device_get(update.values))


def make_learner(path, assignments=(), weights_of=None) -> Learner:
  """The stage "reason" before its first step, from random weights."""
  run = make_pipeline(path, assignments)
  context = dataclasses.replace(
      run.context("reason"), weights_of=weights_of or run.weights_of)
  return Learner(context, start(run))


def start(run: pipeline.Pipeline) -> Transformer:
  """Random weights whose choices are far from uniform."""
  scale = lambda w: w * 2 if w.ndim > 2 else w
  return jax.tree.map(scale, run.weights_of("init"))


def from_start(run: pipeline.Pipeline, name: str) -> RunContext:
  """A stage for which all weights are those of `start`."""
  return dataclasses.replace(
      run.context(name), weights_of=lambda source: start(run))


def train(path, assignments=()) -> None:
  """All stages of the config."""
  pipeline.train(config_lib.assign(CONFIG, assignments, "test"), str(path))


def parameters(path, assignments=(), stage="reason") -> dict[str, np.ndarray]:
  """Reads a finished stage's last checkpoint, by path; on one device."""
  with jax.set_mesh(sharding.make_mesh(1, 1, jax.devices()[:1])):
    model = make_pipeline(path, assignments).weights_of(stage)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(model))
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def before_chunks(do: Callable[[int], None]) -> None:
  """Calls `do` with the number of each chunk, from 1, before it is decoded."""
  chunk, original = itertools.count(1), decode.decode

  def decode_after(*args, **kwargs):
    do(next(chunk))
    return original(*args, **kwargs)

  decode.decode = decode_after


def count_chunks(monkeypatch, leave_before: int = 0) -> list[int]:
  """Counts the chunks that are decoded from here on, in the list.

  Args:
    leave_before: as if SIGTERM came before that chunk, counted from 1; 0:
      never. The engine also looks for it while nothing decodes, and is not
      counted then.
  """
  chunks, original = [], decode.decode

  def decode_one(*args, **kwargs):
    chunks.append(1)
    return original(*args, **kwargs)

  def look():
    if len(chunks) == leave_before - 1:
      raise preemption.Preempted("in a rollout")

  monkeypatch.setattr(decode, "decode", decode_one)
  monkeypatch.setattr(preemption, "leave_if_requested", look)
  return chunks


def misbehave() -> None:
  """Fails in the way that the environment names."""
  if "KILL_IN_CHUNK" in os.environ:
    number = int(os.environ["KILL_IN_CHUNK"])
    before_chunks(lambda chunk: chunk == number and os.kill(
        os.getpid(), signal.SIGKILL))
  os.environ["RUN_PID"] = str(os.getpid())  # For the workers.
  if "KILL_IN_WRITE" in os.environ:
    kill_in_write(int(os.environ["KILL_IN_WRITE"]))
  if "PATIENT" in os.environ:
    wait_for_calls()
  if "SEEN" in os.environ:
    write_what_is_seen(pathlib.Path(os.environ["SEEN"]))
  if os.environ.get("SLOW", "none") == os.environ.get("POSTTRAIN_PROCESS_ID"):
    before_chunks(lambda chunk: time.sleep(0.1))
  if "SLOW_CHUNKS" in os.environ:
    first, seconds = map(float, os.environ["SLOW_CHUNKS"].split(":"))
    before_chunks(lambda chunk: time.sleep(seconds * (chunk >= first)))


def kill_in_write(number: int) -> None:
  """Leaves a half of the nth line behind; the header is one of them."""
  lines, original = itertools.count(1), journal._write

  def write(file, content):
    if next(lines) == number:
      original(file, content[:len(content) // 2])
      os.kill(os.getpid(), signal.SIGKILL)
    original(file, content)

  journal._write = write


def wait_for_calls() -> None:
  """Takes the results of all calls at once, and in the order of the calls."""
  ended = calls_lib.Calls._ended

  def all_ended(self, seconds):
    found = []
    while self._numbers:
      found += ended(self, 0.1)
    return sorted(found)

  calls_lib.Calls._ended = all_ended


def write_what_is_seen(folder: pathlib.Path) -> None:
  """A line for each batch of RL, in a file for each process."""
  collect = rl.Learner.collect

  def collect_and_write(self):
    collect(self)
    seen = {name: x.tolist() for name, x in self.experience.items()} | {
        name: x for name, x in self.rollout_metrics.items()
        if not name.startswith(("time/", "perf/"))}
    with (folder / f"{jax.process_index()}.jsonl").open("a") as file:
      file.write(json.dumps(seen) + "\n")

  rl.Learner.collect = collect_and_write


if __name__ == "__main__":
  misbehave()
  __main__.run()
