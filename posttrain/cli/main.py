"""Command line: `posttrain train | eval | sample | report | ...`.

Arguments and the config are checked before JAX is imported, so that a typing
mistake costs a second. Exit status: 0 finished; 1 failed; 2 the command or
its config is wrong; 3 a plan that does not fit; 69 another host is lost; 75
preempted. After the last two the same command goes on from what is saved.
"""

import argparse
import errno
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from ml_collections import config_dict

from posttrain import config as config_lib
from posttrain import host_connections, lease, mistakes, rendezvous
from posttrain import workdir as workdir_lib
from posttrain.cli import arguments as arguments_lib
from posttrain.cli import sampling_arguments
from posttrain.config.stages import schema_of
from posttrain.model import presets
from posttrain.plan import environment
from posttrain.tasks import exits, jsonl, loading
from posttrain.text import budget_rules, instructions, messages
from posttrain.train import health

CommandError = arguments_lib.CommandError

FAILED, USAGE_ERROR = 1, 2
# Errors of a disk rather than ours, for which a traceback is no help.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES,
        errno.EPERM, errno.EIO)
BEST_OF_SWEEP = 3  # The default of --compile-best.


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  argv = sys.argv[1:] if argv is None else list(argv)
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(f"{arguments_lib.OVERVIEW}\n{arguments_lib.EXIT_STATUS}")
    # Help that was asked for is a success; a missing verb is not.
    return 0 if argv else USAGE_ERROR
  try:
    verb, arguments = arguments_lib.parse(argv)
    with exits.refused(_release_and_part):
      return VERBS[verb](arguments)
  except (CommandError, config_lib.ConfigError, environment.PlanError,
          workdir_lib.WorkdirError, lease.HeldError) as error:
    print(f"posttrain: {error}", file=sys.stderr)
    return USAGE_ERROR
  except (health.HealthError, rendezvous.StartError, exits.Unfinished,
          lease.LostError,
          workdir_lib.StorageError) as error:  # Their message is the remedy.
    return _failed(str(error))
  except Exception as error:
    if isinstance(error, OSError) and error.errno in DISK:
      return _failed(
          f"{error.filename or 'A file of the run'} could not be written or "
          f"read: {os.strerror(error.errno)}. Is the disk full or read-only? "
          "Checkpoints are whole or not there: the same command goes on.")
    mistake = mistakes.line(error)
    if mistake is None:
      raise
    print(f"posttrain: {mistake}", file=sys.stderr)
    return USAGE_ERROR


def _failed(message: str) -> int:
  # If another process is lost, that is the better message.
  host_connections.wait_for_loss()
  print(f"posttrain: {message}", file=sys.stderr)
  return FAILED


def _release_and_part() -> None:
  """Frees the lease and the other processes, which would otherwise wait."""
  lease.release_all()
  here = host_connections.current()
  if here is not None:
    here.part(FAILED)


# JAX is imported within the verbs, once their arguments are known to be right.


def train(arguments: argparse.Namespace) -> int:
  config = _config(arguments)
  if not config.stages:
    raise CommandError("stages: the config names none, so there is nothing "
                       "to train.")
  _start(config)
  from posttrain import pipeline
  pipeline.train(
      config, arguments.workdir, wait=arguments.wait_for_workdir)
  return 0


def evaluate(arguments: argparse.Namespace) -> int:
  workdir_lib.open_existing(arguments.workdir)
  config = _config(arguments)
  kinds = {name: config[name].kind for name in config.stages}
  if all(schema_of(kind).trains for kind in kinds.values()):
    raise CommandError(
        f"the config has no stage that evaluates, only {kinds}; give "
        "--config=FILE with one.")
  _start(config)
  from posttrain import pipeline
  pipeline.evaluate(
      config, arguments.workdir, wait=arguments.wait_for_workdir)
  return 0


def sample(arguments: argparse.Namespace) -> int:
  _one_source(arguments)
  rows = _prompts(arguments)
  config = _start_sampling(arguments)
  from posttrain.cli import sample as sample_stage
  sample_stage.run(
      config, rows, output=arguments.output,
      num_samples=arguments.num_samples, ask=_asked(arguments),
      **_drawn(arguments))
  return 0


def chat(arguments: argparse.Namespace) -> int:
  _one_source(arguments)
  config = _start_sampling(arguments)
  from posttrain.cli import chat as chat_stage
  chat_stage.run(config, **_drawn(arguments))
  return 0


