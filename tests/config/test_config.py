"""Every mistake is named with the nearest path; JAX stays out of it."""

import ast
import copy
import importlib.util
import pathlib
import re
import subprocess
import sys

import hypothesis
import ml_collections
import pytest
from hypothesis import strategies as st

from posttrain import config as config_lib
from posttrain.config import document, keys, reader, schema, stages

ROOT = pathlib.Path(__file__).parents[2]
TINY = str(ROOT / "configs/tiny.py")
CONFIGS = sorted(str(path) for path in (ROOT / "configs").glob("*.py"))
TASK = "posttrain.tasks.signs"


def problems(*assignments, spec=TINY):
  """The problems of configs/tiny.py under some assignments."""
  try:
    config_lib.load(spec, assignments)
  except config_lib.ConfigError as error:
    assert all(problem in str(error) for problem in error.problems)
    return error.problems
  return ()


def problem(*assignments, spec=TINY):
  found = problems(*assignments, spec=spec)
  assert len(found) == 1, found
  return found[0]


@pytest.mark.parametrize("path, expected", [
    ("reason.clip_high", "reason.loss.clip_high"),  # One level too high.
    ("reason.loss.group_size", "reason.group_size"),  # One too low.
    ("num_groups", "reason.num_groups"),
    ("cold_start.num_groups", "reason.num_groups"),  # Another kind's key.
    ("reason.lerning_rate", "reason.learning_rate"),
    ("reson.learning_rate", "reason.learning_rate"),
    ("measure.rollout.max_token", "measure.rollout.max_tokens"),
    ("cold_start.data.sources.0.pth", "cold_start.data.sources.0.path"),
    ("reason.rollout.top_k", "measure.rollout.top_k"),
    ("mesh.tensors", "mesh.tensor"),
    ("model_overrides.head", "model_overrides.heads"),
    ("model_overrides.dtype", "compute.dtype"),
    ("stage", "stages"),
])
def test_an_unknown_key_is_answered_with_the_nearest(path, expected):
  found = problem(f"{path}=1")
  assert found.startswith(f"{path}: ")
  assert f"The nearest key is {expected}." in found


def test_one_lost_letter_finds_any_key_again():
  """Over all keys of the config: the one that was meant is the nearest."""
  layout = reader.layout(reader.plain(config_lib.read_file(TINY)))
  paths = list(keys.paths(layout))
  for path in paths:
    leaf = path.rpartition(".")[2]
    if len(leaf) > 5:
      middle = len(path) - len(leaf) // 2
      assert keys.nearest(path[:middle] + path[middle + 1:], paths) == path


def test_a_key_of_another_kind_names_that_kind():
  found = problem("cold_start.group_size=4")
  assert "no such key in a stage of kind sft (it belongs to rl)" in found


def test_truncated_sampling_in_rollouts_is_refused_with_the_reason():
  assert "ratio would be against a truncated" in problem(
      "reason.rollout.top_p=0.9")


@pytest.mark.parametrize("assignment, found, needed", [
    ("seed=x", "'x' (str)", "an int"),
    ("seed=1.5", "'1.5' (str)", "an int"),
    ("seed=-1", "-1", "a value in [0, 4294967295]"),
    ("reason.learning_rate=fast", "'fast' (str)", "a float"),
    ("reason.learning_rate=nan", "nan", "a value in [1e-12, 10]"),
    ("reason.learning_rate=inf", "inf", "a value in [1e-12, 10]"),
    ("cold_start.data.packing=1", "'1' (str)", "True or False"),
    ("measure.num_waits=0,one", "(0, 'one') (tuple)", "a tuple of ints"),
    ("cold_start.data.on_overlong=trunc", "'trunc'", "one of 'error', 'drop'"),
    ("mesh=4", "'4'", "a section with the keys fsdp, tensor"),
    ("reason.rewards=signs", "'signs'", "module:function"),
    ("reason.group_size=1", "1", "a value in [2, 2147483647]"),
    ("measure.problems.args=3", "3 (int)", "a dict"),
])
def test_a_wrong_type_says_what_was_found_and_needed(
    assignment, found, needed):
  message = problem(assignment)
  assert message.startswith(assignment.partition("=")[0] + ": ")
  assert f"found {found}" in message
  assert f"needed {needed}" in message


