"""Checks that `profile` names existing steps and stages; see `checks`."""

from collections.abc import Iterator, Mapping

from posttrain.config import schema
from posttrain.config.keys import shown


def check_profile(config: Mapping) -> Iterator[str]:
  steps, chosen = config["profile"]["steps"], config["profile"]["stages"]
  kind = lambda name: isinstance(config.get(name), Mapping) and config[
      name].get("kind")
  trained = [name for name in config["stages"]
             if kind(name) in schema.TRAINING_KINDS]
  for name in chosen:
    if name not in trained:
      yield (f"profile.stages: {shown(name)} is no training stage of this "
             f"config; those are {', '.join(trained) or 'none'}.")
  if steps and not trained:
    yield "profile.steps: set, but it has no effect: no stage here trains."
  if len(steps) > 2 or list(steps) != sorted(steps):
    yield (f"profile.steps: found {shown(steps)}, needed the first and the "
           "last step to trace, or one step.")


def check_steps(
    config: Mapping, name: str, stage: Mapping,
) -> Iterator[str]:
  steps, chosen = config["profile"]["steps"], config["profile"]["stages"]
  last = max(steps, default=0)
  if last > stage["num_steps"] and (not chosen or name in chosen):
    yield (f"num_steps: {stage['num_steps']} is less than the last of "
           f"profile.steps={last}. Trace earlier steps, or name the stages "
           "to trace in profile.stages.")
