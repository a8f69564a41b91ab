"""Command-line arguments: flags of every verb, their help, and their errors.

An error names the nearest flag or verb.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from posttrain.cli import sampling_arguments
from posttrain.cli.sampling_arguments import add_asking, number
from posttrain.config import keys

OVERVIEW = """\
Post-training of language models: supervised fine-tuning, GRPO, and evaluation
with a budget of thinking tokens, from one config file.

  posttrain train    runs the stages of a config, or resumes them
  posttrain eval     evaluates a trained workdir again
  posttrain sample   prints completions of a model
  posttrain chat     talks with a model in the terminal
  posttrain report   makes one HTML page of one or several runs
  posttrain export   writes trained weights as transformers reads them
  posttrain import   reads published weights once, into a checkpoint
  posttrain plan     compiles a config for a TPU slice that is not here

`posttrain VERB --help` has the flags and examples.
"""

EXIT_STATUS = """\
exit status: 0 finished, or a plan that fits; 1 failed; 2 a wrong command or
config; 3 a plan with a program that does not fit; 69 another host is lost;
75 preempted (SIGTERM) with its state saved; 143 SIGTERM in the first instant.
After the last three the same command goes on from the last checkpoint."""

TRAIN = """\
Runs the stages of a config in order. Finished stages are skipped and an
interrupted one goes on from its last checkpoint, so the same command starts
and resumes. Another config in the same workdir is an error once something has
been trained there, and so is a second run in it at the same time.

examples:
  posttrain train --config=configs/tiny.py:debug --workdir=runs/try
  posttrain train --config=configs/tiny.py --workdir=runs/tiny \\
      --config.reason.num_steps=40 --config.stages=cold_start,reason
  posttrain train --workdir=runs/tiny        (resume with the saved config)
"""

EVAL = """\
Runs the evaluate stages of a trained workdir again, for instance with more
problems. Without --config the workdir's own config is used.

examples:
  posttrain eval --workdir=runs/tiny
  posttrain eval --workdir=runs/tiny --config.measure.problems.count=512 \\
      --config.measure.num_waits=0,1,2,4
"""

CHAT = """\
Talks with a model, turn by turn; weights as for `posttrain sample`. Thinking is
dimmed and forced tokens are marked. /budget 512 and /wait 2 change the thinking
of the turns that follow; /help has the other commands.

examples:
  posttrain chat --model=smollm2-135m
  posttrain chat --workdir=runs/mine --temperature=0.7 \\
      --max-thinking-tokens=256
"""

SAMPLE = """\
Prints completions, as they are drawn. Weights come from published files, from
a directory of `posttrain import`, from the last finished training stage of a
workdir, or from what a config starts with. Forced tokens are marked.

examples:
  posttrain sample --model=smollm2-135m \\
      --prompt="What is the capital of France?"
  posttrain sample --workdir=runs/tiny --stage=reason \\
      --prompt="6 5 2 2 : 1 <think>" \\
      --temperature=1 --num-samples=4 --max-thinking-tokens=64 --num-waits=1
  posttrain sample --workdir=runs/tiny --prompts=questions.jsonl \\
      --output=answers.jsonl
"""

REPORT = """\
Writes one self-contained HTML page with the curves, the scaling plot and the
samples of one or several runs, and prints the accuracies and where it is.

examples:
  posttrain report --workdir=runs/tiny
  posttrain report --workdir=runs/a --workdir=runs/b --output=compare.html
"""

EXPORT = """\
Writes a directory that `transformers` loads with no code of ours: config.json,
generation_config.json, weights as safetensors, tokenizer and chat template.
It takes any checkpoint of any training stage, or published weights.

examples:
  posttrain export --workdir=runs/tiny --output=exported/tiny
  posttrain export --workdir=runs/tiny --stage=reason --step=20 \\
      --output=exported/tiny-20 --dtype=bfloat16
  posttrain export --workdir=runs/lora --adapter-of=exported/smollm2 \\
      --output=exported/adapter
  posttrain export --model=smollm2-135m --output=exported/smollm2
  posttrain export --model=model.gguf --output=exported/model
"""

IMPORT = """\
Reads published weights once and writes them as a checkpoint, with tokenizer,
chat template and shape. A config starts from it with model="",
init.kind="directory" and init.path=OUTPUT. This is quicker than reading the
release at every start, and each host reads its own part; a config can also
start from the release itself: init.kind="preset", init.path=RELEASE.