@pytest.mark.parametrize("assignment, found, needed", [
    ("reason.rollout.temperature=1e-320", "1e-320", "[0.001, 1000]"),
    ("measure.rollout.temperature=1e-9", "1e-09", "0 or [0.001, 1000]"),
    ("reason.loss.advantage_eps=1e308", "1e+308", "[0, 1]"),
    ("reason.loss.advantage_eps=1e-320", "1e-320",
     "[0, 1], and of 1.18e-38 to 3.4e+38 in size or 0, as float32 has them"),
    ("reason.reward_weights=inf", "inf", "[-1e6, 1e6]"),
    ("reason.reward_weights=nan", "nan", "[-1e6, 1e6]"),
    ("measure.rollout.top_k=9223372036854775808", "9223372036854775808",
     "[0, 2147483647]"),
    ("reason.rollout.chunk=9223372036854775808", "9223372036854775808",
     "[1, 65536]"),
    ("measure.num_waits=0,2147483648", "2147483648", "[0, 10000]"),
    ("reason.rollout.num_waits=100000", "100000", "[0, 10000]"),
    ("mesh.cpu_devices=100000", "100000", "[1, 256]"),
    ("measure.samples_per_problem=2147483648", "2147483648", "[1, 65536]"),
    ("measure.majority.max_samples=65537", "65537", "0 or [1, 65536]"),
    ("reason.num_steps=2147483648", "2147483648", "[1, 2147483647]"),
    ("mesh.fsdp=-2", "-2", "[-1, 2147483647]"),
    ("model_overrides.layers=2147483648", "2147483648", "[1, 2147483647]"),
    ("model_overrides.norm_eps=1e999", "inf", "numbers of 64 bits"),
    ("model_overrides.norm_eps=2.0", "2.0", "(0, 1]"),
    ("model_overrides.rope_theta=1e-320", "1e-320", "(0, inf), and of"),
    ("model_overrides.embedding_scale=1", "1", "True or False"),
])
def test_a_number_out_of_range_names_the_key_and_the_range(
    assignment, found, needed):
  message = problem(assignment)
  assert message.startswith(f"{assignment.partition('=')[0]}: found {found}")
  assert f"{needed}" in message


def test_rewards_that_all_count_nothing():
  more = "reason.rewards=posttrain.tasks.signs:reward,posttrain.tasks.scoring:"
  found = problem(f"{more}brevity", "reason.reward_weights=0,0")
  assert found.startswith("reason.reward_weights: found (0.0, 0.0), and")
  assert not problems(f"{more}brevity", "reason.reward_weights=0,1")


@pytest.mark.parametrize("path", [
    "seed", "stages", "chat_template", "reason.learning_rate",
    "reason.group_size", "measure.num_waits", "measure.problems.args",
    "reason.reward_weights", "reason", "thinking.end", "model", "new",
    "model_overrides.layers", "model_overrides.rope_theta",
    "reason.loss.aggregation", "reason.kind", "cold_start.data.sources",
    "measure.checkpoints", "measure.instructions.classes",
    "reason.rewards", "cold_start.lora.targets", "profile.stages"])
def test_a_long_value_is_shortened(path):
  """Whatever is wrong with it: a screen of digits hides what is said."""
  for value in (10**5000, 10**400, (10**5000,), {"a": 10**5000}, "x" * 10_000,
                ("x",) * 10_000, -(10**400)):
    values = config_lib.jsonable(config_lib.read_file(TINY))
    *sections, leaf = path.split(".")
    target = values
    for name in sections:
      target = target.setdefault(name, {})
    target[leaf] = value
    try:
      config_lib.resolve(values)
    except config_lib.ConfigError as error:
      assert max(map(len, error.problems)) < 1500
      assert len(str(error)) < 20_000


def test_a_tuple_is_no_float():
  values = config_lib.read_file(TINY).to_dict()
  values["reason"]["learning_rate"] = (1e-4,)
  with pytest.raises(
      config_lib.ConfigError,
      match=r"reason.learning_rate: found \(0.0001,\) \(tuple\), needed a fl"):
    config_lib.resolve(values)


def test_a_stage_of_a_name_that_is_taken():
  assert "stages: 'init' is the name of another key" in problem("stages=init")


def test_a_key_is_a_string():
  values = config_lib.jsonable(config_lib.read_file(TINY))
  for section in (values, values["reason"], values["model_overrides"]):
    section[7] = 1
  with pytest.raises(config_lib.ConfigError) as caught:
    config_lib.resolve(values)
  assert [line.partition(": ")[0] for line in caught.value.problems] == [
      "7", "model_overrides", "reason.7"]


def test_a_wrong_kind_is_one_problem():
  for more in (), ("mesh.roles=split",), ("compute.offload=reference",):
    found = problem("reason.kind=grpo", *more)
    assert found.startswith("reason.kind: ") and "rl" in found


def test_a_key_that_is_no_stage_is_one_problem_too():
  found = problem("sed=1", "mesh.roles=split", "mesh.sampling.devices=1")
  assert found.startswith("sed: no such key")


def test_a_wrong_kind_names_the_nearest():
  assert "needed one of sft, rl, evaluate; the nearest is evaluate" in problems(
      "reason.kind=evalute")[0]


def test_an_old_word_for_a_kind_names_the_new_one():
  assert problems("reason.kind=grpo")[0] == (
      "reason.kind: found 'grpo', which is called 'rl' now.")


