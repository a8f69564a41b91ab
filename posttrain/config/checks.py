"""What a schema cannot say: conditions between keys.

Each check is a small function that yields problems, and stands in `CHECKS` or
in `STAGE_CHECKS`. A check runs only where all keys it could read are of their
type, so that one mistake is not reported twice.
"""

import dataclasses
import importlib.util
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from posttrain.config import keys, reader, sampling_checks, schema, tracing
from posttrain.model import config as model_config
from posttrain.model import presets

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "==": operator.eq,
    "!=": operator.ne,
}


def run(read: reader.Reader) -> list[str]:
  """The problems of a config that was read."""
  problems: list[str] = []
  for check, reads in CHECKS.items():
    if not read.faulty.intersection(reads):
      problems += check(read.resolved)
  if read.faulty & {"stages", "thinking", "compute", "profile"}:
    return problems
  for name in read.resolved["stages"]:
    stage = read.resolved.get(name)
    if isinstance(stage, dict) and "kind" in stage and (
        name not in read.faulty):
      for stage_check in STAGE_CHECKS[stage["kind"]]:
        problems += [f"{name}.{problem}"
                     for problem in stage_check(read.resolved, name, stage)]
  return problems


# Keys without effect: set in the config, while their condition is not met.


def without_effect(read: reader.Reader) -> list[tuple[str, str]]:
  """Paths and problems of keys that are set and that nothing would read."""
  problems: list[tuple[str, str]] = []
  for name, node in read.layout.keys.items():
    stage = name not in schema.TOP.keys
    if name in read.faulty or name not in read.values:
      continue
    root = read.resolved[name] if stage else read.resolved
    prefix = f"{name}." if stage else ""
    problems += _inert(node, read.values[name], root, name, prefix)
  return problems


def _inert(
    node: Any, values: Any, root: Mapping, path: str, prefix: str,
) -> Iterator[tuple[str, str]]:
  if isinstance(node, keys.Section):
    for name, child in node.keys.items():
      if name in values:
        yield from _inert(
            child, values[name], root, f"{path}.{name}", prefix)
  elif isinstance(node, keys.Items):
    for index, item in enumerate(values):  # Conditions are within the item.
      filled = {name: item.get(name, key.default)
                for name, key in node.item.keys.items()
                if isinstance(key, keys.Key)}
      yield from _inert(node.item, item, filled, f"{path}.{index}",
                        f"{path}.{index}.")
  elif isinstance(node, keys.Key) and node.needs is not None:
    found = _at(root, node.needs.path)
    if not _OPERATORS[node.needs.operator](found, node.needs.value):
      yield path, (
          f"{path}: set to {values!r}, but it has no effect unless "
          f"{prefix}{node.needs}; found {found!r}.")


def _at(values: Any, path: str) -> Any:
  for name in path.split("."):
    values = values[name]
  return values


# Checks of the whole config.


def check_stages(config: Mapping) -> Iterator[str]:
  sections = [name for name in config if name not in schema.TOP.keys]
  for name in config["stages"]:
    if name in schema.TOP.keys:
      yield f"stages: {name!r} is the name of another key; rename the stage."
    elif not name.isidentifier():
      yield f"stages: {name!r} cannot name a section; use letters and _."
    elif name not in config:
      near = keys.nearest(name, sections)
      yield (f"stages: there is no section {name!r} with a kind."
             + (f" The nearest is {near!r}." if near else ""))
  for name in sorted(set(config["stages"])):
    if config["stages"].count(name) > 1:
      yield f"stages: {name!r} is named more than once."