def _drawn(arguments: argparse.Namespace) -> dict[str, Any]:
  """Collects the sampling flags: the model and its distribution."""
  from posttrain.sampler import sampler, token_sampling
  return dict(
      workdir=arguments.workdir, stage=arguments.stage, seed=arguments.seed,
      cache_dtype=arguments.cache_dtype, weights_dtype=arguments.weights_dtype,
      params=token_sampling.SamplingParams(
          temperature=arguments.temperature, top_k=arguments.top_k,
          top_p=arguments.top_p, min_p=arguments.min_p),
      limits=sampler.Limits(
          max_tokens=arguments.max_tokens,
          max_thinking_tokens=arguments.max_thinking_tokens,
          max_thinking_steps=arguments.max_thinking_steps,
          min_thinking_tokens=arguments.min_thinking_tokens,
          num_waits=arguments.num_waits),
      options={name: getattr(arguments, name)
               for name in sampling_arguments.OPTIONS})


def _asked(arguments: argparse.Namespace) -> str:
  """Builds the instruction of the prompts; "" for none."""
  for kind, amount in (("tokens", arguments.ask_tokens),
                       ("steps", arguments.ask_steps)):
    if amount is not None:
      return instructions.with_amount(instructions.TEXTS[kind], amount)
  length = arguments.ask_length
  return instructions.TEXTS[length] if length else ""


def report(arguments: argparse.Namespace) -> int:
  workdirs = [workdir_lib.open_existing(path).path
              for path in arguments.workdir]
  output = pathlib.Path(arguments.output or workdirs[0] / "report.html")
  from posttrain import report as report_lib
  report_lib.build(workdirs, output)
  print(f"{report_lib.figures(workdirs)}{output}")
  return 0


def export(arguments: argparse.Namespace) -> int:
  _one_source(arguments)
  if arguments.step is not None and (
      not arguments.workdir or arguments.stage == "init"):
    raise CommandError("--step has no effect without a stage of --workdir.")
  if arguments.adapter_of and (
      not arguments.workdir or arguments.dtype != "float32"):
    raise CommandError(
        "--adapter-of takes the adapters of a --workdir, in float32.")
  _check_output(arguments)
  config = _config(arguments)
  _start(config)
  from posttrain import convert
  convert.export(
      config, arguments.output, workdir=arguments.workdir,
      stage=arguments.stage, step=arguments.step, dtype=arguments.dtype,
      shard_bytes=int(arguments.shard_gb * 1e9),
      adapter_of=arguments.adapter_of)
  return 0


def import_(arguments: argparse.Namespace) -> int:
  _check_output(arguments)
  if not arguments.model:
    raise CommandError("--model=MODEL is needed.")
  config = _config(arguments)
  if config.init.kind != "preset":
    raise CommandError(
        f"--model={arguments.model} has been imported already; name it as "
        "init.path of a config.")
  _start(config)
  from posttrain import convert
  convert.import_release(config, arguments.output)
  return 0


def plan(arguments: argparse.Namespace) -> int:
  if not arguments.config:
    raise CommandError("--config=FILE is needed.")
  best = arguments.compile_best
  if best is not None and not arguments.sweep:
    raise CommandError("--compile-best has no effect without --sweep.")
  environment.prepare()  # Before JAX, which a kind of one's own may import.
  config = _config(arguments)
  if not config.stages:
    raise CommandError("stages: the config names none, so there is nothing "
                       "to plan.")
  from posttrain.plan import topology
  where = topology.parse(arguments.topology, arguments.num_slices)
  environment.check()  # Last: a mistake in the command is found without it.
  from posttrain.plan import command
  return command.run(
      config, where, json_file=arguments.json, html_file=arguments.html,
      only=arguments.only, sweeping=arguments.sweep,
      compile_best=BEST_OF_SWEEP if best is None else best)


VERBS = {
    "train": train, "eval": evaluate, "sample": sample, "chat": chat,
    "report": report, "export": export, "import": import_, "plan": plan}


def _start(config: config_dict.ConfigDict) -> None:
  """Joins the other processes of the run."""
  from posttrain import distributed
  distributed.initialize(cpu_devices=config.mesh.cpu_devices)


def _config(arguments: argparse.Namespace) -> config_dict.ConfigDict:
  """Loads the config that the flags name: a file's, a preset's or a workdir's.
  """
  if getattr(arguments, "config", None):
    return config_lib.load(arguments.config, arguments.assignments)
  if getattr(arguments, "model", None):
    return config_lib.assign(
        _of_model(arguments.model), arguments.assignments, "--model")
  if not pathlib.Path(arguments.workdir, "config.json").exists():
    if "stage" not in arguments:  # `train`; other verbs need a run.
      raise CommandError(
          f"{arguments.workdir} holds no run yet; give --config=FILE.")
    workdir_lib.open_existing(arguments.workdir)  # Raises, as there is none.
  return workdir_lib.read_config(arguments.workdir, arguments.assignments)


