"""The command line as a person types it: help, mistakes, and the stages' part.
"""

import json
import pathlib
import re
import shlex
import subprocess
import sys
import types

import pytest

from posttrain import config as config_lib
from posttrain import workdir as workdir_lib
from posttrain.cli import arguments as arguments_lib
from posttrain.cli import main as main_lib
from posttrain.sampler import sampler, token_sampling
from posttrain.stages import sampling

ROOT = pathlib.Path(__file__).parents[2]
TINY = str(ROOT / "configs/tiny.py")
VERBS = (
    "train", "eval", "sample", "chat", "report", "export", "import", "plan")


@pytest.fixture
def calls(monkeypatch):
  """Replaces what the verbs hand over to; returns what they were given."""
  seen = []
  def record(name):
    return lambda *args, **kwargs: seen.append((name, args, kwargs))
  fakes = {
      "posttrain.pipeline": dict(
          train=record("train"), evaluate=record("evaluate")),
      "posttrain.cli.sample": dict(run=record("sample")),
      "posttrain.cli.chat": dict(run=record("chat")),
      "posttrain.report": dict(
          build=record("report"), figures=lambda workdirs: "figures\n"),
      "posttrain.convert": dict(
          export=record("export"), import_release=record("import")),
  }
  for name, functions in fakes.items():
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    __import__(parent)
    monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
  monkeypatch.setattr(main_lib, "_start", lambda config: None)
  return seen


def run(*argv, capsys):
  """Exit status and what was printed as an error."""
  status = main_lib.main(argv)
  return status, capsys.readouterr().err


@pytest.fixture
def workdir(tmp_path):
  config = config_lib.load(TINY)
  workdir_lib.create(tmp_path / "run", config, devices=["cpu:0"])
  return str(tmp_path / "run")


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_a_verb_does_and_how(verb, capsys):
  with pytest.raises(SystemExit) as stop:
    main_lib.main([verb, "--help"])
  text = capsys.readouterr().out
  assert stop.value.code == 0
  assert f"usage: posttrain {verb}" in text
  assert f"examples:\n  posttrain {verb} --" in text
  assert "75 preempted" in text
  assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_the_help_are_valid(verb):
  text = getattr(arguments_lib, verb.upper()).partition("examples:")[2]
  text = re.sub(r"\s+\(resume.*\)", "", text).replace("\\\n", " ")
  examples = [line for line in text.splitlines() if line.strip()]
  assert examples
  for line in examples:
    program, *argv = shlex.split(line)
    assert program == "posttrain"
    assert arguments_lib.parse(argv)[0] == verb


def test_no_arguments_print_the_verbs(capsys):
  assert main_lib.main([]) == 2
  assert main_lib.main(["--help"]) == 0
  text = capsys.readouterr().out
  assert all(text.count(f"  posttrain {verb}") == 2 for verb in VERBS)