A release is a directory as `transformers` saves it (config.json, *.safetensors
and the tokenizer's files), a GGUF file, or a preset whose files are found by
themselves. docs/models.md has the families.

examples:
  posttrain import --model=downloads/Qwen3-0.6B --output=models/qwen3-0.6b
  posttrain import --model=model.gguf --output=models/mine
"""


PLAN = """\
Compiles every program that the stages of a config would run, for a TPU slice
that is not here, and says whether they fit, what they communicate and how fast
they can be at best. Nothing is allocated and no weights are read. Needs the
compiler: pip install 'posttrain[plan]'. See docs/pods.md.

examples:
  posttrain plan --config=configs/tiny.py --topology=v5e:2x2
  posttrain plan --config=configs/tiny.py --topology=v5p:4x4x4 --num_slices=2 \\
      --config.mesh.tensor=2 --json=plan.json --html=plan.html
  posttrain plan --config=configs/tiny.py --topology=v5e:2x2 --sweep \\
      --compile-best=3
"""


MODEL = ("published weights: a directory as transformers saves it, a GGUF "
         "file, smollm2-135m (by its package), a directory of posttrain "
         "import, or a stage's folder of checkpoints")


RENAMED = {
    "--policy": "--budget-schedule", "--hook": "--logits-processor",
    "--hook-args": "--logits-processor-args"}


class CommandError(ValueError):
  """The command line is wrong; the message says what to write."""


class _Parser(argparse.ArgumentParser):
  """Parses long flags in full; its errors name the nearest flag or verb."""

  def __init__(self, **kwargs: Any):
    super().__init__(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

  def error(self, message: str) -> NoReturn:
    raise CommandError(f"{message}\nSee `{self.prog} --help`.")

  def flags(self) -> list[str]:
    return [flag for action in self._actions
            for flag in action.option_strings if flag.startswith("--")]


def make_parsers() -> dict[str, _Parser]:
  """Makes one parser per verb."""
  parsers = {}
  for verb, text, add_flags in (
      ("train", TRAIN, _add_train), ("eval", EVAL, _add_eval),
      ("sample", SAMPLE, _add_sample), ("chat", CHAT, _add_chat),
      ("report", REPORT, _add_report), ("export", EXPORT, _add_export),
      ("import", IMPORT, _add_import), ("plan", PLAN, _add_plan)):
    parsers[verb] = _Parser(
        prog=f"posttrain {verb}", description=text, epilog=EXIT_STATUS)
    add_flags(parsers[verb])
  return parsers


def _add_config(parser: Any, text: str) -> None:
  parser.add_argument("--config", metavar="FILE[:ARG]", help=text)
  _add_keys(parser)


def _add_keys(parser: Any) -> None:
  parser.add_argument(
      "--config.KEY", metavar="VALUE", dest="unused", help=(
          "set one key of the config, such as --config.mesh.tensor=4; a tuple "
          "is written a,b. docs/configs.md lists the keys"))


def _add_train(parser: _Parser) -> None:
  _add_config(parser, "the config; needed at the first start")
  parser.add_argument(
      "--workdir", metavar="DIR", required=True,
      help="where everything is written; the same on every host")
  _add_wait(parser)


def _add_eval(parser: _Parser) -> None:
  _add_config(parser, "a config with the evaluate stages (default: the "
              "workdir's own)")
  parser.add_argument("--workdir", metavar="DIR", required=True,
                      help="a workdir of posttrain train")
  _add_wait(parser)


def _add_wait(parser: _Parser) -> None:
  parser.add_argument(
      "--wait-for-workdir", action="store_true",
      help="wait while another run holds the workdir, in place of an error")


def _add_weights(parser: _Parser) -> None:
  weights = parser.add_argument_group("weights, one of")
  weights.add_argument("--model", metavar="MODEL", help=MODEL)
  weights.add_argument("--workdir", metavar="DIR", help="a trained workdir")
  _add_config(weights, "what this config's `init` names")
  parser.add_argument("--stage", metavar="NAME", default="", help=(
      "with --workdir: a training stage, or init (default: the last finished "
      "training stage)"))


def _add_chat(parser: _Parser) -> None:
  _add_weights(parser)
  sampling_arguments.add(
      parser.add_argument_group("sampling, to begin with"),
      sampling_arguments.SAMPLING)
  sampling_arguments.add(parser.add_argument_group(
      "thinking, to begin with (its strings: --config.thinking.end=...)"),
      sampling_arguments.THINKING)


def _add_sample(parser: _Parser) -> None:
  _add_weights(parser)
  prompts = parser.add_argument_group("prompts, one of")
  prompts.add_argument("--prompt", metavar="TEXT", action="append",
                       default=[], help="may be given several times")
  prompts.add_argument("--prompts", metavar="FILE.jsonl", help=(
      "one object per line, with a prompt or messages"))
  add_asking(parser.add_argument_group("instructions in the prompts, one of"))
  sampling = parser.add_argument_group("sampling")
  sampling.add_argument("--num-samples", metavar="N", default=1,
                        type=number(int, keys.SAMPLES), help="per prompt (1)")
  sampling_arguments.add(sampling, sampling_arguments.SAMPLING)
  sampling_arguments.add(parser.add_argument_group(
      "thinking (the strings are the config's: --config.thinking.end=...)"),
      sampling_arguments.THINKING)
  parser.add_argument("--output", metavar="FILE.jsonl", help=(
      "write completions with tokens, logprobs and provenance"))


def _add_report(parser: _Parser) -> None:
  parser.add_argument(
      "--workdir", metavar="DIR", action="append", required=True,
      help="several are compared")
  parser.add_argument("--output", metavar="FILE.html", help=(
      "default: report.html in the first workdir"))


def _add_export(parser: _Parser) -> None:
  _add_weights(parser)
  parser.add_argument(
      "--step", metavar="N", type=number(int, "[0, inf)"),
      help="with --workdir: the checkpoint's step (default: the last)")
  _add_output(parser)
  parser.add_argument(
      "--dtype", choices=("float32", "bfloat16"), default="float32",
      help="dtype of the weights; bfloat16, as most releases have, rounds them "
      "and halves their size (float32)")
  parser.add_argument(
      "--shard-gb", metavar="X", type=number(float, "[0.001, 1e6]"),
      default=5.0, help="largest file of weights, in gigabytes (5)")
  parser.add_argument(
      "--adapter-of", metavar="BASE", default="", help=(
          "write the adapters of a stage with `lora` alone, as peft reads "
          "them; BASE names the model that they belong to"))


def _add_import(parser: _Parser) -> None:
  parser.add_argument("--model", metavar="MODEL", required=True, help=MODEL)
  _add_output(parser)
  _add_keys(parser)


def _add_output(parser: _Parser) -> None:
  parser.add_argument("--output", metavar="DIR", required=True,
                      help="a new directory")


def _add_plan(parser: _Parser) -> None:
  _add_config(parser, "the config")
  parser.add_argument(
      "--topology", metavar="CHIP:SIZE", required=True,
      help="a slice, its size in chips, such as v5p:4x4x4")
  parser.add_argument(
      "--num_slices", metavar="N", default=1, type=number(int, "[1, 65536]"),
      help="number of slices (1)")
  parser.add_argument("--json", metavar="FILE", default="",
                      help="write figures for scripts")
  parser.add_argument("--html", metavar="FILE", default="",
                      help="write a page, with every figure as JSON in it")
  parser.add_argument("--only", metavar="TEXT", default="", help=(
      "compile only programs with this in their name, such as update"))
  parser.add_argument("--sweep", action="store_true", help=(
      "rank meshes, sizes of the slice and remat policies by estimate, and "
      "compile the best"))
  parser.add_argument(
      "--compile-best", metavar="N", type=number(int, "[0, inf)"),
      help="with --sweep: number of the best plans to compile (3)")


def parse(argv: Sequence[str]) -> tuple[str, argparse.Namespace]:
  """Parses verb and arguments; `assignments` holds --config.path=value texts.

  Raises:
    CommandError: a verb or flag is unknown, or a value is wrong.
  """
  parsers = make_parsers()
  verb, rest = argv[0], list(argv[1:])
  if verb not in parsers:
    raise CommandError(
        f"there is no verb {keys.shown(verb)}, needed one of "
        f"{', '.join(parsers)}"
        f"{keys.hint(verb, parsers, '; the nearest is {}')}.")
  parser = parsers[verb]
  for text in rest:
    flag = text.partition("=")[0]
    if re.match("-[^-h0-9.]|-h.", flag):  # -h is the only short one.
      raise CommandError(
          f"posttrain {verb} has no flag {keys.shown(flag)[1:-1]}. "
          f"See `posttrain {verb} --help`.")
    if flag.startswith("--") and flag not in parser.flags() and not (
        flag.startswith("--config.") and "--config.KEY" in parser.flags()):
      renamed = RENAMED.get(flag)
      near = f"; it is called {renamed} now" if renamed in parser.flags() else (
          keys.hint(flag, parser.flags(), "; the nearest is {}"))
      raise CommandError(
          f"posttrain {verb} has no flag {keys.shown(flag)[1:-1]}{near}. "
          f"See `posttrain {verb} --help`.")
  rest, assignments = _take_assignments(rest)
  arguments, unexpected = parser.parse_known_args(rest)
  if unexpected:
    raise CommandError(
        f"unexpected {keys.shown(unexpected[0])}; write a value as "
        "--flag=value.")
  arguments.assignments = assignments
  return verb, arguments


def _take_assignments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Separates --config.path=value, or --config.path value, from the rest."""
  rest, assignments = [], []
  words = iter(argv)
  for word in words:
    if not word.startswith("--config."):
      rest.append(word)
    elif not word.removeprefix("--config.").partition("=")[0]:
      raise CommandError(
          f"{keys.shown(word)[1:-1]} names no key; write --config.KEY=VALUE.")
    elif "=" in word:
      assignments.append(word.removeprefix("--config."))
    else:
      value = next(words, None)
      if value is None:
        raise CommandError(f"{word} needs a value: write {word}=VALUE.")
      assignments.append(f"{word.removeprefix('--config.')}={value}")
  return rest, assignments