def _of_model(name: str) -> dict[str, Any]:
  """Makes a config that starts from the weights that --model names."""
  path = pathlib.Path(name)
  if not path.exists():
    if name not in presets.PACKAGED:
      what = ("is the name of a shape, whose weights are not here"
              if name in presets.PRESETS else "is no directory and no file")
      raise CommandError(
          f"--model={name} {what}. Nothing is downloaded: name the directory "
          "of a release (config.json, *.safetensors and the tokenizer's "
          "files), a GGUF file, a directory of posttrain import, or "
          f"{' or '.join(presets.PACKAGED)}, which comes as a package.")
    return dict(model=name, init=dict(kind="preset"), stages=())
  # A stage's checkpoints, or one of them: others' folders have such names too.
  folder = path.parent if path.name.isdecimal() else path
  ours = (path / "model.json").exists() or folder.name == "checkpoints"
  kind = "directory" if ours else "preset"
  return dict(model="", init=dict(kind=kind, path=name), stages=())


def _one_source(arguments: argparse.Namespace) -> None:
  given = [flag for flag in ("model", "workdir", "config")
           if getattr(arguments, flag)]
  if len(given) != 1:
    raise CommandError(
        "give one of --model=MODEL, --workdir=DIR and --config=FILE; found "
        f"{' and '.join('--' + flag for flag in given) or 'none'}.")
  if arguments.stage and not arguments.workdir:
    raise CommandError("--stage has no effect without --workdir.")


def _check_output(arguments: argparse.Namespace) -> None:
  """Checks --output before JAX is imported; the writer checks it again."""
  if pathlib.Path(arguments.output).exists():
    raise CommandError(
        f"{arguments.output} exists, and is not overwritten. Name a new "
        "--output.")


def _check_sampling(
    arguments: argparse.Namespace, config: config_dict.ConfigDict,
) -> None:
  thinking = config.thinking
  for problem in budget_rules.problems(
      vars(arguments), end=thinking.end, step=thinking.step,
      more_wait_texts=thinking.more_wait_texts, name=_flag):
    raise CommandError(problem)
  unused = dict(top_k=0, top_p=1, min_p=0, num_samples=1)
  inert = [_flag(name) for name, value in unused.items()
           if getattr(arguments, name, value) != value]
  if arguments.temperature == 0 and inert:
    raise CommandError(
        f"{inert[0]} has no effect with --temperature=0 (the default).")
  if arguments.logits_processor_args and not arguments.logits_processor:
    raise CommandError(
        "--logits-processor-args has no effect without --logits-processor.")


def _flag(name: str) -> str:
  """The flag that sets a field, or a key of the config."""
  return f"--config.{name}" if "." in name else f"--{name.replace('_', '-')}"


def _start_sampling(arguments: argparse.Namespace) -> config_dict.ConfigDict:
  """Checks the flags of sampling, starts JAX, and returns the config."""
  config = _config(arguments)
  _check_sampling(arguments, config)
  _start(config)
  for flag in "logits_processor", "budget_schedule":  # They may import JAX.
    try:
      if name := getattr(arguments, flag):
        loading.load_function(name)
    except ValueError as error:
      raise CommandError(f"{_flag(flag)}: {error}") from error
  return config


def _prompts(arguments: argparse.Namespace) -> list[dict[str, Any]]:
  """Reads rows with a `prompt` or `messages` from the flags."""
  if bool(arguments.prompt) == bool(arguments.prompts):
    raise CommandError("give one of --prompt=TEXT and --prompts=FILE.jsonl.")
  if arguments.prompt:
    rows = [dict(prompt=text) for text in arguments.prompt]
    try:
      jsonl.check(rows)
    # Bytes in the arguments that are not UTF-8 become surrogates.
    except ValueError as error:
      raise CommandError(f"--prompt: {error}.") from error
    return rows
  path = pathlib.Path(arguments.prompts)
  if not path.is_file():
    raise CommandError(f"--prompts: there is no file {path}.")
  rows = [_prompt(line, f"{path}, line {number}")
          for number, line in jsonl.lines(path) if line.strip()]
  if not rows:
    raise CommandError(f"{path} has no rows.")
  return rows


def _prompt(line: bytes, where: str) -> dict[str, Any]:
  try:
    row = jsonl.parse(line)
    if isinstance(row, jsonl.Repeated):
      raise ValueError(f"{', '.join(row.keys_twice)} is there twice")
    messages.of_row(row)
  except ValueError as error:
    raise CommandError(f"{where}: {error}.") from error
  return row