@pytest.mark.parametrize("argv, message", [
    (["trian"], f"needed one of {', '.join(VERBS)}; the nearest is train"),
    (["train", "--confg=x"], "posttrain train has no flag --confg; the "
     "nearest is --config"),
    (["plan", "-html"], "posttrain plan has no flag -html. See `posttrain"),
    (["import", "--model=", "--output=x"], "--model=MODEL is needed."),
    (["train", "--config.=1"], "--config.=1 names no key; write --config.KEY"),
    (["train", "--wokrdir", "x"], "is --workdir"),
    (["train", "--zzz"], "has no flag --zzz. See `posttrain train --help`."),
    (["frobnicate"], f"needed one of {', '.join(VERBS)}.\n"),
    (["sample", "--temprature=1"], "is --temperature"),
    (["sample", "--max-think-tokens=1"], "is --max-thinking-tokens"),
    (["report", "--config.seed=1"], "no flag --config.seed"),
    (["train", "--workdir=x", "there"], "unexpected 'there'"),
    (["train", f"--config={TINY}"], "required: --workdir"),
    (["train", "--workdir=x", f"--config={TINY}", "--config.seed"],
     "--config.seed needs a value"),
    (["train", "--workdir=x", f"--config={TINY}", "--config.sed=1"],
     "The nearest key is seed."),
    (["train", "--workdir=/nonexistent/x"], "give --config=FILE"),
    (["train", "--workdir=x", f"--config={TINY}", "--config.stages="],
     "nothing to train"),
    (["eval", "--workdir=/nonexistent/x"], "holds no run"),
    (["report", "--workdir=/nonexistent/x"], "holds no run"),
    (["sample", "--prompt=a"], "found none"),
    (["sample", "--model=tiny", "--workdir=x", "--prompt=a"],
     "found --model and --workdir"),
    (["sample", "--model=tiny"], "--prompt=TEXT and --prompts=FILE"),
    (["sample", "--model=smollm2-135m", "--prompt=\udcff"],
     "--prompt: a text with '\\udcff', half of a surrogate pair"),
    (["sample", "--model=org/name", "--prompt=a"],
     "--model=org/name is no directory and no file. Nothing is downloaded"),
    (["chat", "--model=qwen3-4b"],
     "--model=qwen3-4b is the name of a shape, whose weights are not here."),
    (["sample", "--model=smollm2-135m", "--prompt=a", "--stage=s"],
     "no effect"),
    (["export", "--output=x"], "found none"),
    (["export", "--model=smollm2-135m"], "required: --output"),
    (["export", "--model=smollm2-135m", "--output=x", "--dtype=float16"],
     "invalid choice: 'float16'"),
    (["export", "--model=smollm2-135m", "--output=x", "--step=3"],
     "--step has no effect"),
    (["export", "--model=smollm2-135m", "--output=/tmp"], "/tmp exists"),
    (["export", "--model=smollm2-135m", "--output=x", "--shard-gb=0"],
     "0.0 is not in [0.001, 1e6]"),
    (["import", "--model=no/such", "--output=x"], "--model=no/such is no"),
    *[([verb, "--workdir=/nonexistent/x", *more],
       "/nonexistent/x holds no run (no config.json). Name the --workdir")
      for verb, more in (("sample", ["--prompt=a"]), ("chat", []),
                         ("export", ["--output=x"]), ("report", []))],
    (["import", "--model=smollm2-135m", "--output=/tmp"], "/tmp exists"),
    (["sample", "--model=smollm2-135m", "--prompt=a", "--top-p=2"],
     "2.0 is not in (0, 1]"),
    (["sample", "--model=smollm2-135m", "--prompt=a", "--seed=x"],
     "--seed: found 'x', needed an int"),
    (["sample", "--model=smollm2-135m", "--prompt=a", "--temperature=0",
      "--top-k=4"],
     "--top-k has no effect"),
    (["sample", "--model=smollm2-135m", "--prompt=a", "--num-samples=2"],
     "--num-samples has no effect with --temperature=0"),
    (["sample", "--model=smollm2-135m", "--prompt=a", "--min-thinking-tokens=4",
      "--max-thinking-tokens=2"], "is above --max-thinking-tokens=2"),
    (["sample", "--model=smollm2-135m", "--prompt=a", "--num-waits=1",
      "--config.thinking.end="], "--config.thinking.end=TEXT"),
    (["sample", "--model=smollm2-135m", "--prompt=a", "--max-thinking-steps=1"],
     "--config.thinking.step=TEXT"),
    (["sample", "--model=smollm2-135m", "--prompt=a", "--wait-order=draw",
      "--num-waits=1"],
     "--wait-order: set to 'draw', but there is one text to draw from; set "
     "--config.thinking.more_wait_texts."),
    (["sample", "--model=smollm2-135m", "--prompt=a",
      '--logits-processor-args={"a": 1}'],
     "--logits-processor-args has no effect without --logits-processor"),
    (["sample", "--model=smollm2-135m", "--prompt=a",
      "--logits-processor-args=[1]"],
     "'[1]' is no object"),
    (["sample", "--model=smollm2-135m", "--prompt=a", "--ask-tokens=9",
      "--ask-length=long"], "not allowed with argument --ask-tokens"),
    (["chat", "--model=smollm2-135m", "--policy=a:b"],
     "has no flag --policy; it is called --budget-schedule now."),
    (["sample", "--model=smollm2-135m", "--prompt=a", "--hook=a:b"],
     "has no flag --hook; it is called --logits-processor now."),
    (["train", "--hook=a:b"], "has no flag --hook. See"),
    (["chat", "--model=smollm2-135m",
        "--budget-schedule=posttrain.sampler.logits_processors:no"],
     "--budget-schedule: 'posttrain.sampler.logits_processors:no': "
     "posttrain.sampler.logits_processors has no function 'no'"),
])
def test_a_mistake_is_named_with_its_remedy(argv, message, capsys, calls):
  status, error = run(*argv, capsys=capsys)
  assert status == 2
  assert error.startswith("posttrain: ")
  assert message in error
  assert not calls