def check_model(config: Mapping) -> Iterator[str]:
  name, changes = config["model"], config["model_overrides"]
  if not name and config["init"]["kind"] == "random":
    yield ('model: "" means the shape of what init names, and '
           "init.kind='random' names nothing. Set model to a preset.")
  if name and name not in presets.PRESETS:
    yield (f"model: there is no preset {name!r}; the nearest is "
           f"{keys.nearest(name, presets.PRESETS)!r}, of "
           f"{', '.join(presets.PRESETS)}. A shape without a preset comes "
           'with its weights: model="" and init.path.')
    return
  compute = model_config.COMPUTE_FIELDS
  derived = (*compute, "lora", "quantized")
  types = {field.name: field.type
           for field in dataclasses.fields(model_config.ModelConfig)
           if field.name not in derived}
  problems = list(_override_problems(changes, types, compute))
  yield from problems
  if name and not problems:
    compute_fields = {field: config["compute"][field] for field in compute}
    try:
      dataclasses.replace(
          presets.PRESETS[name], **changes, **compute_fields)
    except ValueError as error:
      yield f"model: {error}"


def _override_problems(
    changes: Mapping, types: Mapping[str, Any], compute: tuple[str, ...],
) -> Iterator[str]:
  for field, value in changes.items():
    if field not in types:
      near = f"compute.{field}" if field in compute else (
          f"model_overrides.{keys.nearest(field, types)}")
      yield (f"model_overrides.{field}: no such key. The nearest key is "
             f"{near}.")
    elif reader.typed_as(value, types[field]) is None:
      yield (f"model_overrides.{field}: found {value!r}, needed "
             f"{keys.type_name(types[field])}.")
    elif types[field] is int and value < (0 if field == "vocab_size" else 1):
      yield f"model_overrides.{field}: found {value}, needed 1 or more."


def check_init(config: Mapping) -> Iterator[str]:
  init, tokenizer = config["init"], config["tokenizer"]
  if not init["path"] and (
      init["kind"] in ("workdir", "directory")
      or (init["kind"] == "preset" and not config["model"])):
    yield f"init.path: missing; init.kind={init['kind']!r} needs one."
  if tokenizer["path"] and tokenizer["train"]:
    yield "tokenizer.train: set beside tokenizer.path; keep one of them."
  if init["kind"] == "random" and not (
      tokenizer["path"] or tokenizer["train"]):
    yield ("tokenizer.path: missing; random weights come with no tokenizer. "
           "Set tokenizer.path or tokenizer.train.")
  if (tokenizer["train"] and tokenizer["model_type"] != "word"
      and not tokenizer["vocab_size"]):
    yield ("tokenizer.vocab_size: missing; tokenizer.model_type="
           f"{tokenizer['model_type']!r} needs it.")


def check_mesh(config: Mapping) -> Iterator[str]:
  mesh = config["mesh"]
  for path, section in ("mesh", mesh), ("mesh.sampling", mesh["sampling"]):
    sizes = {f"{path}.{name}": size for name, size in section.items()
             if isinstance(size, int)}
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
      yield f"{rest[0]}: -1 beside {rest[1]}=-1; set one of them to a number."
    for name, size in sizes.items():
      if size == 0:
        yield (f"{name}: found a size of 0; -1 means all devices that "
               "remain.")


def check_roles(config: Mapping) -> Iterator[str]:
  split = config["mesh"]["roles"] == "split"
  if split and not any(
      config.get(name, {}).get("kind") == "grpo" for name in config["stages"]):
    yield ("mesh.roles: 'split' has no effect without a stage of kind grpo, "
           "which samples and trains.")
  if split and "optimizer" in config["compute"]["offload"]:
    yield ("compute.offload: 'optimizer' makes room for sampling, which has "
           "devices of its own where mesh.roles='split'.")


def check_frozen(config: Mapping) -> Iterator[str]:
  """Frozen are a GRPO stage's reference, and what a stage does not train."""
  stages = [section for section in config.values()
            if isinstance(section, Mapping)
            and section.get("kind") in schema.TRAINING_KINDS]
  holds = [stage.get("loss", {}).get("kl_coef") or stage.get("trained")
           or stage.get("lora", {}).get("rank") for stage in stages]
  if config["compute"]["frozen_dtype"] != "float32" and not any(holds):
    yield ("compute.frozen_dtype: set to "
           f"{config['compute']['frozen_dtype']!r}, but it has no effect "
           "unless a stage holds a reference (loss.kl_coef > 0) or trains a "
           "part of the weights (lora.rank, trained).")


