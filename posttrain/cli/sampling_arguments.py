"""Flags of the verbs that sample, made from the keys of a `rollout`."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from posttrain.config import keys, schema
from posttrain.config.stages import sampling as stage_keys
from posttrain.text.instructions import CLASSES

KEYS = {"seed": schema.TOP.keys["seed"], **stage_keys.ROLLOUT,
        "temperature": stage_keys.TEMPERATURE, **stage_keys.TRUNCATIONS,
        **stage_keys.BUDGET, **stage_keys.LOGITS}
DEFAULTS = {"max_tokens": 256, "temperature": 0.0}
SAMPLING = ("max_tokens", "temperature", *stage_keys.TRUNCATIONS, "seed",
            "cache_dtype", "weights_dtype", "logits_processor",
            "logits_processor_args")
CONFIDENCE = ("confidence_window", "confidence_top_k")
THINKING = (*stage_keys.BUDGET, "wait_order", "suppress", "budget_schedule",
            *CONFIDENCE)
OPTIONS = ("suppress", "wait_order", "logits_processor",
           "logits_processor_args", "budget_schedule", *CONFIDENCE)


def number(kind: type, bounds: str):
  """Makes an argparse type: a number within an interval."""
  def parse(text: str) -> int | float:
    try:
      value = kind(text)
    except ValueError:
      raise argparse.ArgumentTypeError(
          f"found {keys.shown(text)}, needed {keys.TYPE_NAMES[kind]}") from None
    if not keys.within(value, bounds):
      raise argparse.ArgumentTypeError(
          f"{keys.shown(value)} is not in {keys.allowed(value, bounds)}")
    return value
  parse.__name__ = kind.__name__
  return parse


def add(group: Any, names: Sequence[str]) -> None:
  """Adds a flag for each of these keys of a stage's `rollout`."""
  for name in names:
    key = KEYS[name]
    default = DEFAULTS.get(name, key.default)
    how = (dict(choices=key.choices) if key.choices else
           dict(metavar="X", type=number(float, key.bounds))
           if key.type is float else
           dict(metavar="N", type=number(int, key.bounds))
           if key.type is int else
           dict(metavar="JSON", type=_object) if key.type is dict else
           dict(metavar="FUNCTION") if key.function else
           dict(metavar="WORD,WORD", type=lambda text: tuple(text.split(","))))
    shown = "" if default in ((), {}, "") else f" Default: {default}."
    group.add_argument(f"--{name.replace('_', '-')}", default=default,
                       help=key.doc + shown, **how)


def add_asking(parser: Any) -> None:
  """Adds flags for the instruction of the prompts, in s1's words."""
  group = parser.add_mutually_exclusive_group()
  group.add_argument("--ask-tokens", metavar="N",
                     type=number(int, "[1, inf)"),
                     help="append 'Think for up to N tokens.' to the prompts")
  group.add_argument("--ask-steps", metavar="N", type=number(int, "[1, inf)"),
                     help="append 'Think for up to N steps.' to the prompts")
  group.add_argument("--ask-length", metavar="CLASS", choices=CLASSES, help=(
      "ask for a short or a long amount of thinking: short, long"))


def _object(text: str) -> dict[str, Any]:
  """Parses a JSON object, as an argparse type."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise argparse.ArgumentTypeError(
        f"{keys.shown(text)} is no JSON: {error}") from error
  if not isinstance(value, dict):
    raise argparse.ArgumentTypeError(f"{keys.shown(text)} is no object")
  return value