def own_kind(tmp_path, text):
  """The lines of a config whose only stage is of the kind of a file."""
  file = tmp_path / "kind.py"
  file.write_text(text)
  values = config_lib.jsonable(config_lib.read_file(TINY))
  values["stages"] = ("count",)
  values["count"] = dict(kind=f"{file}:STAGE")
  return file, values


COUNT = """
import types
from posttrain.config import keys, stages

def check_end(config, name, stage):
  if stage["end"] == 13:
    yield f"end: {name} does not count to 13."

STAGE = types.SimpleNamespace(schema=stages.StageSchema(
    keys.Section("Counts.", end=keys.Key(int, 3, "Last number.", "[0, 99]"),
                 stop=keys.Renamed("end")),
    checks=(check_end,)))
"""


def test_a_kind_of_ones_own(tmp_path):
  file, values = own_kind(tmp_path, COUNT)
  config = config_lib.resolve(values)
  assert config.count.end == 3 and config.stages == ("count",)
  assert config_lib.functions(config)[f"{file}:STAGE"] == "count.kind"
  assert config_lib.assign(values, ["count.end=7"], "").count.end == 7
  for text, expected in [
      ("end=x", "count.end: found 'x' (str), needed an int."),
      ("end=13", "count.end: count does not count to 13."),
      ("stop=2", "count.stop: found '2', and this key is called count.end "
       "now."),
      ("num_steps=2", "count.num_steps: no such key in a stage of kind "
       f"{file}:STAGE (it belongs to sft and rl).")]:
    with pytest.raises(config_lib.ConfigError) as caught:
      config_lib.assign(values, [f"count.{text}"], "")
    assert caught.value.problems[0].startswith(expected)


@pytest.mark.parametrize("text, expected", [
    ("x = 1", "has no Stage 'STAGE'."),
    ("STAGE = 3", "is a int, needed a Stage of posttrain.stages.stage"),
    ("STAGE = 1 / 0", "cannot be imported: ZeroDivisionError: division by"),
    ("raise ValueError('odd')", "cannot be imported: ValueError: odd."),
    ("STAGE = (", "line 1: '(' was never closed."),
])
def test_a_kind_of_ones_own_that_is_none(tmp_path, text, expected):
  file, values = own_kind(tmp_path, text)
  with pytest.raises(config_lib.ConfigError) as caught:
    config_lib.resolve(values)
  found = [x for x in caught.value.problems if x.startswith("count.kind: ")]
  assert len(found) == 1 and expected in found[0] and str(file) in found[0]


@pytest.mark.parametrize("text, value", [
    ("cold_start,reason", ("cold_start", "reason")),
    ("cold_start, reason", ("cold_start", "reason")),
    ("('cold_start', 'reason')", ("cold_start", "reason")),
    ("cold_start", ("cold_start",)),
    ("cold_start,", ("cold_start",)),
    ("", ()),
])
def test_a_tuple_from_the_command_line(text, value):
  assert config_lib.load(TINY, [f"stages={text}"]).stages == value


def test_one_string_is_never_two_stages_in_a_file():
  values = config_lib.read_file(TINY).to_dict()
  with pytest.raises(config_lib.ConfigError, match="a tuple of strings"):
    config_lib.resolve(values | dict(stages="cold_start,reason"))
  with pytest.raises(config_lib.ConfigError, match="cannot name a section"):
    config_lib.resolve(values | dict(stages=("cold_start,reason",)))


def test_assignments_are_typed_by_the_schema():
  config = config_lib.load(TINY, [
      "reason.learning_rate=1", "cold_start.data.packing=false",
      "measure.num_waits=0,1,2", "reason.problems.args.count=5",
      "cold_start.data.sources.0.weight=2", "model_overrides.layers=3",
      "measure.problems.split=5", "measure.checkpoints=init,reason"])
  assert type(config.reason.learning_rate) is float
  assert config.cold_start.data.packing is False
  assert config.measure.num_waits == (0, 1, 2)
  assert config.reason.problems.args.count == 5
  assert config.cold_start.data.sources[0]["weight"] == 2.0
  assert config.model_overrides.layers == 3
  assert config.measure.problems.split == "5"
  assert config.measure.checkpoints == ("init", "reason")


def test_a_source_that_is_not_there_cannot_be_set():
  assert "which has no '1' to set" in problem(
      "cold_start.data.sources.1.path=x.jsonl")


@pytest.mark.parametrize("assignment, condition", [
    ("reason.loss.kl_estimator=k1", "reason.loss.kl_coef > 0; found 0.0"),
    ("reason.reference=init", "reason.loss.kl_coef > 0"),
    ("reason.final_learning_rate=1e-5", "reason.schedule != 'constant'"),
    ("cold_start.eval_every=5", "cold_start.eval_data.sources is set"),
    ("cold_start.checkpoint.best_mode=min",
     "cold_start.checkpoint.keep_best > 0"),
    ("cold_start.eval_data.on_overlong=drop",
     "cold_start.eval_data.sources is set"),
    ("init.path=x/", "init.kind != 'random'"),
    ("reason.lora.alpha=8", "reason.lora.rank > 0; found 0"),
    ("profile.stages=reason", "profile.steps is set; found ()"),
    ("reason.health.max_skips=3",
     "reason.health.on_bad_step == 'skip'; found 'stop'"),
    ("cold_start.health.spike_window=9",
     "cold_start.health.spike_mads > 0; found 0.0"),
    ("cold_start.lora.decode=merged", "cold_start.lora.rank > 0"),
])
def test_a_key_without_effect_is_an_error(assignment, condition):
  assert f"no effect unless {condition}" in problem(assignment)