def test_a_mistake_is_found_without_jax():
  code = (
      "import sys\n"
      "from posttrain.cli import main\n"
      f"assert main.main(['train', '--config={TINY}', '--workdir=x',"
      " '--config.sed=1']) == 2\n"
      "assert main.main(['sample', '--model=tiny', '--propmt=a']) == 2\n"
      "assert 'jax' not in sys.modules\n")
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_train_hands_over_the_resolved_config(calls, tmp_path):
  assert main_lib.main([
      "train", f"--config={TINY}:debug", f"--workdir={tmp_path}",
      "--config.seed=7", "--config.stages", "cold_start,measure"]) == 0
  [(name, (config, workdir), _)] = calls
  assert (name, workdir) == ("train", str(tmp_path))
  assert config.seed == 7
  assert config.stages == ("cold_start", "measure")
  assert config.cold_start.beta1 == 0.9  # A default.


def test_train_resumes_with_the_saved_config(calls, workdir):
  assert main_lib.main(["train", f"--workdir={workdir}"]) == 0
  assert calls[0][1][0].reason.num_steps == 8


def test_eval_takes_the_saved_config_and_changes(calls, workdir):
  assert main_lib.main([
      "eval", f"--workdir={workdir}",
      "--config.measure.problems.count=9"]) == 0
  [(name, (config, path), _)] = calls
  assert (name, path) == ("evaluate", workdir)
  assert config.measure.problems.count == 9


def test_eval_needs_a_stage_that_evaluates(calls, workdir, capsys):
  status, error = run("eval", f"--workdir={workdir}",
                      "--config.stages=reason", capsys=capsys)
  assert status == 2
  assert "no stage that evaluates" in error


def test_sample_hands_over_every_flag(calls):
  assert main_lib.main([
      "sample", "--model=smollm2-135m", "--prompt=a", "--prompt", "b",
      "--num-samples=2", "--max-tokens=9", "--temperature=0.5", "--top-k=3",
      "--top-p=0.9", "--min-p=0.1", "--max-thinking-tokens=8",
      "--min-thinking-tokens=1", "--num-waits=2", "--seed=4",
      "--cache-dtype=int8", "--weights-dtype=int8",
      "--max-thinking-steps=3", "--config.thinking.step=.",
      "--config.thinking.more_wait_texts=Hmm", "--wait-order=draw",
      "--suppress=wait,hmm",
      "--logits-processor=posttrain.sampler.logits_processors:token_bias",
      '--logits-processor-args={"7": -1.5}', "--ask-tokens=64",
      "--confidence-window=64", "--confidence-top-k=5",
      "--budget-schedule=posttrain.sampler.logits_processors:token_bias"]) == 0
  [(name, (config, rows), flags)] = calls
  assert name == "sample"
  assert config.model == "smollm2-135m"
  assert config.init.kind == "preset"
  assert rows == [{"prompt": "a"}, {"prompt": "b"}]
  assert flags == dict(
      workdir=None, stage="", output=None, num_samples=2, seed=4,
      cache_dtype="int8", weights_dtype="int8",
      ask="Think for up to 64 tokens.", options=dict(
          suppress=("wait", "hmm"), wait_order="draw",
          logits_processor="posttrain.sampler.logits_processors:token_bias",
          logits_processor_args={"7": -1.5},
          budget_schedule="posttrain.sampler.logits_processors:token_bias",
          confidence_window=64, confidence_top_k=5),
      params=token_sampling.SamplingParams(
          temperature=0.5, top_k=3, top_p=0.9, min_p=0.1),
      limits=sampler.Limits(
          max_tokens=9, max_thinking_tokens=8, min_thinking_tokens=1,
          num_waits=2, max_thinking_steps=3))


def test_chat_hands_over_how_to_draw(calls):
  assert main_lib.main([
      "chat", "--model=smollm2-135m", "--temperature=0.5", "--seed=4"]) == 0
  [(name, (config,), flags)] = calls
  assert (name, config.model) == ("chat", "smollm2-135m")
  assert flags == dict(
      workdir=None, stage="", seed=4, cache_dtype="compute",
      weights_dtype="compute",
      options=sampling.PLAIN,
      params=token_sampling.SamplingParams(temperature=0.5),
      limits=sampler.Limits(max_tokens=256))


def test_sample_reads_prompts_from_a_file(calls, tmp_path, workdir):
  rows = [{"prompt": "a", "answer": 3},
          {"messages": [{"role": "user", "content": "b"}]}]
  file = tmp_path / "prompts.jsonl"
  file.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
  assert main_lib.main([
      "sample", f"--workdir={workdir}", "--stage=reason",
      f"--prompts={file}"]) == 0
  [(_, (config, found), flags)] = calls
  assert found == rows
  assert flags["workdir"] == workdir
  assert flags["stage"] == "reason"
  assert config.stages == ("cold_start", "reason", "measure")