def check_offload(config: Mapping) -> Iterator[str]:
  stages = [section for section in config.values()
            if isinstance(section, Mapping) and section.get("kind") == "grpo"]
  if "optimizer" in config["compute"]["offload"] and not stages:
    yield ("compute.offload: 'optimizer' has no effect without a stage of kind "
           "grpo, which alternates between sampling and training.")
  own = [stage for stage in stages
         if stage.get("loss", {}).get("kl_coef") and not (
             stage.get("reference") in ("", schema.ADAPTER_OFF)
             and stage.get("lora", {}).get("rank"))]
  if "reference" in config["compute"]["offload"] and not own:
    yield ("compute.offload: 'reference' has no effect: no stage holds one "
           "(loss.kl_coef > 0) that does not share its weights with the "
           "policy's adapters.")


def check_expert_axis(config: Mapping) -> Iterator[str]:
  size = _at(config, "mesh.expert")
  if size != 1 and _is_dense(config):
    yield (f"mesh.expert: set to {size}, and the model has no experts; "
           "mesh.fsdp splits the same things.")


# Checks of one stage. Problems begin with a path inside the stage.


def check_optimizer(config, name: str, stage: Mapping) -> Iterator[str]:
  if stage["warmup_steps"] > stage["num_steps"]:
    yield (f"warmup_steps: {stage['warmup_steps']} is more than "
           f"num_steps={stage['num_steps']}.")
  if stage["final_learning_rate"] > stage["learning_rate"]:
    yield (f"final_learning_rate: {stage['final_learning_rate']} is above "
           f"learning_rate={stage['learning_rate']}.")
  if (stage["optimizer"] == "adafactor" and not stage["beta1"]
      and stage["moments_dtype"] != "float32"):
    yield (f"moments_dtype: set to {stage['moments_dtype']!r}, but it has no "
           "effect: Adafactor keeps no mean if beta1 is 0.")


def check_router(config, name: str, stage: Mapping) -> Iterator[str]:
  if stage["router_aux_coef"] and _is_dense(config):
    yield (f"router_aux_coef: set to {stage['router_aux_coef']}, but it has "
           "no effect: the model has no experts.")


def check_checkpoint(config, name: str, stage: Mapping) -> Iterator[str]:
  checkpoint = stage["checkpoint"]
  if checkpoint["keep_best"] and not checkpoint["best_metric"]:
    yield ("checkpoint.best_metric: missing; checkpoint.keep_best="
           f"{checkpoint['keep_best']} needs the name of a metric.")


def check_whole_blocks(config, name: str, stage: Mapping) -> Iterator[str]:
  compute, block = config["compute"], _at(config, "compute.attention_block")
  for path in ("sequence_length", "rollout.max_prompt_tokens"):
    part = path.split(".")[0]
    if compute["attention"] == "splash" and part in stage and (
        _at(stage, path) % block):
      yield (f"{path}: {_at(stage, path)} is no multiple of "
             f"compute.attention_block={block}, and "
             "compute.attention='splash' takes whole blocks.")


def check_shared_prompts(config, name: str, stage: Mapping) -> Iterator[str]:
  if stage["share_prompts"] and config["compute"]["attention"] == "splash":
    yield ("share_prompts: compute.attention='splash' knows no shared prompts. "
           "Use compute.attention='blocks', or share_prompts=False.")


def check_sft_rows(config, name: str, stage: Mapping) -> Iterator[str]:
  yield from _divides(stage, "num_microbatches", "rows")