@pytest.mark.parametrize("assignments", [
    ["reason.rollout.truncate=true", "reason.rollout.max_thinking_tokens=8"],
    ["reason.rollout.truncate=true", "thinking.step=a",
     "reason.rollout.max_thinking_steps=2"],
    ["reason.rollout.truncate=true", "reason.rollout.budget_schedule=a:b"],
    ["measure.rollout.truncate=true"],
    ["measure.rollout.truncate=true", "measure.max_thinking_tokens=",
     "measure.instructions.tokens=4", "measure.instructions.forced=true"],
    ["measure.rollout.truncate=true", "measure.max_thinking_tokens=",
     "thinking.step=a", "measure.instructions.steps=4",
     "measure.instructions.forced=true"],
    ["measure.rollout.truncate=true", "measure.max_thinking_tokens=",
     "measure.rollout.budget_schedule=a:b"],
    ["measure.rollout.truncate=true", "measure.max_thinking_tokens=",
     "measure.wait_max_thinking_tokens=9"],
])
def test_truncate_is_allowed_wherever_there_is_a_maximum(assignments):
  assert not problems(*assignments)


@pytest.mark.parametrize("assignments", [
    ["reason.rollout.truncate=true"],
    ["measure.rollout.truncate=true", "measure.max_thinking_tokens=",
     "measure.instructions.tokens=4"],
])
def test_truncate_without_any_maximum_is_refused(assignments):
  found = problem(*assignments)
  assert found.startswith(assignments[0].replace("=true", ": set, but"))
  assert "maximum of thinking" in found


def test_offload_of_what_is_not_there_has_no_effect():
  kl, lora = "reason.loss.kl_coef=0.1", "reason.lora.rank=2"
  of = lambda name: f"compute.offload={name}"
  assert "no stage holds one" in problem(of("reference"))
  assert "no stage holds one" in problem(of("reference"), kl, lora)
  assert not problems(of("reference"), kl, lora, "reason.reference=init")
  assert not problems(of("reference,optimizer"), kl)
  own = "reason.loss.function=my_loss.py:loss"  # It may declare ref_logprobs.
  assert not problems(of("reference"), own, "reason.reference=init")
  assert "without a stage of kind rl" in problem(
      of("optimizer"), spec="configs/s1.py:debug")


def test_what_an_optimizer_does_not_keep_has_no_effect():
  adafactor = "reason.optimizer=adafactor"
  assert problem(adafactor, "reason.eps=1e-6").endswith(
      "unless reason.optimizer == 'adamw'; found 'adafactor'.")
  assert "Adafactor keeps no mean if beta1 is 0" in problem(
      adafactor, "reason.moments_dtype=bfloat16", "reason.beta1=0")
  assert not problems(
      adafactor, "reason.moments_dtype=bfloat16", "reason.beta2=0.99")


def test_a_key_without_effect_in_a_source():
  found = problem(
      'cold_start.data.sources=({"path": "a.jsonl", "split": "train"},)')
  assert found.startswith("cold_start.data.sources.0.split: ")
  assert "unless cold_start.data.sources.0.task is set" in found


