"""Checks of the whole config: stages, model, weights, mesh, memory.

As in `checks`, each is a small function that yields problems, which begin with
a path.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.config import keys, reader, schema, tracing
from posttrain.model import config as model_config
from posttrain.model import presets

# Ranges of ModelConfig's fields, where they are not 1 or more for an int and 0
# or more for a float.
OVERRIDES = {
    "vocab_size": "[0, inf)", "sliding_window": "[0, inf)",
    "max_positions": "[0, inf)", "num_experts": "[0, inf)",
    "experts_per_token": "[0, inf)", "rope_theta": "(0, inf)",
    "norm_eps": "(0, 1]", "norm_offset": "[-100, 100]"}


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
             f"{keys.type_name(types[field])}.")
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
  split = config["mesh"]["roles"] == "split"
  if split and not any(
      config.get(name, {}).get("kind") == "rl" for name in config["stages"]):
    yield ("mesh.roles: 'split' has no effect without a stage of kind rl, "
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
            if isinstance(section, Mapping) and section.get("kind") == "rl"]
  if "optimizer" in config["compute"]["offload"] and not stages:
    yield ("compute.offload: 'optimizer' has no effect without a stage of kind "
           "rl, which alternates between sampling and training.")
  own = [stage for stage in stages
         if stage.get("loss", {}).get("kl_coef") and not (
             stage.get("reference") in ("", schema.ADAPTER_OFF)
             and stage.get("lora", {}).get("rank"))]
  if "reference" in config["compute"]["offload"] and not own:
    yield ("compute.offload: 'reference' has no effect: no stage holds one "
           "(loss.kl_coef > 0) that does not share its weights with the "
           "policy's adapters.")


def check_expert_axis(config: Mapping) -> Iterator[str]:
  size = reader.at(config, "mesh.expert")
  if size != 1 and is_dense(config):
    yield (f"mesh.expert: set to {size}, and the model has no experts; "
           "mesh.fsdp splits the same things.")


def check_quantized(config: Mapping) -> Iterator[str]:
  kind = config["compute"]["frozen_dtype"]
  if kind in model_config.QUANTIZED and not importlib.util.find_spec("qwix"):
    yield (f"compute.frozen_dtype: {kind!r} needs the package qwix: pip "
           "install 'posttrain[qlora]'.")


def is_dense(config: Mapping) -> bool:
  """The model is known, as far as its own checks allow, and has no experts."""
  return experts(config) == 0


def experts(config: Mapping) -> int | None:
  """Counts the model's experts; None where the model is not known."""
  preset = presets.PRESETS.get(str(config["model"]))
  changes = config["model_overrides"]
  if preset is None or not isinstance(changes, dict):
    return None
  return changes.get("num_experts", preset.num_experts)


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
