"""Checks conditions between keys, which a schema cannot express.

Each check is a small function that yields problems, which begin with a path.
Those of one kind of stage stand in its file in `stages/`; those of the whole
config stand here, in `CHECKS`. A check runs only where all keys it could read
are of their type, so that one mistake is not reported twice.
"""

import dataclasses
import importlib.util
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from posttrain.config import keys, reader, schema, stages
from posttrain.model import config as model_config
from posttrain.model import presets

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "==": operator.eq,
    "!=": operator.ne,
}

# Ranges of ModelConfig's fields, where they are not 1 or more for an int and 0
# or more for a float.
OVERRIDES = {
    "vocab_size": "[0, inf)", "sliding_window": "[0, inf)",
    "max_positions": "[0, inf)", "num_experts": "[0, inf)",
    "experts_per_token": "[0, inf)", "rope_theta": "(0, inf)",
    "norm_eps": "(0, 1]", "norm_offset": "[-100, 100]"}

ADAPTER_OFF = "adapter_off"  # As a reference.


def check_stages(config: Mapping) -> Iterator[str]:
  sections = [name for name in config if name not in schema.TOP.keys]
  for name in config["stages"]:
    if name in schema.TOP.keys:
      yield f"stages: {name!r} is the name of another key; rename the stage."
    elif not name.isidentifier():
      yield (f"stages: {keys.shown(name)} cannot name a section; use letters "
             "and _.")
    elif name not in config:
      yield (f"stages: there is no section {keys.shown(name)} with a kind."
             + keys.hint(name, sections, " The nearest is {!r}."))
  for name in sorted(set(config["stages"])):
    if config["stages"].count(name) > 1:
      yield f"stages: {keys.shown(name)} is named more than once."


def check_model(config: Mapping) -> Iterator[str]:
  name, changes = config["model"], config["model_overrides"]
  if not name and config["init"]["kind"] == "random":
    yield ('model: "" means the shape of what init names, and '
           "init.kind='random' names nothing. Set model to a preset.")
  if name and name not in presets.PRESETS:
    yield (f"model: there is no preset {keys.shown(name)}"
           f"{keys.hint(name, presets.PRESETS, '; the nearest is {!r}')}, of "
           f"{', '.join(presets.PRESETS)}. A shape without a preset comes "
           'with its weights: model="" and init.path.')
    return
  compute = model_config.COMPUTE_FIELDS
  derived = (*compute, "lora", "quantized", "rope_scaling")
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
    bounds = OVERRIDES.get(
        field, "[1, inf)" if types.get(field) is int else "[0, inf)")
    if field not in types:
      near = f" The nearest key is compute.{field}." if field in compute else (
          keys.hint(field, types, " The nearest key is model_overrides.{}."))
      yield f"model_overrides.{field}: no such key.{near}"
    elif reader.typed_as(value, types[field]) is None:
      yield (f"model_overrides.{field}: found {keys.shown(value)}, needed "
             f"{keys.TYPE_NAMES[types[field]]}.")
    elif types[field] in (int, float) and not keys.within(value, bounds):
      yield (f"model_overrides.{field}: found {keys.shown(value)}, needed a "
             f"value in {keys.allowed(value, bounds)}.")


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
  if config["mesh"]["roles"] != "split":
    return
  if not any(kind.learns_from_rollouts for kind in _in_order(config).values()):
    yield ("mesh.roles: 'split' has no effect without a stage of kind "
           f"{_alternating()}, which samples and trains.")
  if "optimizer" in config["compute"]["offload"]:
    yield ("compute.offload: 'optimizer' makes room for sampling, which has "
           "devices of its own where mesh.roles='split'.")


def check_frozen(config: Mapping) -> Iterator[str]:
  """Looks for frozen parameters: a reference, or those not trained."""
  holds = [config[name] for name, kind in stage_schemas(config).items()
           if kind.trains and (
               kind.holds_reference(config[name])
               or config[name].get("trained") or _has_adapters(config[name]))]
  if config["compute"]["frozen_dtype"] != "float32" and not holds:
    yield ("compute.frozen_dtype: set to "
           f"{config['compute']['frozen_dtype']!r}, but it has no effect "
           "unless a stage holds a reference (loss.kl_coef > 0) or trains a "
           "part of the weights (lora.rank, trained).")


def check_offload(config: Mapping) -> Iterator[str]:
  kinds, offload = stage_schemas(config), config["compute"]["offload"]
  if "optimizer" in offload and not any(
      kind.learns_from_rollouts for kind in kinds.values()):
    yield ("compute.offload: 'optimizer' has no effect without a stage of kind "
           f"{_alternating()}, which alternates between sampling and training.")
  own = [name for name, kind in kinds.items()
         if kind.holds_reference(config[name]) and not (
             config[name].get("reference") in ("", ADAPTER_OFF)
             and _has_adapters(config[name]))]
  if "reference" in offload and not own:
    yield ("compute.offload: 'reference' has no effect: no stage holds one "
           "(loss.kl_coef > 0) that does not share its weights with the "
           "policy's adapters.")


def check_expert_axis(config: Mapping) -> Iterator[str]:
  size = reader.at(config, "mesh.expert")
  if size != 1 and experts(config) == 0:
    yield (f"mesh.expert: set to {size}, and the model has no experts; "
           "mesh.fsdp splits the same things.")


def check_quantized(config: Mapping) -> Iterator[str]:
  kind = config["compute"]["frozen_dtype"]
  if kind in model_config.QUANTIZED and not importlib.util.find_spec("qwix"):
    yield (f"compute.frozen_dtype: {kind!r} needs the package qwix: pip "
           "install 'posttrain[qlora]'.")


