"""One config -> its stages, in order; each starts from the one before.

`train` runs what has not finished; `evaluate` runs the stages that do not train
again. Both may be started any number of times. What a stage is, its record
says (`stages.stage`).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import config_dict

from posttrain import config as config_lib
from posttrain import distributed, sharding, weights
from posttrain import lease as lease_lib
from posttrain import workdir as workdir_lib
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.stages import memory_estimate
from posttrain.stages.run_context import RunContext
from posttrain.stages.stage import Stage, stage_of
from posttrain.tasks import loading
from posttrain.telemetry import console as console_lib
from posttrain.telemetry import hardware, metrics
from posttrain.text import render, thinking


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A run that is set up: what all of its stages share."""

  config: config_dict.ConfigDict
  workdir: workdir_lib.Workdir
  model: ModelConfig
  renderer: render.Renderer
  thinking_ids: thinking.ThinkingIds
  console: console_lib.Console

  def context(self, name: str) -> RunContext:
    return RunContext(
        name=name, config=self.config, workdir=self.workdir,
        renderer=self.renderer, thinking_ids=self.thinking_ids,
        console=self.console, weights_of=self.weights_of)

  def stage(self, name: str) -> Stage:
    """The record of a stage's kind."""
    return stage_of(self.config[name].kind)

  def weights_of(self, source: str) -> Transformer:
    """Loads weights of "init", an earlier stage, or a checkpoint's directory.

    Raises:
      ValueError: the stage has not finished, or the weights were trained with
        another tokenizer or chat template and are not trained anew first.
    """
    if source == "init":
      first = self.stage(self.config.stages[0]).schema
      return weights.initial(
          self.config, self.model,
          None if first.fits_tokenizer else self.renderer.hash)
    if source in self.config.stages:
      if self.finished(source) is None:
        raise workdir_lib.WorkdirError(
            f"The stage {source} has not finished in {self.workdir.path}, and "
            "its weights are needed. Run `posttrain train` to its end first.")
      return weights.of_stage(
          self.model, self.workdir, source, self.renderer.hash)
    return weights.of_directory(self.model, source, self.renderer.hash)

  def finished(self, name: str) -> int | None:
    """The rows of metrics of a finished stage, or None; process 0's view.

    Raises:
      WorkdirError: a file that says so is damaged.
    """
    return distributed.on_first_host(
        lambda: self.stage(name).finished(self.context(name)))

  def start_of(self, name: str) -> str:
    """Names the training stage that a stage starts from, or "init"."""
    before = self.config.stages[:self.config.stages.index(name)]
    trained = [n for n in before if self.stage(n).schema.trains]
    return trained[-1] if trained else "init"


def check_functions(config: config_dict.ConfigDict) -> None:
  """Finds what the config names, before the first stage rather than its own.

  Raises:
    ConfigError: a function is not there, or has no source whose hash is kept,
      or a task does not take its `args`.
  """
  problems = []
  for name, path in config_lib.functions(config).items():
    try:
      if not path.endswith(".kind"):  # A Stage, which the config has loaded.
        loading.load_function(name)
      loading.source_hash(name)
    except ValueError as error:
      problems.append(f"{path}: {error}")
  for path, section in () if problems else config_lib.tasks(config):
    try:
      loading.check_call(section["task"], section["split"], **section["args"])
    except ValueError as error:
      problems.append(f"{path}.args: {error}")
  if problems:
    raise config_lib.ConfigError(problems, "tasks and rewards")


@contextlib.contextmanager
def opened(
    config: config_dict.ConfigDict, path: str, *, wait: bool,
    **options: Any,
) -> Iterator[Pipeline]:
  """A run on its mesh, in a workdir that no other run may write meanwhile.

  Args:
    wait: for another run that holds the workdir, in place of an error.
    **options: of `set_up`.
  """
  check_functions(config)
  with jax.set_mesh(sharding.mesh_of(config.mesh)), held(path, wait) as lease:
    pipeline = set_up(config, path, **options)
    pipeline.workdir.lease = lease
    yield pipeline


@contextlib.contextmanager
def held(path: str, wait: bool) -> Iterator[lease_lib.Lease | None]:
  """Holds the lease of a workdir, in process 0; all hosts wait for it.

  Raises:
    HeldError: another run holds it.
    WorkdirError: it cannot be written.
  """
  workdir = workdir_lib.Workdir(path)
  console = console_lib.Console(quiet=jax.process_index() != 0)
  request = lease_lib.LeaseRequest(workdir.path, wait=wait, say=console.line)
  lease: lease_lib.Lease | None = None

  def take() -> None:
    nonlocal lease
    try:
      while lease is None:
        lease = request.try_acquire()
    except OSError as error:
      raise workdir_lib.unwritable(workdir.path, error) from error

  distributed.on_first_host(take)
  try:
    yield lease
  finally:
    if lease is not None:
      lease.release()