@pytest.mark.parametrize("assignments, expected", [
    (["stages=cold_start,resaon"],
     "stages: there is no section 'resaon' with a kind. The nearest is "
     "'reason'."),
    (["stages=reason,reason"], "stages: 'reason' is named more than once."),
    (["model=tinny"], "model: there is no preset 'tinny'; the nearest is "
     "'tiny'"),
    (["model_overrides.kv_heads=3"],
     "model: model.heads=4 is not a multiple of model.kv_heads=3."),
    (["model_overrides.kv_heads=0"],
     "model_overrides.kv_heads: found 0, needed a value in [1, 2147483647]."),
    (["model_overrides.layers=two"],
     "model_overrides.layers: found 'two', needed an int."),
    (["compute.unroll=3"], "model: compute.unroll=3 is not within"),
    (["mesh.tensor=-1"], "mesh.fsdp: -1 beside mesh.tensor=-1"),
    (["mesh.expert=2"], "mesh.expert: set to 2, and the model has no experts"),
    (["compute.moe=grouped"], "model: compute.moe='grouped' has no effect"),
    (["compute.attention_block=64"],
     "compute.attention_block: set to 64, but it has no effect unless "
     "compute.attention != 'reference'; found 'reference'."),
    (["cold_start.router_aux_coef=0.001"],
     "cold_start.router_aux_coef: set to 0.001, but it has no effect: the"),
    (["reason.router_aux_coef=0.001"],
     "reason.router_aux_coef: set to 0.001, but it has no effect: the model"),
    (["model=qwen3-30b-a3b", "mesh.expert=-1"],
     "mesh.fsdp: -1 beside mesh.expert=-1"),
    (["init.kind=workdir"], "init.path: missing"),
    (["model=", "init.kind=preset"], "init.path: missing"),
    (["model="], 'model: "" means the shape of what init names'),
    (["tokenizer.model_type=bpe"], "tokenizer.vocab_size: missing"),
    (["tokenizer.path=a.model"], "tokenizer.train: set beside"),
    (["cold_start.warmup_steps=61"],
     "cold_start.warmup_steps: 61 is more than num_steps=60."),
    (["cold_start.final_learning_rate=1"],
     "cold_start.final_learning_rate: 1.0 is above learning_rate=0.0015."),
    (["cold_start.num_microbatches=3"],
     "cold_start.rows: 8 is not a multiple of num_microbatches=3."),
    (["cold_start.checkpoint.keep_best=1"],
     "cold_start.checkpoint.best_metric: missing"),
    (["cold_start.data.sources.0.path=a.jsonl"],
     "cold_start.data.sources.0: set one of path and task"),
    (["cold_start.data.sources="], "cold_start.data.sources: found none"),
    (["reason.num_minibatches=3", "reason.num_steps=9"],
     "reason.num_groups: 8 is not a multiple of num_minibatches=3."),
    (["reason.num_epochs=3"],
     "reason.num_steps: 8 is not a multiple of the 3 updates"),
    (["reason.rollout.max_tokens=200"],
     "reason.sequence_length: 160 does not hold"),
    (["reason.reward_weights=1,2"], "reason.reward_weights: found 2 for 1"),
    (["reason.rewards="], "reason.rewards: found none"),
    (["reason.rollout.max_thinking_tokens=8",
      "reason.rollout.min_thinking_tokens=9"],
     "reason.rollout.min_thinking_tokens: 9 is above "
     "rollout.max_thinking_tokens=8."),
    (["reason.rollout.max_thinking_tokens=97"],
     "reason.rollout.max_thinking_tokens: 97 is more than"),
    (["reason.loss.kl_coef=0.1", "reason.reference=measure"],
     "reason.reference: 'measure' runs later or trains nothing, needed one "
     "of init, cold_start. A directory has"),
    (["measure.checkpoints=raeson"],
     "measure.checkpoints: 'raeson' is no stage, needed one of init, "
     "cold_start, reason; the nearest is 'reason'."),
    (["measure.max_thinking_tokens=8,97"],
     "measure.max_thinking_tokens: 97 is more than rollout.max_tokens=96."),
    (["measure.num_waits=1,1"], "measure.num_waits: a value is there twice"),
    (["measure.wait_max_thinking_tokens=97,-1"],
     "measure.wait_max_thinking_tokens: 97 is more than rollout.max_tokens=96"),
    (["measure.wait_max_thinking_tokens=9,9"],
     "measure.wait_max_thinking_tokens: a value is there twice"),
    (["measure.num_waits=", "measure.wait_max_thinking_tokens=9"],
     "measure.wait_max_thinking_tokens: set to (9,), but it has no effect "
     "unless measure.num_waits is set"),
    (["measure.pass_at=1,2"], "measure.pass_at: 2 needs as many samples"),
    (["measure.samples_per_problem=4", "measure.rollout.temperature=0"],
     "measure.samples_per_problem: set to 4, but it has no effect unless "
     "measure.rollout.temperature > 0"),
    (["measure.majority.max_samples=4", "measure.rollout.temperature=0"],
     "measure.majority.max_samples: votes are all the same"),
    (["compute.frozen_dtype=bfloat16"],
     "compute.frozen_dtype: set to 'bfloat16', but it has no effect unless a "
     "stage holds a reference"),
    (["reason.loss.kl_coef=0.1", "reason.reference=adapter_off"],
     "reason.reference: 'adapter_off' needs adapters; set lora.rank."),
    (["cold_start.lora.rank=2", "cold_start.lora.targets=q,q"],
     "cold_start.lora.targets: found ('q', 'q'), needed different matrices."),
    (["cold_start.lora.rank=2", "cold_start.lora.targets=q,w"],
     "cold_start.lora.targets: found 'w', needed one of 'q', 'k', 'v', 'o'"),
    (["cold_start.trained=blocks/(q"],
     "cold_start.trained: 'blocks/(q' is no regular expression: missing )"),
    (["model_overrides.lora=x"], "model_overrides.lora: no such key."),
    (["model_overrides.decode_attention=kernel"],
     "model_overrides.decode_attention: no such key. The nearest key is "
     "compute.decode_attention."),
    (["model=qwen3-30b-a3b", "reason.rollout.weights_dtype=int8",
      "reason.loss.importance_sampling=mask"],
     "reason.rollout.weights_dtype: 'int8' does not quantise experts yet"),
    (["profile.steps=8,2"],
     "profile.steps: found (8, 2), needed the first and the last step to"),
    (["profile.steps=1,2,3"], "profile.steps: found (1, 2, 3), needed the"),
    (["profile.steps=0"], "profile.steps: found 0, needed"),
    (["profile.steps=7,9"],
     "reason.num_steps: 8 is less than the last of profile.steps=9."),
    (["profile.steps=2", "profile.stages=measure"],
     "profile.stages: 'measure' is no training stage of this config; those "
     "are cold_start, reason."),
    (["profile.steps=2", "stages=measure"],
     "profile.steps: set, but it has no effect: no stage here trains."),
    (["reason.rollout.max_num_seqs=-1"],
     "reason.rollout.max_num_seqs: found -1, needed"),
    (["measure.rollout.max_num_seqs=0"],
     "measure.rollout.max_num_seqs: found 0, needed"),
    (["reason.rollout.max_thinking_steps=2"],
     "reason.rollout.max_thinking_steps: set, but thinking.step is empty"),
    (["reason.rollout.num_waits=1", "reason.rollout.wait_order=draw"],
     "reason.rollout.wait_order: set to 'draw', but there is one text"),
    (["thinking.more_wait_texts=a", "reason.rollout.wait_order=draw"],
     "reason.rollout.wait_order: set to 'draw', but it has no effect unless"),
    (["thinking.more_wait_texts=a", "measure.num_waits=",
      "measure.rollout.wait_order=draw"],
     "measure.rollout.wait_order: set to 'draw', but it has no effect unless"),
    (["reason.rollout.suppress=wait"], "reason.rollout.suppress: not allowed "
     "here: the policy ratio would be against another distribution"),
    (["measure.rollout.logits_processor_args={'a': 1}"],
     "measure.rollout.logits_processor_args: set to {'a': 1}, but it has no "
     "effect unless measure.rollout.logits_processor is set"),
    (["measure.instructions.steps=4"],
     "measure.instructions.steps: set, but thinking.step is empty"),
    (["measure.instructions.tokens=4,4"],
     "measure.instructions.tokens: a value is there twice"),
    (["measure.instructions.tokens=4",
      "measure.instructions.token_text=Think."],
     "measure.instructions.token_text: found 'Think.', needed a text with"),
    (["measure.instructions.tokens=97", "measure.instructions.forced=true"],
     "measure.instructions.tokens: 97 is more than rollout.max_tokens=96."),
    (["measure.instructions.forced=true"],
     "measure.instructions.forced: set, but it has no effect unless"),
    (["measure.instructions.step_text={n}"],
     "measure.instructions.step_text: set to '{n}', but it has no effect "
     "unless measure.instructions.steps is set"),
    (["measure.instructions.classes=short", "measure.instructions.long_text=a"],
     "measure.instructions.long_text: set, but it has no effect: the class"),
])
def test_a_condition_between_keys(assignments, expected):
  assert problem(*assignments).startswith(expected)