def experts(config: Mapping) -> int | None:
  """Counts the model's experts; None where the model is not known."""
  preset = presets.PRESETS.get(str(config["model"]))
  changes = config["model_overrides"]
  if preset is None or not isinstance(changes, dict):
    return None
  return changes.get("num_experts", preset.num_experts)


def check_profile(config: Mapping) -> Iterator[str]:
  steps, chosen = config["profile"]["steps"], config["profile"]["stages"]
  trained = [name for name, kind in _in_order(config).items() if kind.trains]
  for name in chosen:
    if name not in trained:
      yield (f"profile.stages: {keys.shown(name)} is no training stage of this "
             f"config; those are {', '.join(trained) or 'none'}.")
  if steps and not trained:
    yield "profile.steps: set, but it has no effect: no stage here trains."
  if len(steps) > 2 or list(steps) != sorted(steps):
    yield (f"profile.steps: found {keys.shown(steps)}, needed the first and "
           "the last step to trace, or one step.")
  last = max(steps, default=0)
  for name in trained:
    num_steps = config[name].get("num_steps", last)
    if last > num_steps and (not chosen or name in chosen):
      yield (f"{name}.num_steps: {num_steps} is less than the last of "
             f"profile.steps={last}. Trace earlier steps, or name the stages "
             "to trace in profile.stages.")


def check_whole_blocks(config: Mapping) -> Iterator[str]:
  block = config["compute"]["attention_block"]
  if config["compute"]["attention"] != "splash":
    return
  for name in _in_order(config):
    for path in ("sequence_length", "rollout.max_prompt_tokens"):
      length = dict(reader.leaves(config[name])).get(path, 0)
      if length % block:
        yield (f"{name}.{path}: {length} is no multiple of "
               f"compute.attention_block={block}, and "
               "compute.attention='splash' takes whole blocks.")


# Facts about the stages, for the checks.


def stage_schemas(config: Mapping) -> dict[str, stages.StageSchema]:
  """Maps the names of the stage sections to their schemas; {} has none."""
  return {name: stages.schema_of(section["kind"])
          for name, section in config.items()
          if name not in schema.TOP.keys and section}


def _in_order(config: Mapping) -> dict[str, stages.StageSchema]:
  """Maps the names of the stages that run, in order, to their schemas."""
  found = stage_schemas(config)
  return {name: found[name] for name in config["stages"] if name in found}


def _has_adapters(section: Mapping) -> bool:
  return bool(section.get("lora", {}).get("rank"))


def _alternating() -> str:
  return " or ".join(
      kind for kind in stages.KINDS
      if stages.schema_of(kind).learns_from_rollouts)


def weights_problem(
    config: Mapping, name: str, path: str, source: str,
) -> Iterator[str]:
  """Checks a source of weights of the stage `name`.

  It is "init", an earlier stage that trains, or a directory.
  """
  earlier = itertools.takewhile(
      lambda item: item[0] != name, _in_order(config).items())
  known = ["init", *(stage for stage, kind in earlier if kind.trains)]
  if source in known or "/" in source:
    return
  late = " runs later or trains nothing" if source in config else (
      " is no stage")
  yield (f"{path}: {keys.shown(source)}{late}, needed one of "
         f"{', '.join(known)}"
         f"{keys.hint(source, known, '; the nearest is {!r}')}. A directory "
         "has a / in its name.")


# Stands for every section of a stage in the names of what a check reads.
STAGES = "*"

CHECKS = {  # Each with the names of the keys that it reads.
    check_stages: ("stages",),
    check_model: ("model", "model_overrides", "compute", "init"),
    check_init: ("init", "tokenizer", "model"),
    check_mesh: ("mesh",),
    check_roles: ("mesh", "compute", "stages", STAGES),
    check_frozen: ("compute", STAGES),
    check_offload: ("compute", STAGES),
    check_expert_axis: ("mesh", "model", "model_overrides"),
    check_quantized: ("compute",),
    check_profile: ("profile", "stages", STAGES),
    check_whole_blocks: ("compute", "stages", STAGES),
}
_READ_BY_STAGES = {"stages", "thinking", "compute", "mesh"}


def run(read: reader.Reader) -> list[str]:
  """Lists the problems of a config that was read."""
  problems: list[str] = []
  faulty = read.faulty | {
      STAGES for name in read.faulty if name not in schema.TOP.keys}
  # A section whose kind is wrong is there all the same.
  config = {name: {} for name, value in read.values.items() if isinstance(
      value, Mapping) and "kind" in value} | read.resolved
  for check, reads in CHECKS.items():
    if not faulty.intersection(reads):
      problems += check(config)
  if faulty & _READ_BY_STAGES:
    return problems
  for name, kind in _in_order(read.resolved).items():
    for stage_check in kind.checks if name not in faulty else ():
      problems += [f"{name}.{problem}" for problem in stage_check(
          read.resolved, name, read.resolved[name])]
  return problems


# Keys without effect: set in the config, while their condition is not met.


def without_effect(read: reader.Reader) -> list[tuple[str, str]]:
  """Lists paths and problems of keys that are set and have no effect."""
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
    found = reader.at(root, node.needs.path)
    if not _OPERATORS[node.needs.operator](found, node.needs.value):
      yield path, (
          f"{path}: set to {keys.shown(values)}, but it has no effect unless "
          f"{prefix}{node.needs}; found {keys.shown(found)}.")
