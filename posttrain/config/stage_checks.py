"""Checks of one stage, what it samples apart; see `sampling_checks`.

As in `checks`, each is a small function that yields problems which begin with
a path inside the stage.
"""

import itertools
import re
from collections.abc import Iterator, Mapping

from posttrain.config import (
    config_checks,
    keys,
    reader,
    sampling_checks,
    schema,
    tracing,
)


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
  if stage["router_aux_coef"] and config_checks.is_dense(config):
    yield (f"router_aux_coef: set to {stage['router_aux_coef']}, but it has "
           "no effect: the model has no experts.")


def check_checkpoint(config, name: str, stage: Mapping) -> Iterator[str]:
  checkpoint = stage["checkpoint"]
  if checkpoint["keep_best"] and not checkpoint["best_metric"]:
    yield ("checkpoint.best_metric: missing; checkpoint.keep_best="
           f"{checkpoint['keep_best']} needs the name of a metric.")


def check_whole_blocks(config, name: str, stage: Mapping) -> Iterator[str]:
  compute = config["compute"]
  block = compute["attention_block"]
  for path in ("sequence_length", "rollout.max_prompt_tokens"):
    part = path.split(".")[0]
    if compute["attention"] == "splash" and part in stage and (
        reader.at(stage, path) % block):
      yield (f"{path}: {reader.at(stage, path)} is no multiple of "
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
        yield (f"{path}: set one of path and task; found "
               f"{keys.shown(dict(source))}.")


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


def check_importance_sampling(config, name: str, stage: Mapping) -> Iterator[
    str]:
  """The sampler's policy is another one than the trainer's."""
  if stage["loss"]["importance_sampling"] != "none":
    return
  if stage["staleness"]:
    yield (f"staleness: set to {stage['staleness']}, and rollouts of an older "
           "policy need loss.importance_sampling='truncate' or 'mask'.")
  for key in ("cache_dtype", "weights_dtype"):
    if stage["rollout"][key] == "int8":
      yield (f"rollout.{key}: 'int8' samples from another distribution than "
             "the trainer's, and needs loss.importance_sampling='truncate' "
             "or 'mask'.")


def check_staleness(config, name: str, stage: Mapping) -> Iterator[str]:
  if not stage["staleness"]:
    return
  if reader.at(config, "mesh.roles") != "split":
    yield (f"staleness: set to {stage['staleness']}, and nothing can be drawn "
           "while the same devices train. Set mesh.roles='split', or 0.")
  updates = stage["num_minibatches"] * stage["num_epochs"]
  every = reader.at(stage, "checkpoint.every")
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
  if weights and not any(weights):
    yield (f"reward_weights: found {keys.shown(weights)}, and rewards that "
           "count 0 times teach nothing; needed one that is not 0.")
  if len(set(rewards)) < len(rewards):
    yield (f"rewards: one is there twice in {keys.shown(rewards)}; use "
           "reward_weights.")


def check_weights_dtype(config, name: str, stage: Mapping) -> Iterator[str]:
  dtype = stage["rollout"]["weights_dtype"]
  if dtype == "int8" and config_checks.experts(config):
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
    yield (f"lora.targets: found {keys.shown(targets)}, needed different "
           "matrices.")
  try:
    re.compile(stage["trained"])
  except re.error as error:
    yield (f"trained: {keys.shown(stage['trained'])} is no regular "
           f"expression: {error}.")


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
  yield (f"{path}: {keys.shown(source)}{late}, needed one of "
         f"{', '.join(known)}"
         f"{keys.hint(source, known, '; the nearest is {!r}')}. A directory "
         "has a / in its name.")


CHECKS = {
    "sft": (check_optimizer, check_router, check_trained, check_checkpoint,
            check_sft_rows, check_sources, check_whole_blocks,
            tracing.check_steps),
    "rl": (check_optimizer, check_router, check_trained, check_checkpoint,
             check_groups, check_kl, check_importance_sampling, check_staleness,
             check_rewards, check_reference, check_shared_prompts,
             *sampling_checks.GRPO, check_weights_dtype, check_whole_blocks,
             tracing.check_steps),
    "evaluate": (check_checkpoints, *sampling_checks.EVALUATE,
                 check_weights_dtype, check_whole_blocks),
}