def test_splash_takes_whole_blocks():
  found = problems(
      "compute.attention=splash", "cold_start.sequence_length=200")
  assert found[0].startswith(
      "cold_start.sequence_length: 200 is no multiple of compute.attention_"
      "block=128")
  assert any(x.startswith("reason.rollout.max_prompt_tokens: ") for x in found)
  found = problems("compute.attention=splash", "reason.share_prompts=True")
  assert any(x.startswith("reason.share_prompts: ") for x in found)
  found = problems("compute.attention=splash", "compute.attention_block=64")
  assert found[0].startswith(
      "model: compute.attention_block=64 must be a multiple of 128")
def test_a_trace_of_one_stage_may_be_past_the_end_of_another():
  assert not problems("profile.steps=10,12", "profile.stages=cold_start")


def test_quantised_weights_need_a_package(monkeypatch):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: (
      None if name == "qwix" else find_spec(name)))
  assert not problems("compute.frozen_dtype=bfloat16", "reason.lora.rank=2")
  assert problem("compute.frozen_dtype=nf4", "reason.trained=final_norm") == (
      "compute.frozen_dtype: 'nf4' needs the package qwix: pip install "
      "'posttrain[qlora]'.")


def test_budgets_need_the_end_of_thinking():
  found = problems("thinking.end=", "reason.rollout.num_waits=1")
  inert, *unclosed = found
  assert inert.startswith("thinking.newline: set to '', but it has no effect")
  assert [line.partition(":")[0] for line in unclosed] == [
      "reason.rollout.num_waits", "measure.max_thinking_tokens",
      "measure.num_waits"]
  assert all("set thinking.end" in line for line in unclosed)