def set_up(
    config: config_dict.ConfigDict, path: str, *,
    may_differ: Sequence[str] = (), anew: bool = True,
) -> Pipeline:
  """The workdir, the tokenizer and the model's shape; no weights yet.

  The caller has set the mesh.

  Args:
    may_differ, anew: of `workdir.create`.
  """
  first = jax.process_index() == 0
  console = console_lib.Console(quiet=not first)
  devices = [f"{d.platform} {d.device_kind}" for d in jax.devices()]

  def create() -> list[str]:
    workdir, news = workdir_lib.create(
        path, config, devices=devices, may_differ=may_differ, anew=anew)
    return [*news, *metrics.mend(workdir.metrics)]

  for line in distributed.on_first_host(create):
    console.warning(line)
  workdir = workdir_lib.Workdir(path, is_writer=first)
  tokenizer = weights.tokenizer(config, workdir)
  model = weights.model_config(config, tokenizer.vocab_size, workdir)
  workdir.write_json(weights.SHAPE, model.to_json())
  return Pipeline(
      config=config, workdir=workdir, model=model,
      renderer=weights.make_renderer(config, tokenizer),
      thinking_ids=thinking.resolve(
          thinking.Thinking(**config.thinking), tokenizer),
      console=console)


def check_room(pipeline: Pipeline, stages: Sequence[str]) -> None:
  """Says which stages are too large, before time is spent on the others.

  Raises:
    ConfigError: one is, and the config does not say to go on all the same.
  """
  problems = [problem for name in stages
              for problem in memory_estimate.problems(
                  pipeline.context(name), pipeline.model)]
  if problems and pipeline.config.compute.on_too_large == "error":
    raise config_lib.ConfigError(problems, "memory")
  for problem in problems:
    pipeline.console.warning(problem)


def train(
    config: config_dict.ConfigDict, path: str, *, wait: bool = False) -> None:
  """Runs every stage that has not finished.

  Args:
    wait: for another run that holds the workdir, in place of an error.
  """
  with opened(config, path, wait=wait, may_differ=("profile",)) as pipeline:
    rows = {name: pipeline.finished(name) for name in config.stages}
    todo = [name for name, last in rows.items() if last is None]
    check_room(pipeline, todo)
    if hardware.find().peak is None:
      pipeline.console.line(
          "perf/mfu is left out: the peak of a device of the kind "
          f"{hardware.find().kind!r} is not known")
    check_problems(pipeline, todo)
    model: Transformer | None = None
    for name, last in rows.items():
      if last is not None:
        pipeline.console.line(f"{name}: finished, skipped")
        pipeline.context(name).warn_of_missing_rows(last)
        model = None  # Whoever needs its weights reads the checkpoint.
        continue
      model = run_stage(pipeline, name, model)
    pipeline.console.line(
        f"All {len(config.stages)} stages have finished. `posttrain report "
        f"--workdir={path}` makes the page.")


def check_problems(pipeline: Pipeline, names: Sequence[str]) -> None:
  """Looks at the problems of these stages, on process 0.

  Raises:
    ValueError: one could not be asked or scored, on every host.
  """
  for name in names:
    distributed.on_first_host(functools.partial(
        pipeline.stage(name).check, pipeline.context(name)))


def run_stage(
    pipeline: Pipeline, name: str, model: Transformer | None, *,
    again: bool = False,
) -> Transformer | None:
  """Runs one stage; returns the weights that the next one starts from.

  Args:
    model: what the stage before has just made; None to read its checkpoint.
    again: what a stage that does not train has computed before is made anew.
  """
  context, stage = pipeline.context(name), pipeline.stage(name)
  pipeline.console.heading(f"{name} ({context.section.kind})")
  estimates = memory_estimate.of_stage(context, pipeline.model)
  for role, estimate in estimates.items():
    pipeline.console.line(f"{role}: " * bool(role) + estimate.line())
  if model is None and stage.schema.trains:
    model = pipeline.weights_of(pipeline.start_of(name))
  return stage.run(dataclasses.replace(context, again=again), model)


def evaluate(
    config: config_dict.ConfigDict, path: str, *, wait: bool = False) -> None:
  """Runs the stages that do not train, whether they have finished or not.

  Args:
    wait: for another run that holds the workdir, in place of an error.

  Raises:
    ValueError: a stage whose weights they need has not finished.
  """
  stages = [name for name in config.stages
            if not stage_of(config[name].kind).schema.trains]
  with opened(config, path, wait=wait, anew=False,
              may_differ=("stages", "profile", *stages)) as pipeline:
    check_room(pipeline, stages)
    check_problems(pipeline, stages)
    for name in stages:
      run_stage(pipeline, name, None, again=True)