def check_sources(config, name: str, stage: Mapping) -> Iterator[str]:
  if not stage["data"]["sources"]:
    yield "data.sources: found none, needed at least one."
  for part in ("data", "eval_data"):
    for index, source in enumerate(stage[part]["sources"]):
      path = f"{part}.sources.{index}"
      if bool(source["path"]) == bool(source["task"]):
        yield f"{path}: set one of path and task; found {dict(source)!r}."


def check_groups(config, name: str, stage: Mapping) -> Iterator[str]:
  yield from _divides(stage, "num_minibatches", "num_groups")
  updates = stage["num_minibatches"] * stage["num_epochs"]
  if stage["num_steps"] % updates:
    yield (f"num_steps: {stage['num_steps']} is not a multiple of the "
           f"{updates} updates (num_minibatches x num_epochs) that a batch of "
           "rollouts gives.")
  rollout = stage["rollout"]
  longest = rollout["max_prompt_tokens"] + rollout["max_tokens"]
  if stage["sequence_length"] < longest:
    yield (f"sequence_length: {stage['sequence_length']} does not hold "
           f"rollout.max_prompt_tokens + rollout.max_tokens = {longest}.")


def check_kl(config, name: str, stage: Mapping) -> Iterator[str]:
  loss = stage["loss"]
  estimator, place = loss["kl_estimator"], loss["kl_in"]
  if not loss["kl_coef"]:
    return
  if place == "loss" and estimator == "k1":
    yield ("loss.kl_estimator: 'k1' in the loss has an expected gradient of "
           "zero, so it would hold nothing to the reference. Use 'k2' or "
           "'k3', or loss.kl_in='reward'.")
  if place == "reward" and estimator != "k1":
    yield (f"loss.kl_estimator: {estimator!r} in the reward does not have the "
           "gradient of the KL; 'k1' does. Use 'k1', or loss.kl_in='loss'.")


def check_correction(config, name: str, stage: Mapping) -> Iterator[str]:
  """The sampler's policy is another one than the trainer's."""
  if stage["loss"]["behaviour_correction"] != "none":
    return
  if stage["staleness"]:
    yield (f"staleness: set to {stage['staleness']}, and rollouts of an older "
           "policy need loss.behaviour_correction='truncate' or 'mask'.")
  for key in ("cache_dtype", "weights_dtype"):
    if stage["rollout"][key] == "int8":
      yield (f"rollout.{key}: 'int8' samples from another distribution than "
             "the trainer's, and needs loss.behaviour_correction='truncate' "
             "or 'mask'.")


def check_staleness(config, name: str, stage: Mapping) -> Iterator[str]:
  if not stage["staleness"]:
    return
  if _at(config, "mesh.roles") != "split":
    yield (f"staleness: set to {stage['staleness']}, and nothing can be drawn "
           "while the same devices train. Set mesh.roles='split', or 0.")
  updates = stage["num_minibatches"] * stage["num_epochs"]
  every = _at(stage, "checkpoint.every")
  if every % updates:
    yield (f"checkpoint.every: {every} is not a multiple of the {updates} "
           "updates of a batch of rollouts, which with staleness are under "
           "way at once.")


def check_rewards(config, name: str, stage: Mapping) -> Iterator[str]:
  rewards, weights = stage["rewards"], stage["reward_weights"]
  if not rewards:
    yield "rewards: found none, needed at least one module:function."
  if weights and len(weights) != len(rewards):
    yield (f"reward_weights: found {len(weights)} for {len(rewards)} rewards; "
           "give one each, or none.")
  if len(set(rewards)) < len(rewards):
    yield f"rewards: one is there twice in {rewards}; use reward_weights."


def check_weights_dtype(config, name: str, stage: Mapping) -> Iterator[str]:
  dtype = stage["rollout"]["weights_dtype"]
  if dtype == "int8" and _experts(config):
    yield (f"rollout.weights_dtype: {dtype!r} does not quantise experts yet, "
           "and the model has them. Use 'compute'.")