def test_a_reference_may_be_frozen_in_another_dtype():
  assert not problems(
      "reason.loss.kl_coef=0.1", "compute.frozen_dtype=bfloat16")


def test_a_directory_of_weights_is_no_stage():
  assert not problems(
      "reason.loss.kl_coef=0.1", "reason.reference=runs/a/checkpoints",
      "measure.checkpoints=init,runs/b")


def test_all_problems_come_in_one_error():
  found = problems(
      "seed=x", "model=tinny", "reason.clip_high=1", "mesh.tensor=-1",
      "measure.pass_at=1,2", "cold_start.eval_every=3")
  assert len(found) == 6, found


def test_a_missing_key_says_what_it_is():
  config = config_lib.read_file(TINY)
  del config.reason["group_size"]
  with pytest.raises(
      config_lib.ConfigError,
      match=r"reason\.group_size: missing; needed: completions per prompt\."):
    config_lib.resolve(config)


def test_a_stage_left_out_is_checked_and_not_kept():
  config = config_lib.load(TINY, ["stages=cold_start"])
  assert "reason" not in config
  assert problem("stages=cold_start", "reason.num_step=3").startswith(
      "reason.num_step: ")


def test_a_resolved_config_has_every_key_and_survives_json():
  config = config_lib.load(TINY)
  leaves = dict(reader.leaves(reader.plain(config)))
  layout = reader.layout(reader.plain(config))
  free = ("args", "model_overrides")
  for path in keys.paths(layout):
    if not path.endswith(free) and not (
        ".sources" in path and "eval_data" in path):
      assert path in leaves or path.endswith(".sources"), path
  again = config_lib.assign(
      config_lib.jsonable(config), [], "config.json", saved=True)
  assert config_lib.diff(config, again) == []
  assert config_lib.jsonable(config) == config_lib.jsonable(again)


def test_a_saved_config_refuses_a_new_key_without_effect():
  saved = config_lib.jsonable(config_lib.load(TINY))
  load = lambda *assignments: config_lib.assign(
      saved, assignments, "config.json", saved=True)
  assert load("seed=3").seed == 3
  with pytest.raises(config_lib.ConfigError, match=r"kl_estimator: set to"):
    load("reason.loss.kl_estimator=k3")


def test_the_difference_of_two_configs():
  old = config_lib.load(TINY)
  new = config_lib.load(TINY, [
      "reason.num_steps=4", "measure.num_waits=",
      "cold_start.data.sources.0.args.count=7",
      "cold_start.data.sources.0.args.seed=1"])
  assert sorted(config_lib.diff(old, new)) == [
      "cold_start.data.sources.0.args.count: 2000 -> 7",
      "cold_start.data.sources.0.args.seed: (absent) -> 1",
      "measure.num_waits: (0, 1) -> ()",
      "reason.num_steps: 8 -> 4",
  ]


def test_long_values_that_differ_are_shortened_and_still_differ():
  old, new = ({"a": "x" * 5000 + middle + "y" * 5000} for middle in "12")
  [line] = config_lib.diff(old, new)
  assert line.startswith("a: 'xxx") and "(10,003 characters)" in line
  assert len(line) < 400
  assert config_lib.diff(old, old) == []


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.floats(),
    st.sampled_from(["", "init", "reason", "a:b", (), ("reason",), (1, 2),
                     ({},), {}, {"kind": "sft"}, {"kind": ()}, {"x": {}}]))


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.data())
def test_no_value_anywhere_breaks_the_checks(data):
  """Whatever stands where: a resolved config or the one kind of error."""
  values = config_lib.jsonable(config_lib.load(TINY + ":debug"))
  for _ in range(data.draw(st.integers(1, 3))):
    target = values
    while True:
      name = data.draw(st.sampled_from([*sorted(target), "new"]))
      child = target.get(name)
      if not isinstance(child, dict) or not child or data.draw(st.booleans()):
        break
      target = child
    target[name] = copy.deepcopy(data.draw(JUNK))
  try:
    config = config_lib.resolve(values, ignore_inert=lambda path: True)
  except config_lib.ConfigError as error:
    assert error.problems
  else:
    config_lib.assign(
        config_lib.jsonable(config), [], "config.json", saved=True)


def test_functions_are_listed_once():
  found = config_lib.functions(config_lib.load(TINY))
  assert len(set(found)) == len(found)
  assert [name for name in found if name.startswith(TASK)] == [
      f"{TASK}:{name}" for name in (
          "corpus", "demonstrations", "problems", "reward", "extract")]


def test_a_resolved_config_cannot_grow_keys():
  config = config_lib.load(TINY)
  with pytest.raises(AttributeError):
    config.new_key = 1


@pytest.mark.parametrize("spec, message", [
    ("configs/tniy.py", "The nearest is configs/tiny.py."),
    (TINY + ":huge", "knows no 'huge'"),
])
def test_a_file_that_cannot_be_read(spec, message, monkeypatch):
  monkeypatch.chdir(ROOT)
  with pytest.raises(config_lib.ConfigError, match=message):
    config_lib.load(spec)