@pytest.mark.parametrize("text, message", [
    ('{"prompt": "a"}\n{', "line 2"),
    ('{"question": "a"}', "line 1: the row has question; it needs either"),
    ('{"prompt": "\\ud800"}', "line 1: a text with"),
    ('{"prompt": "a", "prompt": "b"}', "line 1: prompt is there twice"),
    ('{"messages": [{"role": "user", "content": 5}]}',
     "line 1: message 0 has the content 5, a int"),
    ("[" * 100_000, "line 1: nested more than"),
    ("\n", "has no rows"),
    ('{"prompt": ' + "9" * 5000 + "}", "line 1: a whole number of more"),
    ("\udcff", "line 1: not UTF-8"),
])
def test_a_bad_file_of_prompts(calls, tmp_path, text, message, capsys):
  file = tmp_path / "prompts.jsonl"
  file.write_bytes(text.encode("utf-8", "surrogateescape"))
  status, error = run(
      "sample", "--model=smollm2-135m", f"--prompts={file}", capsys=capsys)
  assert status == 2
  assert message in error


def test_export_hands_over_every_flag(calls, workdir, tmp_path):
  output = str(tmp_path / "out")
  assert main_lib.main([
      "export", f"--workdir={workdir}", "--stage=reason", "--step=4",
      f"--output={output}", "--dtype=bfloat16", "--shard-gb=0.5"]) == 0
  [(name, (config, path), flags)] = calls
  assert (name, path) == ("export", output)
  assert config.stages == ("cold_start", "reason", "measure")
  assert flags == dict(
      workdir=workdir, stage="reason", step=4, dtype="bfloat16",
      shard_bytes=500_000_000, adapter_of="")


def test_export_of_adapters(calls, workdir, tmp_path, capsys):
  output = str(tmp_path / "out")
  arguments = ["export", f"--output={output}", "--adapter-of=base"]
  assert main_lib.main([*arguments, f"--workdir={workdir}"]) == 0
  [(_, _, flags)] = calls
  assert flags["adapter_of"] == "base"
  for others in ([f"--workdir={workdir}", "--dtype=bfloat16"],
                 ["--model=smollm2-135m"]):
    assert main_lib.main([*arguments, *others]) == 2
    assert "--adapter-of takes" in capsys.readouterr().err


def test_what_a_model_may_be(calls, tmp_path, capsys):
  """A preset, published files, or what has been imported."""
  release, imported = tmp_path / "release", tmp_path / "imported"
  release.mkdir()
  imported.mkdir()
  (imported / "model.json").write_text("{}")
  for model, (name, kind, path) in {
      "smollm2-135m": ("smollm2-135m", "preset", ""),
      str(release): ("", "preset", str(release)),
      str(imported): ("", "directory", str(imported))}.items():
    assert main_lib.main([
        "export", f"--model={model}", f"--output={tmp_path}/out"]) == 0
    config = calls.pop()[1][0]
    assert (config.model, config.init.kind, config.init.path) == (
        name, kind, path)
  assert main_lib.main([
      "import", f"--model={release}", f"--output={tmp_path}/out",
      "--config.mesh.tensor=2"]) == 0
  [(name, (config, output), _)] = calls
  assert (name, output) == ("import", f"{tmp_path}/out")
  assert (config.init.path, config.mesh.tensor) == (str(release), 2)
  status, error = run("import", f"--model={imported}",
                      f"--output={tmp_path}/out", capsys=capsys)
  assert status == 2
  assert "has been imported already" in error


def test_report_compares_workdirs(calls, workdir, capsys):
  assert main_lib.main([
      "report", f"--workdir={workdir}", f"--workdir={workdir}"]) == 0
  path = pathlib.Path(workdir)
  assert calls == [("report", ([path, path], path / "report.html"), {})]
  assert capsys.readouterr().out == f"figures\n{path / 'report.html'}\n"


@pytest.mark.parametrize("name, kind", [
    ("run/stage/checkpoints", "directory"),
    ("run/stage/checkpoints/300", "directory"),
    ("checkpoints/Qwen3-0.6B", "preset"), ("checkpoints/7/model", "preset")])
def test_a_release_may_lie_in_a_folder_of_checkpoints(tmp_path, name, kind):
  (tmp_path / name).mkdir(parents=True)
  assert main_lib._of_model(str(tmp_path / name))["init"]["kind"] == kind
