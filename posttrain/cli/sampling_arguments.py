"""Flags of the verbs that sample: how tokens are drawn, budgets, steering."""

import argparse
import json
from typing import Any

from posttrain.config import keys
from posttrain.model.config import SAMPLING_DTYPES
from posttrain.text.instructions import CLASSES

STEERING = ("suppress", "wait_order", "logits_processor",
            "logits_processor_args", "budget_schedule")


def number(kind: type, bounds: str):
  """An argparse type: a number within an interval."""
  def parse(text: str) -> int | float:
    try:
      value = kind(text)
    except ValueError:
      raise argparse.ArgumentTypeError(
          f"found {keys.shown(text)}, needed {keys.type_name(kind)}") from None
    if not keys.within(value, bounds):
      raise argparse.ArgumentTypeError(
          f"{keys.shown(value)} is not in {keys.allowed(value, bounds)}")
    return value
  parse.__name__ = kind.__name__
  return parse


def add_sampling(group: Any) -> None:
  group.add_argument("--max-tokens", metavar="N", default=256,
                     type=number(int, "[1, inf)"),
                     help="per completion, thinking included (256)")
  group.add_argument("--temperature", metavar="X", default=0.0,
                     type=number(float, f"0 or {keys.TEMPERATURES}"),
                     help="0 takes the likeliest token (0)")
  group.add_argument("--top-k", metavar="N", default=0,
                     type=number(int, "[0, inf)"),
                     help="likeliest tokens kept (0: all)")
  group.add_argument("--top-p", metavar="X", default=1.0,
                     type=number(float, "(0, 1]"),
                     help="probability mass kept (1.0)")
  group.add_argument("--min-p", metavar="X", default=0.0,
                     type=number(float, "[0, 1]"), help=(
                         "least probability relative to the likeliest (0)"))
  group.add_argument("--seed", metavar="N", default=0,
                     type=number(int, "[0, 4294967295]"),
                     help="the same seed draws the same completions (0)")
  group.add_argument("--cache-dtype", choices=SAMPLING_DTYPES,
                     default="compute", help=(
                         "of cached keys and values: compute.dtype, or 8 "
                         "bits with scales (compute)"))
  group.add_argument("--weights-dtype", choices=SAMPLING_DTYPES,
                     default="compute", help=(
                         "of the matrices that decoding multiplies by: as "
                         "they are, or 8 bits with scales (compute)"))
  group.add_argument("--logits-processor", metavar="FUNCTION", default="",
                     help=(
      "changes the logits of every step: module:function or file.py:function "
      "of vocab_size -> Hook, see docs/sampler.md"))
  group.add_argument("--logits-processor-args", metavar="JSON", default={},
                     type=_object, help="an object, given to it")


def add_thinking(group: Any) -> None:
  group.add_argument("--max-thinking-tokens", metavar="N", default=-1,
                     type=number(int, "[-1, inf)"),
                     help="close the thinking there (-1: no maximum)")
  group.add_argument("--min-thinking-tokens", metavar="N", default=0,
                     type=number(int, "[0, inf)"),
                     help="do not let it end before (0)")
  group.add_argument("--max-thinking-steps", metavar="N", default=-1,
                     type=number(int, "[-1, inf)"), help=(
                         "close it behind so many steps, which end in "
                         "thinking.step (-1: no maximum)"))
  group.add_argument("--num-waits", metavar="N", default=0,
                     type=number(int, keys.WAITS), help=(
                         "replace its end by thinking.wait_text so many "
                         "times (0)"))
  group.add_argument("--wait-order", choices=("cycle", "draw"),
                     default="cycle", help=(
                         "take that and thinking.more_wait_texts in turn, or "
                         "draw one (cycle)"))
  group.add_argument("--suppress", metavar="WORD,WORD", default=(),
                     type=lambda text: tuple(text.split(",")), help=(
                         "words that are not sampled while thinking"))
  group.add_argument("--budget-schedule", metavar="FUNCTION", default="",
                     help=(
      "changes the budgets of every step: module:function or "
      "file.py:function of (budgets, state) -> budgets"))


def add_asking(parser: Any) -> None:
  """What the prompts ask for, in s1's words."""
  group = parser.add_mutually_exclusive_group()
  group.add_argument("--ask-tokens", metavar="N",
                     type=number(int, "[1, inf)"),
                     help="put 'Think for up to N tokens.' behind the prompts")
  group.add_argument("--ask-steps", metavar="N", type=number(int, "[1, inf)"),
                     help="put 'Think for up to N steps.' behind the prompts")
  group.add_argument("--ask-length", metavar="CLASS", choices=CLASSES, help=(
      "ask for a short or a long amount of thinking: short, long"))


def _object(text: str) -> dict[str, Any]:
  """An argparse type: a JSON object."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise argparse.ArgumentTypeError(
        f"{keys.shown(text)} is no JSON: {error}") from error
  if not isinstance(value, dict):
    raise argparse.ArgumentTypeError(f"{keys.shown(text)} is no object")
  return value