def test_a_file_without_arguments(tmp_path):
  file = tmp_path / "c.py"
  file.write_text("x = 1")
  with pytest.raises(config_lib.ConfigError, match="defines no get_config"):
    config_lib.load(str(file))
  file.write_text("def get_config(): return {}")
  with pytest.raises(config_lib.ConfigError, match="leave out :debug"):
    config_lib.load(f"{file}:debug")


@pytest.mark.parametrize("variant", ["", ":debug"])
@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_resolves(path, variant):
  config = config_lib.load(path + variant)
  assert isinstance(config, ml_collections.ConfigDict)


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_opens_with_what_it_is(path):
  """What it reproduces, its command, its cost, its expected result."""
  text = ast.get_docstring(ast.parse(pathlib.Path(path).read_text()))
  name = pathlib.Path(path).name
  for part in ("Reproduces", f"  posttrain train --config=configs/{name}",
               "\nCost: ", "Expected", "`:debug`"):
    assert part in text, part


def test_loading_a_config_never_imports_jax():
  specs = [path + ":debug" for path in CONFIGS]
  code = (
      "import sys\n"
      "from posttrain import config\n"
      f"for spec in {specs!r}: config.load(spec, ['seed=1'])\n"
      "try: config.load(spec, ['sed=1'])\n"
      "except ValueError: pass\n"
      "assert not {'jax', 'jaxlib', 'flax', 'torch'} & set(sys.modules)\n")
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def nodes(section, prefix=""):
  for name, node in section.keys.items():
    if isinstance(node, keys.Section):
      yield from nodes(node, f"{prefix}{name}.")
    elif isinstance(node, keys.Items):
      yield from nodes(node.item, "")  # Its conditions are its own.
    elif isinstance(node, keys.Key):
      yield prefix + name, node


def renamed(node, prefix=""):
  """Old path -> new path, of all keys that had another name."""
  if isinstance(node, keys.Section):
    for name, child in node.keys.items():
      yield from renamed(child, f"{prefix}.{name}")
  elif isinstance(node, keys.Renamed):
    yield prefix[1:], node.path


@pytest.mark.parametrize("stage, kind", [
    ("cold_start", "sft"), ("reason", "rl"), ("measure", "evaluate")])
def test_an_old_key_names_the_new_one(stage, kind):
  section = stages.schema_of(kind).keys
  pairs = dict(renamed(section))
  assert set(pairs.values()) <= set(keys.paths(section))
  for old, new in pairs.items():
    assert problem(f"{stage}.{old}=3") == (
        f"{stage}.{old}: found '3', and this key is called {stage}.{new} now.")


def test_renamed_keys_are_of_the_kinds_that_had_them():
  names = lambda kind: {
      old.rpartition(".")[2]
      for old, _ in renamed(stages.schema_of(kind).keys)}
  assert names("sft") == set()
  assert names("rl") == {
      "slots", "policy", "behaviour_correction", "behaviour_cap",
      "behaviour_floor"}
  assert names("evaluate") == {
      "batch_rows", "policy", "hook", "hook_args"}


@pytest.mark.parametrize("name", ["continuous_batching", "refill"])
def test_a_key_of_the_former_second_way_to_sample_says_what_to_do(name):
  told = problem(f"measure.rollout.{name}=true")
  assert told.startswith(f"measure.rollout.{name}: ")
  assert "Remove the key; rollout.max_num_seqs is the number" in told


SECTIONS = [schema.TOP, *(
    stages.schema_of(kind).keys for kind in stages.KINDS)]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_schema_obeys_itself(section):
  known = dict(nodes(section))
  sources = {path for path in keys.paths(section) if path.endswith("sources")}
  for path, key in known.items():
    assert key.doc.endswith("."), path
    if key.needs:
      assert key.needs.path in known or key.needs.path in sources, path
    if key.default is keys.REQUIRED:
      continue
    values = key.default if isinstance(key.default, tuple) else (key.default,)
    for value in values:
      assert not key.choices or value in key.choices, path
      assert not key.bounds or keys.within(value, key.bounds), path
      assert key.type in (type(value), tuple[type(value), ...]), path


def test_the_page_of_all_keys_is_up_to_date():
  page = (ROOT / "docs/configs.md").read_text()
  assert document.insert(page) == page, (
      "run: python -m posttrain.config.document docs/configs.md")


def test_every_key_is_read_by_the_program():
  """A weak net against inert keys: the last name is used outside config/."""
  source = "\n".join(
      path.read_text() for path in (ROOT / "posttrain").rglob("*.py")
      if "config" not in path.relative_to(ROOT / "posttrain").parts)
  words = set(re.findall(r"\w+", source))
  leaves = {path.rpartition(".")[2] for section in SECTIONS
            for path in keys.paths(section)}
  assert leaves <= words, leaves - words