def check_reference(config, name: str, stage: Mapping) -> Iterator[str]:
  if stage["reference"] == schema.ADAPTER_OFF:
    if not stage["lora"]["rank"]:
      yield ("reference: 'adapter_off' needs adapters; set lora.rank.")
  elif stage["reference"]:
    yield from _weights(config, name, "reference", stage["reference"])


def check_checkpoints(config, name: str, stage: Mapping) -> Iterator[str]:
  for checkpoint in stage["checkpoints"]:
    yield from _weights(config, name, "checkpoints", checkpoint)


def check_trained(config, name: str, stage: Mapping) -> Iterator[str]:
  targets = stage["lora"]["targets"]
  if not targets or len(set(targets)) < len(targets):
    yield f"lora.targets: found {targets!r}, needed different matrices."
  try:
    re.compile(stage["trained"])
  except re.error as error:
    yield (f"trained: {stage['trained']!r} is no regular expression: {error}.")


def check_quantized(config: Mapping) -> Iterator[str]:
  kind = config["compute"]["frozen_dtype"]
  if kind in model_config.QUANTIZED and not importlib.util.find_spec("qwix"):
    yield (f"compute.frozen_dtype: {kind!r} needs the package qwix: pip "
           "install 'posttrain[qlora]'.")


CHECKS = {  # And the names of what they read.
    check_stages: ("stages",),
    check_model: ("model", "model_overrides", "compute", "init"),
    check_init: ("init", "tokenizer", "model"),
    check_mesh: ("mesh",),
    check_roles: ("mesh", "compute", "stages"),
    check_frozen: ("compute",),
    check_offload: ("compute",),
    check_expert_axis: ("mesh", "model", "model_overrides"),
    check_quantized: ("compute",),
    tracing.check_profile: ("profile", "stages"),
}
STAGE_CHECKS = {
    "sft": (check_optimizer, check_router, check_trained, check_checkpoint,
            check_sft_rows, check_sources, check_whole_blocks,
            tracing.check_steps),
    "grpo": (check_optimizer, check_router, check_trained, check_checkpoint,
             check_groups, check_kl, check_correction, check_staleness,
             check_rewards, check_reference, check_shared_prompts,
             *sampling_checks.GRPO, check_weights_dtype, check_whole_blocks,
             tracing.check_steps),
    "evaluate": (check_checkpoints, *sampling_checks.EVALUATE,
                 check_weights_dtype, check_whole_blocks),
}


def _is_dense(config: Mapping) -> bool:
  """The model is known, as far as its own checks allow, and has no experts."""
  return _experts(config) == 0


def _experts(config: Mapping) -> int | None:
  """Of the model; None where it is not known."""
  preset = presets.PRESETS.get(str(config["model"]))
  changes = config["model_overrides"]
  if preset is None or not isinstance(changes, dict):
    return None
  return changes.get("num_experts", preset.num_experts)


def _divides(stage: Mapping, part: str, whole: str) -> Iterator[str]:
  if stage[whole] % stage[part]:
    yield (f"{whole}: {stage[whole]} is not a multiple of "
           f"{part}={stage[part]}.")


def _weights(
    config: Mapping, name: str, path: str, source: str,
) -> Iterator[str]:
  """A source of weights: "init", an earlier training stage, a directory."""
  earlier = [
      stage for stage in itertools.takewhile(
          lambda stage: stage != name, config["stages"])
      if config.get(stage, {}).get("kind") in schema.TRAINING_KINDS]
  known = ["init", *earlier]
  if source in known or "/" in source:
    return
  late = " runs later or trains nothing" if source in config else (
      " is no stage")
  yield (f"{path}: {source!r}{late}; the nearest of {', '.join(known)} is "
         f"{keys.nearest(source, known)!r}. A directory has a / in its name.")
